"""A replica reads rows outside of the model's turn, and stops work that nobody waits for."""

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.data.transforms.decode_guard import WorkBudget
from pipelines.serving.inputs import InputRow, PredictionItem
from skillnet_serving.server import model_replica
from skillnet_serving.server.model_replica import MAX_JOINED_INPUTS, ModelReplica
from skillnet_serving.server.request_rows import PredictionRequest, SearchRequest
from skillnet_serving.server.served_model import ServeConfig


class SlowModel:
    """Model whose files and passes take until a test lets them go.

    Args:
        config: settings of the server.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.budgets: list[WorkBudget] = []
        self.passes: list[list[str]] = []
        self.can_pass = threading.Event()
        self.can_pass.set()
        self.threads: list[threading.Thread] = []
        self.indexing: threading.Thread | None = None
        self.manifest, self.manifest_ns = Path("none"), 0

    def open_indexes(self, on_rows: Callable[[int], object]) -> None:
        # As an index that is never complete.
        self.indexing = threading.current_thread()
        while True:
            on_rows(1)
            threading.Event().wait(0.005)

    def is_short(self, request: PredictionRequest) -> bool:
        return request.client.startswith("short")

    def read_rows(self, request: PredictionRequest, budget: WorkBudget) -> Any:
        if any(row.item and row.item.data for row in request.rows):
            self.budgets.append(budget)
            # As a decoder that takes longer than the request may.
            while budget.rest:
                threading.Event().wait(0.01)
        return SimpleNamespace(inputs=[1] * len(request.rows), client=request.client)

    def answers_page(self, request: SearchRequest) -> bool:
        return False

    def read_query(self, request: SearchRequest, budget: WorkBudget) -> Any:
        return SimpleNamespace(embed_query=lambda row: row), request.query.text

    def search(self, request: SearchRequest, search: Any, row: str, vector: str) -> Any:
        self.passes.append([vector])
        self.can_pass.wait(60)
        return {"hits": row}

    def predict(self, requests: Any, budget: WorkBudget | None = None) -> Any:
        self.passes.append([each.client for each in requests])
        self.threads.append(threading.current_thread())
        if any(each.client == "bad" for each in requests):
            raise MemoryError
        self.can_pass.wait(60)
        return [{"predictions": each.inputs, "rejected": []} for each in requests]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that runs a test's coroutine with a replica."""
    monkeypatch.setattr(model_replica, "ServedModel", SlowModel)
    monkeypatch.setattr(model_replica, "MAX_CHILDREN", 2)

    def run_with_replica(test: Callable[[ModelReplica, Any], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            replica = ModelReplica(ServeConfig("model", "data", max_batch_size=3))
            await asyncio.wait_for(test(replica, replica._model), 60)
            replica.close()

        asyncio.run(main())

    return run_with_replica


def ask(client: str, files: int = 0, texts: int = 0, seconds: float = 30.0) -> PredictionRequest:
    items = [PredictionItem("a.svg", data=b"<svg")] * files + [PredictionItem("a", "a")] * texts
    return PredictionRequest(
        [InputRow("", {}, item) for item in items], client=client, seconds=seconds
    )


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_slow_files_of_one_client_stop_no_other_client(run: Any) -> None:
    async def test(replica: ModelReplica, model: SlowModel) -> None:
        slow = [asyncio.create_task(replica.predict(ask("greedy", files=64))) for _ in range(3)]
        await until(lambda: model.budgets)
        # Texts need no decoder; files of another client find one.
        assert len((await replica.predict(ask("greedy", texts=2)))["predictions"]) == 2
        assert len((await replica.predict(ask("other", texts=1)))["predictions"]) == 1
        short = ask("other", files=1, seconds=0.2)
        assert len((await replica.predict(short))["predictions"]) == 1
        assert not any(each.done() for each in slow)
        for each in slow:
            each.cancel()
        await asyncio.wait(slow)

    run(test)


def test_a_cancelled_request_ends_its_decoder(run: Any) -> None:
    async def test(replica: ModelReplica, model: SlowModel) -> None:
        task = asyncio.create_task(replica.predict(ask("a", files=1)))
        await until(lambda: model.budgets)
        (budget,) = model.budgets
        assert budget.rest > 0
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert budget.rest == 0
        assert model.passes == []

    run(test)


def test_large_requests_take_turns_with_small_ones(run: Any) -> None:
    async def test(replica: ModelReplica, model: SlowModel) -> None:
        model.can_pass.clear()
        large = [
            asyncio.create_task(replica.predict(ask("greedy", texts=MAX_JOINED_INPUTS + 1)))
            for _ in range(3)
        ]
        await until(lambda: model.passes)
        small = asyncio.create_task(replica.predict(ask("small", texts=1)))
        await until(lambda: replica._turn._waiting.keys() == {"greedy", model_replica.JOINED})
        model.can_pass.set()
        await asyncio.gather(small, *large)
        # One large request runs, one may come first; the third waits behind the small one.
        assert model.passes.index(["small"]) <= 2
        assert len(model.passes) == 4

    run(test)


def test_searches_run_side_by_side(run: Any) -> None:
    """A search of many rows delays neither another search nor a prediction."""

    async def test(replica: ModelReplica, model: SlowModel) -> None:
        model.can_pass.clear()
        queries = [SearchRequest(PredictionItem(name, name), client="one") for name in "ab"]
        searches = [asyncio.create_task(replica.search(query)) for query in queries]
        await until(lambda: len(model.passes) == 2)
        prediction = asyncio.create_task(replica.predict(ask("one", texts=1)))
        await until(lambda: ["one"] in model.passes)
        model.can_pass.set()
        assert [found["hits"] for found in await asyncio.gather(*searches)] == ["a", "b"]
        await prediction

    run(test)


def test_requests_that_wait_for_a_busy_model_are_one_batch(run: Any) -> None:
    async def test(replica: ModelReplica, model: SlowModel) -> None:
        model.can_pass.clear()
        first = asyncio.create_task(replica.predict(ask("first", texts=1)))
        # An idle model waits for nobody.
        await until(lambda: model.passes == [["first"]])
        names = ["a", "gone", "b", "c", "d"]
        tasks = [asyncio.create_task(replica.predict(ask(name, texts=1))) for name in names]
        await until(lambda: len(replica._waiting) == len(names))
        tasks[1].cancel()
        await asyncio.wait([tasks[1]])
        model.can_pass.set()
        await asyncio.gather(first, *tasks, return_exceptions=True)
        assert sorted(map(len, model.passes)) == [1, 1, 3]
        assert sorted(each for batch in model.passes[1:] for each in batch) == ["a", "b", "c", "d"]

    run(test)


def test_a_failed_batch_fails_its_requests_only(run: Any) -> None:
    async def test(replica: ModelReplica, model: SlowModel) -> None:
        with pytest.raises(MemoryError):
            await replica.predict(ask("bad", texts=1))
        assert (await replica.predict(ask("good", texts=1)))["predictions"] == [1]

    run(test)


def test_only_short_passes_run_in_the_event_loop(run: Any) -> None:
    async def test(replica: ModelReplica, model: SlowModel) -> None:
        here = threading.current_thread()
        # The duration of the first pass is unknown.
        for client, texts in [("short", 1), ("short", 1), ("long", 1), ("short", 17)]:
            await replica.predict(ask(client, texts=texts))
        replica._pass_s = math.inf
        await replica.predict(ask("short", texts=1))
        assert [each is here for each in model.threads] == [False, True, False, False, False]

    run(test)


def test_predictions_are_answered_while_the_indexes_are_built(run: Any) -> None:
    async def test(replica: ModelReplica, model: SlowModel) -> None:
        await until(lambda: model.indexing)
        assert (await replica.predict(ask("a", texts=1)))["predictions"] == [1]
        assert model.indexing.is_alive()
        replica.close()
        assert not model.indexing.is_alive()

    run(test)


def test_a_request_ends_with_the_model_that_it_began_with(run: Any) -> None:
    async def test(replica: ModelReplica, model: SlowModel) -> None:
        model.can_pass.clear()
        first = asyncio.create_task(replica.predict(ask("first", texts=1)))
        await until(lambda: model.passes == [["first"]])
        waiting = [asyncio.create_task(replica.predict(ask(each, texts=1))) for each in "ab"]
        await until(lambda: len(replica._waiting) == 2)
        other: Any = SlowModel(ServeConfig("other"))
        other.manifest_ns = 2
        replica._model = other
        later = [asyncio.create_task(replica.predict(ask(each, texts=1))) for each in "cd"]
        await until(lambda: len(replica._waiting) == 4)
        model.can_pass.set()
        answers = await asyncio.gather(first, *waiting, *later)
        assert [each["manifest_ns"] for each in answers] == [0, 0, 0, 2, 2]
        # Threads read the inputs, so either of two requests can be the first to wait.
        passes = [[sorted(texts) for texts in each.passes] for each in (model, other)]
        assert passes == [[["first"], ["a", "b"]], [["c", "d"]]]
        # So that the thread of the replica, which embeds with the old model, can end.
        replica._model = model

    run(test)
