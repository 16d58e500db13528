"""A trained model in memory that answers requests: predictions and searches.

Each replica of ``skillnet serve`` has a :class:`ServedModel`, see :mod:`.model_replica`. When
packages of skills join its folder or leave it, another one takes its place, if
:func:`find_unchanged_tasks` finds that no old task changes.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.data.transforms.decode_guard import WorkBudget
from pipelines.serving import bundle
from pipelines.serving.inputs import find_item_modality, named_errors, printable_name
from pipelines.serving.predictor import AnswerLayout, ReadInput, RowAnswers, TaskPredictor
from pipelines.training.evaluation.tables import sort_rows
from pipelines.training.runs.bundle_manifest import MANIFEST
from pipelines.training.runs.model_source import resolve_model
from skillnet.modality import modality_names
from skillnet.objectives.base import find_objective
from skillnet.serialization import hash_file
from skillnet.skill_proofs import PROBE_ROWS, probe_outputs, prove_task
from skillnet.skills import Task
from skillnet_platform import console
from skillnet_platform.errors import UserError, first_line, suggest_name
from skillnet_serving.retrieval.corpus_search import (
    CorpusSearch,
    MissingCaptionsError,
    list_search_tasks,
)
from skillnet_serving.retrieval.search_page import (
    PROBABILITY,
    ResultCard,
    preview_query,
    render_search_page,
)
from skillnet_serving.server.config import ServeConfig
from skillnet_serving.server.request_rows import PredictionRequest, SearchRequest

#: Share of a request's time that reading its rows may take.
READING_FRACTION = 0.75
#: Characters of a request that is read within the turn of the model.
MAX_SHORT_CHARACTERS = 1000
ANOTHER_MODEL = "A running server takes packages only; start it again to serve another model"
#: An answer: the document of the response, or ``{"error": …}``.
ServedAnswer = dict[str, Any]


class ClosedModelError(Exception):
    """The server ends."""


class UnreadyIndexError(UserError):
    """The index of a search is not open yet."""


@dataclass(frozen=True)
class ReadRequest:
    """Prediction request whose rows were read.

    Args:
        inputs: batch of the model, with the number of their row.
        rejected: unusable rows: ``row`` and ``reason``.
        top: number of alternatives.
        has_embeddings: whether answers that have more than an embedding have it too.
    """

    inputs: list[ReadInput]
    rejected: list[ServedAnswer]
    top: int
    has_embeddings: bool = False


class ServedModel:
    """A loaded model with its searches, whose indexes :meth:`open_indexes` opens.

    Args:
        config: settings of the server.
        before: the model whose place this one takes, with the indexes of unchanged tasks; or None.

    Raises:
        UserError: the model or a corpus is missing or damaged, or a task would answer otherwise
            than before.
    """

    def __init__(self, config: ServeConfig, before: "ServedModel | None" = None) -> None:
        source = resolve_model(config.model, config.tracking_uri)
        data = source.find_corpora(config.data)
        self.manifest = source.weights / MANIFEST
        # Read before the weights: a change in between is seen as one.
        self.manifest_ns = read_change_ns(self.manifest)
        self.digest = hash_file(self.manifest)
        self.predictor = bundle.open_predictor(source, data, config.precision)
        self.name = source.name
        unchanged: set[str] = set()
        if before is not None:
            unchanged = find_unchanged_tasks(before.predictor, self.predictor)
        tasks = self.predictor.model.config.tasks
        ordered = {name: tasks[name] for name in sort_rows(tasks)} if config.search else {}
        #: Modality of queries -> task -> its search; tasks made for such queries come first.
        self.searches: dict[str, dict[str, CorpusSearch]] = {each: {} for each in modality_names()}
        for modality in modality_names():
            for task in list_search_tasks(ordered, modality):
                kept = before.searches[modality].get(task) if before is not None else None
                if kept is not None and task in unchanged:
                    self.searches[modality][task] = kept.take_model(self.predictor, source)
                    continue
                # Without captions, only the rows themselves can be ranked.
                with contextlib.suppress(MissingCaptionsError):
                    self.searches[modality][task] = CorpusSearch(
                        self.predictor, source, data, task, modality=modality, code=config.vectors
                    )

    def open_indexes(self, on_rows: Callable[[int], object] = lambda rows: None) -> None:
        """Open or build the index of each search; predictions are answered meanwhile.

        Args:
            on_rows: called with the number of rows of each batch that is embedded.

        Raises:
            ClosedModelError: ``on_rows`` raises it.
        """
        pairs = [
            (m, task, each) for m, found in self.searches.items() for task, each in found.items()
        ]
        for number, (modality, task, search) in enumerate(pairs, 1):
            if search.is_open or search.index.problem:
                continue
            place = f", {task} for {modality}, {number} of {len(pairs)}"
            try:
                search.open_index(place, on_rows)
            except ClosedModelError:
                raise
            except Exception as error:
                # Such as a full disk. Predictions and other searches are answered.
                search.index.problem = f"{task}: its index cannot be built: {first_line(error)}"
                console.print_warning(search.index.problem)

    def describe(self) -> ServedAnswer:
        """Return the model's name, its tasks with what they read, and its searchable tasks.

        ``manifest`` is the SHA-256 of ``manifest.json``, ``packages`` are names. ``search`` maps a
        modality of queries to the tasks that rank rows for it, ``page`` also to those that answer
        on the search page, ``indexes`` to the progress of the
        indexes, and ``ready`` says whether all of them are open. ``problem`` is empty.
        ``manifest_ns`` orders the states of the folder.
        """
        indexes = {
            modality: {task: each.describe_progress() for task, each in searches.items()}
            for modality, searches in self.searches.items()
            if searches
        }
        tasks = {
            name: {
                "objective": task.objective,
                "reads": sorted({plan.modality for plan in task.towers.values()}),
            }
            for name, task in self.predictor.model.config.tasks.items()
        }
        return {
            "model": self.name,
            "manifest": self.digest,
            "packages": sorted(self.predictor.model.packages),
            "tasks": tasks,
            "search": self._list_searches(),
            "page": self._list_page(),
            "ready": all(each["ready"] for found in indexes.values() for each in found.values()),
            "indexes": indexes,
            "problem": "",
            "manifest_ns": self.manifest_ns,
        }

    def _list_page(self) -> dict[str, list[str]]:
        """Return the tasks that the search page offers for each modality of queries."""
        offered = self._list_searches()
        for name, task in self.predictor.model.config.tasks.items():
            if _has_answers(task):
                offered.setdefault(task.towers[task.row_tower].modality, []).append(name)
        return offered

    def answers_page(self, request: SearchRequest) -> bool:
        """Return whether the page shows answers of a task, in place of ranked rows.

        Args:
            request: parsed request of a client.
        """
        task = self.predictor.model.config.tasks.get(request.task or "")
        return request.is_page and task is not None and _has_answers(task)

    def render_answers(
        self, request: SearchRequest, read: ReadRequest, answer: ServedAnswer
    ) -> ServedAnswer:
        """Return the page with the answers of a task in ``html``, or an ``error``.

        Args:
            request: parsed form of a browser.
            read: its row.
            answer: that of :meth:`predict`.
        """
        if answer["rejected"]:
            return {"error": f"{request.query.label}: {answer['rejected'][0]['reason']}"}
        cards, label = [], request.query.label
        for found in answer["predictions"]:
            # Each function of a Python file is an input.
            details = [found["input"]] if found["input"] != label else []
            cards += [
                ResultCard(rank, best["score"], str(best["answer"]), details)
                for rank, best in enumerate(found["alternatives"] or [found], 1)
            ]
        modality = find_item_modality(request.query)
        html = render_search_page(
            printable_name(request.query.name),
            cards,
            [("task", str(request.task)), ("model", self.name)],
            tasks=self._list_page(),
            task=str(request.task),
            preview=preview_query(request.query, read.inputs[0].array, modality),
            measure=PROBABILITY,
        )
        return {"html": html}

    def _list_searches(self) -> dict[str, list[str]]:
        """Return the tasks that rank rows for each modality of queries."""
        return {modality: list(found) for modality, found in self.searches.items() if found}

    def is_short(self, request: PredictionRequest) -> bool:
        """Return whether reading the rows takes less time than a pass of the model.

        Args:
            request: parsed request of a client.
        """
        texts = [row.item.text for row in request.rows if row.item is not None]
        # A tokenizer with patterns of its own works in a child process.
        return (
            not hasattr(self.predictor.tokenizer, "encode_ids")
            and None not in texts
            and sum(len(text or "") for text in texts) <= MAX_SHORT_CHARACTERS
        )

    def read_rows(self, request: PredictionRequest, budget: WorkBudget) -> ReadRequest:
        """Read the rows of a prediction request; several threads may do it at the same time.

        Args:
            request: parsed request of a client.
            budget: seconds that the request has left, and its cancellation.
        """
        # The model needs the rest of the time.
        inputs, rejected = self.predictor.read_rows(request.rows, budget.part(READING_FRACTION))
        reasons = RowAnswers([], rejected).list_reasons()
        return ReadRequest(inputs, reasons, request.top, request.has_embeddings)

    def predict(
        self, requests: Sequence[ReadRequest], budget: WorkBudget | None = None
    ) -> list[ServedAnswer]:
        """Answer several requests with common passes of the model.

        Args:
            requests: N requests of :meth:`read_rows`.
            budget: seconds and cancellation of a request that runs alone, or None.

        Returns:
            N documents with ``predictions`` and ``rejected`` rows, both with the number of the row;
            or with an ``error``.
        """
        answers: list[ServedAnswer] = [
            {"predictions": [], "rejected": each.rejected} for each in requests
        ]
        owners = [(n, each) for n, request in enumerate(requests) for each in request.inputs]
        inputs = [replace(each, row=index) for index, (_, each) in enumerate(owners)]
        top = max(request.top for request in requests)
        try:
            # Cheaper for short passes than no_grad, which evaluation between training steps needs.
            with torch.inference_mode():
                predictions = self.predictor.predict_inputs(inputs, top, budget)
        except UserError as error:
            return [{"error": str(error)} for _ in requests]
        for index, prediction in predictions:
            number, read = owners[index]
            document = AnswerLayout(requests[number].top, requests[number].has_embeddings).format(
                prediction
            )
            answers[number]["predictions"].append({"row": read.row, **document})
        return answers

    def read_query(
        self, request: SearchRequest, budget: WorkBudget
    ) -> tuple[CorpusSearch, np.ndarray]:
        """Return the search for a query and its model input; several threads may call it.

        Args:
            request: parsed request of a client.
            budget: seconds that the request has left, and its cancellation.

        Raises:
            UnreadyIndexError: the index is not open yet.
            UserError: the query is damaged, or no task ranks rows for it.
        """
        search = self._find_search(request)
        if not search.is_open:
            raise UnreadyIndexError(
                search.index.problem
                or f"{search.task}: {search.index.num_embedded:,} of {search.num_rows:,} rows of "
                f"{search.corpus.name} are embedded"
            )
        return search, search.read_query(request.query, budget.part(READING_FRACTION))

    def search(
        self,
        request: SearchRequest,
        search: CorpusSearch,
        row: np.ndarray,
        vector: np.ndarray,
    ) -> ServedAnswer:
        """Answer a search with a document of its hits, or with a page; several threads may call it.

        Args:
            request: parsed request of a client.
            search: result of :meth:`read_query`.
            row: result of :meth:`read_query`.
            vector: that of the row, by ``search.embed_query``.
        """
        hits, doubt = search.rank_rows(vector, request.top), search.describe_doubt(row)
        if request.is_page:
            preview = preview_query(request.query, row, search.modality)
            name = printable_name(request.query.name)
            return {"html": search.render_hits(name, hits, self._list_page(), preview, doubt)}
        found = [asdict(hit) for hit in hits]
        answer: ServedAnswer = {"task": search.task, "searched": search.num_rows, "hits": found}
        return {**answer, "caution": doubt} if doubt else answer

    def _find_search(self, request: SearchRequest) -> CorpusSearch:
        with named_errors(request.query.label):
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


def _has_answers(task: Task) -> bool:
    """Return whether a task answers an input by itself, without rows to rank."""
    objective = find_objective(task.objective)
    return bool(objective.has_labels) and not objective.pairs_towers


def read_change_ns(path: Path) -> int:
    """Return when a file was last changed, in ns; it increases with each replacement. 0: no file.

    Args:
        path: location of the file.
    """
    try:
        # Unlike the time of modification, no program can set this one.
        return path.stat().st_ctime_ns
    except OSError:
        return 0


def find_unchanged_tasks(before: TaskPredictor, after: TaskPredictor) -> set[str]:
    """Return the tasks that two models have in common, after a comparison of their outputs.

    Packages add and remove tasks. Those of the base, and of packages that both models have, must
    give equal bits on generated inputs.

    Args:
        before: the model that answers requests now.
        after: the model that takes its place.

    Raises:
        UserError: a task of the base is new or missing, or a task answers otherwise.
    """
    old, new = _read_origins(before), _read_origins(after)
    for task in sorted(old.keys() ^ new.keys()):
        if (old | new)[task] is None:
            raise UserError(f"{task}: no package brings or takes this task. {ANOTHER_MODEL}")
    common = [task for task in old if task in new and old[task] == new[task]]
    if before.model.vocabulary.tokenizer != after.model.vocabulary.tokenizer:
        raise UserError(f"the tokenizer is another one. {ANOTHER_MODEL}")
    # In the precision of the answers, so that merged weights are in memory once.
    with before.runner.inference():
        expected = probe_outputs(before.model, common)
    with after.runner.inference():
        found = probe_outputs(after.model, common)
    for task in common:
        proof = prove_task(after.model, task, expected[task], found[task])
        if proof.differing or before.describe_task(task) != after.describe_task(task):
            raise UserError(
                f"{task}: {proof.differing} of {PROBE_ROWS} generated inputs get another answer, "
                f"or its settings changed. {ANOTHER_MODEL}"
            )
    return set(common)


def _read_origins(predictor: TaskPredictor) -> dict[str, str | None]:
    """Return task -> digest of the package that brought it; None for a task of the base."""
    model = predictor.model
    packed = {task: each["digest"] for each in model.packages.values() for task in each["tasks"]}
    return {task: packed.get(task) for task in model.config.tasks}
