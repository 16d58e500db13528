"""Replica of ``skillnet serve``: requests that wait at the same time become one batch.

A replica runs in the process of the server, or in a process of Ray Serve, which
:mod:`skillnet_serving.serve` starts for several replicas. It takes packages of skills that join the
folder of its model, or leave it.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from pipelines.data.transforms.decode_guard import WorkBudget
from pipelines.data.transforms.decoder_process import MAX_CHILDREN
from pipelines.serving.inputs import InputRow
from skillnet.serialization import hash_file
from skillnet_platform import console
from skillnet_platform.errors import UserError, first_line
from skillnet_serving.server.admission import FairShare
from skillnet_serving.server.config import ServeConfig
from skillnet_serving.server.request_rows import PredictionRequest, SearchRequest
from skillnet_serving.server.served_model import (
    ClosedModelError,
    ReadRequest,
    ServedAnswer,
    ServedModel,
    UnreadyIndexError,
    read_change_ns,
)

#: Inputs of a request that joins others; a larger one runs alone.
MAX_JOINED_INPUTS = 64
#: Name under which the joined requests take turns at the model.
JOINED = "joined requests"
#: CPU seconds of the last pass up to which the next one runs in the thread of the event loop.
SHORT_PASS_S = 0.01
#: Rows of a short request, which is read in the event loop, and of short requests in a pass there.
MAX_SHORT_ROWS = 16
#: Seconds between two looks at the folder of the model.
LOOK_S = 1.0


@dataclass(frozen=True)
class WaitingRequest:
    """Request that waits for a batch.

    Args:
        model: that answers it.
        read: its inputs.
        is_short: whether it has few rows, and short texts only.
        answer: its answer, once it is known.
    """

    model: ServedModel
    read: ReadRequest
    is_short: bool
    answer: "asyncio.Future[ServedAnswer]"


class ModelReplica:
    """A served model whose requests run in batches, one batch at a time.

    An idle model takes a request at once; requests that come while it is busy form the next batch.
    Rows are read before their request waits for the model: a file that takes long to decode holds
    up no other request. Clients take turns at the decoders and at the model.

    A thread opens the indexes of the searches, and looks at the folder of the model. If packages
    joined or left it, a new model takes the place of the old one; requests that began with the old
    one end with it. A folder that cannot be taken changes nothing.

    Args:
        config: settings of the server.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config, self._model = config, ServedModel(config)
        self._seen_ns, self._problem = 0, ""
        self._looking, self._is_closed = threading.Lock(), threading.Event()
        self._look: asyncio.Future[None] | None = None
        self._turn, self._decoders = FairShare(1), FairShare(MAX_CHILDREN)
        self._max_batch_size = config.max_batch_size
        self._waiting: deque[WaitingRequest] = deque()
        self._batches: asyncio.Task[None] | None = None
        self._pass_s = math.inf
        # Slow files must not take the threads that read texts, nor texts that of the model.
        self._model_thread = ThreadPoolExecutor(1, "model")
        self._decoder_threads = ThreadPoolExecutor(MAX_CHILDREN, "decoder")
        self._keeping = threading.Thread(target=self._keep, daemon=True)
        self._keeping.start()

    def close(self) -> None:
        """End the thread that opens the indexes and looks at the folder."""
        self._is_closed.set()
        self._keeping.join()

    def _keep(self) -> None:
        with contextlib.suppress(ClosedModelError):
            while not self._is_closed.is_set():
                self.look_at_folder()
                # The model may be replaced while it embeds a corpus.
                self._model.open_indexes(self._look_between)
                self._is_closed.wait(LOOK_S)

    def _look_between(self, rows: int) -> None:
        if self._is_closed.is_set():
            raise ClosedModelError
        self.look_at_folder()

    def look_at_folder(self) -> None:
        """Take the folder of the model if it changed; several threads may call it."""
        with self._looking:
            model = self._model
            found_ns = read_change_ns(model.manifest)
            if found_ns == self._seen_ns:
                return
            try:
                if hash_file(model.manifest) != model.digest:
                    self._model = ServedModel(self._config, model)
                    old, new = (set(each.predictor.model.packages) for each in (model, self._model))
                    added, removed = sorted(new - old), sorted(old - new)
                    console.print_note(
                        f"{model.name}: {', '.join(added) or 'no package'} added, "
                        f"{', '.join(removed) or 'none'} removed; no old task changes"
                    )
                else:
                    model.manifest_ns = found_ns
                self._problem = ""
            except Exception as error:
                # Also an error that nobody thought of must not end a server.
                if read_change_ns(model.manifest) != found_ns:
                    return  # replaced while it was read; the next look reads it again
                self._problem = f"{first_line(error)} (the model of before answers)"
                console.print_warning(f"{model.name}: {self._problem}")
            self._seen_ns = found_ns

    async def _choose_model(self, manifest_ns: int) -> ServedModel:
        """Return the model of a request: no older than the newest one that any replica showed."""
        if manifest_ns > self._model.manifest_ns:
            # One look for all requests that wait.
            if self._look is None or self._look.done():
                self._look = asyncio.ensure_future(asyncio.to_thread(self.look_at_folder))
            await asyncio.shield(self._look)
        return self._model

    def describe(self) -> ServedAnswer:
        """Return name, tasks and searches of the model, see :class:`.served_model.ServedModel`.

        ``problem`` says why the folder as it is now is not served; "" if it is.
        """
        return {**self._model.describe(), "problem": self._problem}

    async def describe_later(self, manifest_ns: int) -> ServedAnswer:
        """Return the same of a model that is no older than the given time of its folder."""
        await self._choose_model(manifest_ns)
        return self.describe()

    def ask(self, method: str, request: Any) -> Coroutine[Any, Any, ServedAnswer]:
        """Return the coroutine that answers a request.

        Args:
            method: name of a method of this class.
            request: its argument.
        """
        answering: Coroutine[Any, Any, ServedAnswer] = getattr(self, method)(request)
        return answering

    async def predict(self, request: PredictionRequest) -> ServedAnswer:
        """Answer a prediction request, together with others that wait at the same time."""
        model = await self._choose_model(request.manifest_ns)
        return {**await self._predict(model, request), "manifest_ns": model.manifest_ns}

    async def _predict(self, model: ServedModel, request: PredictionRequest) -> ServedAnswer:
        with _budget_of(request) as budget:
            is_short = len(request.rows) <= MAX_SHORT_ROWS and model.is_short(request)
            if is_short:
                # A step to another thread costs as much as reading a short text.
                read = model.read_rows(request, budget)
            else:
                has_files = any(row.item and row.item.data is not None for row in request.rows)
                read = await self._read(model.read_rows, request, budget, has_files)
            if len(read.inputs) <= MAX_JOINED_INPUTS:
                return await self._join(model, read, is_short)
            answers = await self._run(request.client, model.predict, [read], budget)
            found: ServedAnswer = answers[0]
            return found

    async def _join(self, model: ServedModel, read: ReadRequest, is_short: bool) -> ServedAnswer:
        """Return the answer of the next batch with room."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(WaitingRequest(model, read, is_short, answer))
        if self._batches is None or self._batches.done():
            self._batches = asyncio.create_task(self._run_batches())
        found: ServedAnswer = await answer
        return found

    async def _run_batches(self) -> None:
        """Answer the waiting requests in batches until none is left."""
        while self._waiting:
            async with self._turn.hold(JOINED):
                # Chosen when the turn has come: more requests may wait by then.
                batch = self._take_batch()
                try:
                    # A step to the model's thread and back costs a fifth of a short pass.
                    if self._is_quick(batch):
                        answers = self._answer(batch)
                    else:
                        answers = await self._call(self._answer, batch)
                except Exception as error:
                    for each in batch:
                        if not each.answer.done():
                            each.answer.set_exception(error)
                    continue
            for each, found in zip(batch, answers, strict=True):
                if not each.answer.done():
                    each.answer.set_result(found)

    def _take_batch(self) -> list[WaitingRequest]:
        batch: list[WaitingRequest] = []
        while self._waiting and len(batch) < self._max_batch_size:
            # Two models have no common pass.
            if batch and self._waiting[0].model is not batch[0].model:
                break
            waiting = self._waiting.popleft()
            # A request whose client left is cancelled.
            if not waiting.answer.done():
                batch.append(waiting)
        return batch

    def _is_quick(self, batch: list[WaitingRequest]) -> bool:
        """Return whether the event loop may wait for the answers of a batch."""
        is_short = all(each.is_short for each in batch)
        rows = sum(len(each.read.inputs) for each in batch)
        return is_short and rows <= MAX_SHORT_ROWS and self._pass_s <= SHORT_PASS_S

    def _answer(self, batch: list[WaitingRequest]) -> list[ServedAnswer]:
        if not batch:
            return []
        began = time.thread_time()
        answers = batch[0].model.predict([each.read for each in batch])
        self._pass_s = time.thread_time() - began
        return answers

    async def search(self, request: SearchRequest) -> ServedAnswer:
        """Answer a search request, or a request of the page for a task that does not search."""
        model = await self._choose_model(request.manifest_ns)
        with _budget_of(request) as budget:
            answer = self._answer_page if model.answers_page(request) else self._find
            return {**await answer(model, request, budget), "manifest_ns": model.manifest_ns}

    async def _answer_page(
        self, model: ServedModel, request: SearchRequest, budget: WorkBudget
    ) -> ServedAnswer:
        item = replace(request.query, task=request.task)
        row = InputRow(item.label, {"row": 0}, item)
        asked = PredictionRequest([row], request.top, client=request.client)
        read = await self._read(model.read_rows, asked, budget, item.data is not None)
        (answer,) = await self._run(request.client, model.predict, [read], budget)
        if "error" in answer:
            return dict(answer)
        return await asyncio.to_thread(model.render_answers, request, read, answer)

    async def _find(
        self, model: ServedModel, request: SearchRequest, budget: WorkBudget
    ) -> ServedAnswer:
        has_file = request.query.data is not None
        try:
            search, row = await self._read(model.read_query, request, budget, has_file)
        except UnreadyIndexError as error:
            return {"unready": str(error)}
        except UserError as error:
            return {"error": str(error)}
        vector = await self._run(request.client, search.embed_query, row)
        # Ranking needs no turn at the model, so that searches run side by side.
        return await asyncio.to_thread(model.search, request, search, row, vector)

    async def _read(
        self,
        read: Callable[..., Any],
        request: PredictionRequest | SearchRequest,
        budget: WorkBudget,
        has_files: bool,
    ) -> Any:
        """Read the inputs of a request in a thread; files take a share of the decoders."""
        if not has_files:
            return await asyncio.to_thread(read, request, budget)
        async with self._decoders.hold(request.client):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._decoder_threads, read, request, budget)

    async def _run(self, client: str, call: Callable[..., Any], *given: Any) -> Any:
        """Use the model in its client's turn."""
        async with self._turn.hold(client):
            return await self._call(call, *given)

    async def _call(self, call: Callable[..., Any], *given: Any) -> Any:
        """Use the model in its thread: other requests must not wait for it."""
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._model_thread, call, *given)
        try:
            return await asyncio.shield(work)
        finally:
            # A cancelled request keeps its turn until the thread is free.
            await asyncio.wait([work])


@contextlib.contextmanager
def _budget_of(request: PredictionRequest | SearchRequest) -> Iterator[WorkBudget]:
    """Return the budget of a request; its threads stop when the request ends."""
    budget = WorkBudget(request.seconds)
    try:
        yield budget
    finally:
        budget.stop()
