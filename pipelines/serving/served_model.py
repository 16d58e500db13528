"""A trained model in memory that answers requests: predictions and searches.

Each replica of ``skillnet serve`` has a :class:`ServedModel`, see
:mod:`pipelines.serving.model_replica`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.serving.predictor import to_document
from pipelines.serving.request_rows import PredictionRequest, SearchRequest
from skillnet_platform.errors import UserError, suggest_name

#: An answer: the document of the response, or ``{"error": …}``.
ServedAnswer = dict[str, Any]


@dataclass(frozen=True)
class ServedModelConfig:
    """The model of a server, and how its replicas batch.

    Args:
        model: address of the model, with a version instead of an alias.
        data: directory or URI of prepared corpora.
        precision: auto, bf16, fp32 or fp64.
        tracking_uri: of the tracker, without its password.
        search: whether the corpora of the retrieval tasks can be searched.
        max_batch_size: requests that one batch joins.
        batch_wait_s: seconds that a request waits for others.
    """

    model: str
    data: str
    precision: str = "auto"
    tracking_uri: str | None = None
    search: bool = True
    max_batch_size: int = 16
    batch_wait_s: float = 0.005


class ServedModel:
    """A loaded model with the indexes of its corpora.

    Args:
        config: of the server.

    Raises:
        UserError: the model or a corpus is missing or damaged.
    """

    def __init__(self, config: ServedModelConfig) -> None:
        from pipelines.evaluation.tables import sort_rows
        from pipelines.runs.model_source import resolve_model
        from pipelines.serving.bundle import open_predictor
        from pipelines.serving.corpus_search import CorpusSearch, list_search_tasks

        source = resolve_model(config.model, config.tracking_uri)
        self.predictor = open_predictor(source, config.data, config.precision)
        self.name = source.name
        found = list_search_tasks(self.predictor.model.config.tasks) if config.search else []
        self.searches = {
            task: CorpusSearch(self.predictor, source, config.data, task)
            for task in sort_rows(found)
        }

    def describe(self) -> ServedAnswer:
        """Return the model's name, its tasks with what they read, and its searchable tasks."""
        tasks = {
            name: {
                "objective": task.objective,
                "reads": sorted({plan.modality for plan in task.towers.values()}),
            }
            for name, task in self.predictor.model.config.tasks.items()
        }
        return {"model": self.name, "tasks": tasks, "search": list(self.searches)}

    def predict(self, requests: Sequence[PredictionRequest]) -> list[ServedAnswer]:
        """Answer several requests with common passes of the model.

        Args:
            requests: N requests.

        Returns:
            N documents with ``predictions`` and ``rejected`` rows, both with the number of the row.
        """
        answers: list[ServedAnswer] = [{"predictions": [], "rejected": []} for _ in requests]
        owners = [(n, row) for n, each in enumerate(requests) for row in range(len(each.items))]

        def reject(index: int, reason: str) -> None:
            number, row = owners[index]
            reason = reason.removeprefix(f"row {row}: ")
            answers[number]["rejected"].append({"row": row, "reason": reason})

        items = [item for request in requests for item in request.items]
        top = max(request.top for request in requests)
        for index, prediction in self.predictor.predict_items(items, top, reject):
            number, row = owners[index]
            document = to_document(prediction, requests[number].top)
            answers[number]["predictions"].append({"row": row, **document})
        return answers

    def search(self, request: SearchRequest) -> ServedAnswer:
        """Answer a search with a document of its hits.

        Args:
            request: of a client.
        """
        try:
            search = self._find_search(request.task)
        except UserError as error:
            return {"error": str(error)}
        hits = [asdict(hit) for hit in search.find_hits(request.query, request.top)]
        return {"task": search.task, "searched": search.num_rows, "hits": hits}

    def render_search(self, request: SearchRequest) -> ServedAnswer:
        """Answer a search with its page in ``html``.

        Args:
            request: of a browser.
        """
        try:
            search = self._find_search(request.task)
        except UserError as error:
            return {"error": str(error)}
        hits = search.find_hits(request.query, request.top)
        return {"html": search.render_hits(request.query, hits, list(self.searches))}

    def _find_search(self, task: str | None) -> Any:
        if not self.searches:
            raise UserError("this server has no task that ranks rows for a text")
        chosen = task or next(iter(self.searches))
        if chosen not in self.searches:
            raise UserError(
                f"task: {chosen!r} ranks no rows for a text{suggest_name(chosen, self.searches)}"
            )
        return self.searches[chosen]
