"""A trained model in memory that answers requests: predictions and searches.

Each replica of ``skillnet serve`` has a :class:`ServedModel`, see
:mod:`pipelines.serving.model_replica`.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipelines.serving.input_items import find_item_modality, printable_name
from pipelines.serving.predictor import to_document
from pipelines.serving.request_rows import PredictionRequest, SearchRequest
from skillnet.skills import MODALITIES
from skillnet_platform.errors import UserError, suggest_name

if TYPE_CHECKING:
    from pipelines.serving.corpus_search import CorpusSearch

#: An answer: the document of the response, or ``{"error": …}``.
ServedAnswer = dict[str, Any]


@dataclass(frozen=True)
class ServedModelConfig:
    """The model of a server, and how its replicas batch.

    Args:
        model: address of the model, with a version instead of an alias.
        data: directory or URI of prepared corpora; None takes those of the model's run.
        precision: auto, bf16, fp32 or fp64.
        tracking_uri: of the tracker, without its password.
        search: whether the corpora of the retrieval tasks can be searched.
        max_batch_size: requests that one batch joins.
        batch_wait_s: seconds that a request waits for others.
    """

    model: str
    data: str | None = None
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
        from pipelines.serving.corpus_search import (
            CorpusSearch,
            MissingCaptionsError,
            list_search_tasks,
        )

        source = resolve_model(config.model, config.tracking_uri)
        data = source.find_corpora(config.data)
        self.predictor = open_predictor(source, data, config.precision)
        self.name = source.name
        tasks = self.predictor.model.config.tasks
        ordered = {name: tasks[name] for name in sort_rows(tasks)} if config.search else {}
        #: Modality of queries -> task -> its search; tasks made for such queries come first.
        self.searches: dict[str, dict[str, CorpusSearch]] = {each: {} for each in MODALITIES}
        for modality, searches in self.searches.items():
            for task in list_search_tasks(ordered, modality):
                # Without captions, only the rows themselves can be ranked.
                with contextlib.suppress(MissingCaptionsError):
                    searches[task] = CorpusSearch(
                        self.predictor, source, data, task, modality=modality
                    )

    def describe(self) -> ServedAnswer:
        """Return the model's name, its tasks with what they read, and its searchable tasks.

        ``search`` maps a modality of queries to the tasks that rank rows for it.
        """
        tasks = {
            name: {
                "objective": task.objective,
                "reads": sorted({plan.modality for plan in task.towers.values()}),
            }
            for name, task in self.predictor.model.config.tasks.items()
        }
        return {"model": self.name, "tasks": tasks, "search": self._list_searches()}

    def _list_searches(self) -> dict[str, list[str]]:
        """Return the tasks that rank rows for each modality of queries."""
        return {modality: list(found) for modality, found in self.searches.items() if found}

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
            search = self._find_search(request)
            hits = search.find_hits(request.query, request.top)
        except UserError as error:
            return {"error": str(error)}
        found = [asdict(hit) for hit in hits]
        return {"task": search.task, "searched": search.num_rows, "hits": found}

    def render_search(self, request: SearchRequest) -> ServedAnswer:
        """Answer a search with its page in ``html``.

        Args:
            request: of a browser.
        """
        try:
            search = self._find_search(request)
            row = search.read_query(request.query)
        except UserError as error:
            return {"error": str(error)}
        hits, preview = search.rank_rows(row, request.top), search.preview_query(request.query, row)
        name = printable_name(request.query.name)
        return {"html": search.render_hits(name, hits, self._list_searches(), preview)}

    def _find_search(self, request: SearchRequest) -> "CorpusSearch":
        modality = find_item_modality(request.query)
        searches = self.searches[modality]
        if not searches:
            raise UserError(f"this server has no task that ranks rows for {modality}")
        chosen = request.task or next(iter(searches))
        if chosen not in searches:
            raise UserError(
                f"task: {chosen!r} ranks no rows for {modality}{suggest_name(chosen, searches)}"
            )
        return searches[chosen]
