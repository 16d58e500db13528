"""Replica of ``skillnet serve`` in Ray Serve: requests that arrive together become one batch.

The module imports Ray Serve; :mod:`pipelines.serve` loads it after Ray's environment is set.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ray import serve

from pipelines.data.transforms.decode_guard import WorkBudget
from pipelines.data.transforms.decoder_process import MAX_CHILDREN
from pipelines.serving.fair_share import FairShare
from pipelines.serving.request_rows import PredictionRequest, SearchRequest
from pipelines.serving.served_model import (
    ReadRequest,
    ServedAnswer,
    ServedModel,
    ServedModelConfig,
)
from skillnet_platform.errors import UserError

#: Inputs of a request that joins others; a larger one runs alone.
MAX_JOINED_INPUTS = 64
#: Name under which the joined requests take turns at the model.
JOINED = "joined requests"


class ModelReplica:
    """Replica of Ray Serve: a served model whose requests run in batches, one batch at a time.

    Rows are read before their request waits for the model: a file that takes long to decode holds
    up no other request. Clients take turns at the decoders and at the model.

    Args:
        config: settings of the server.
    """

    def __init__(self, config: ServedModelConfig) -> None:
        self._model = ServedModel(config)
        self._turn, self._decoders = FairShare(1), FairShare(MAX_CHILDREN)
        # Ray Serve adds these methods to the decorated one.
        batch: Any = self._predict_batch
        batch.set_max_batch_size(config.max_batch_size)
        batch.set_batch_wait_timeout_s(config.batch_wait_s)

    async def predict(self, request: PredictionRequest) -> ServedAnswer:
        """Answer a prediction request, together with others that arrive at the same time."""
        with _budget_of(request) as budget:
            has_files = any(row.item and row.item.data is not None for row in request.rows)
            read = await self._read(self._model.read_rows, request, budget, has_files)
            if len(read.inputs) > MAX_JOINED_INPUTS:
                (answer,) = await self._run(request.client, self._model.predict, [read], budget)
            else:
                answer = await self._predict_batch(read)
            found: ServedAnswer = answer
            return found

    @serve.batch
    async def _predict_batch(self, requests: list[ReadRequest]) -> list[ServedAnswer]:
        answers: list[ServedAnswer] = await self._run(JOINED, self._model.predict, requests)
        return answers

    async def search(self, request: SearchRequest) -> ServedAnswer:
        """Answer a search request."""
        return await self._search(self._model.search, request)

    async def render_search(self, request: SearchRequest) -> ServedAnswer:
        """Answer a search request with its page."""
        return await self._search(self._model.render_search, request)

    async def _search(
        self, answer: Callable[..., ServedAnswer], request: SearchRequest
    ) -> ServedAnswer:
        with _budget_of(request) as budget:
            has_file = request.query.data is not None
            try:
                found = await self._read(self._model.read_query, request, budget, has_file)
            except UserError as error:
                return {"error": str(error)}
            search, row = found
            vector = await self._run(request.client, search.embed_query, row)
            # Ranking needs no turn at the model, so that searches run side by side.
            return await asyncio.to_thread(answer, request, search, row, vector)

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
            return await asyncio.to_thread(read, request, budget)

    async def _run(self, client: str, call: Callable[..., Any], *given: Any) -> Any:
        """Use the model in a thread: health checks of Ray Serve must not wait for it."""
        async with self._turn.hold(client):
            work = asyncio.ensure_future(asyncio.to_thread(call, *given))
            try:
                return await asyncio.shield(work)
            finally:
                # A cancelled request keeps its turn until its thread has ended.
                await asyncio.wait([work])


@contextlib.contextmanager
def _budget_of(request: PredictionRequest | SearchRequest) -> Iterator[WorkBudget]:
    """Return the budget of a request; its threads stop when the request ends."""
    budget = WorkBudget(request.seconds)
    try:
        yield budget
    finally:
        budget.stop()
