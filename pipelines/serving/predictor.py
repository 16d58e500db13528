"""Predictions of a trained model for raw inputs: texts and the bytes of media files.

    rows ── find_towers, preprocess, router ──> inputs ── batches per task and tower ──> answers

:class:`TaskPredictor` is the path of every entry: ``skillnet predict`` with files and with blocks,
``skillnet serve``, the MLflow model, and the methods of a model in Python. It preprocesses inputs
with the settings of the training corpora.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.data.modalities.base import InputContext, ModalityFiles
from pipelines.data.transforms import text
from pipelines.data.transforms.decode_guard import NO_TIME_LEFT, WorkBudget
from pipelines.data.transforms.decoder_process import decode_media
from pipelines.serving.inputs import (
    InputRow,
    PredictionItem,
    find_item_modality,
    named_errors,
    printable_name,
)
from pipelines.training.evaluation.inference import InferenceRunner, memory_inputs
from skillnet.modality import find_modality
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective, list_objectives
from skillnet.objectives.heads import RowAnswer, head_class
from skillnet.router import InputRouter, RoutedInput, find_buckets, load_counts
from skillnet.skills import Task, find_task
from skillnet_platform.errors import UserError

#: Share of a request's time that one of its items may take.
SLOWEST_ITEM_FRACTION = 0.25
#: Functions that a request may have beyond one per row, and inputs between looks at its time.
MAX_FUNCTIONS, INPUTS_PER_LOOK = 1024, 256
TOO_MANY_FUNCTIONS = f"more than {MAX_FUNCTIONS:,} functions in a request. Split the file"
#: Rows, and bytes of media, that are in memory at the same time.
CHUNK_ROWS, CHUNK_BYTES = 64, 64 * 2**20
#: Alternatives of an answer by default.
DEFAULT_TOP = 5
#: Keys of a corpus' preprocessing settings that limit the tokens of its captions.
CAPTION_KEYS = ("max_caption_tokens", "caption_tokens")


@dataclass(frozen=True)
class TaskPrediction:
    """Result of a task for one input.

    Args:
        input: name of the input; each function of a Python file is an input.
        task: the task that ran; "" if the router is unsure which one should.
        answer: best class, transcript, or the known caption nearest to an image, video or function.
            Empty for a text in a retrieval task: its embedding is the result. Without a task, the
            sentence of the router.
        score: probability of the class; geometric mean of the transcript's probabilities; cosine
            similarity of the caption.
        alternatives: best answers with their scores, including the first.
        embedding: unit vector of the input, for retrieval tasks.
        confidence: probability that the input belongs to the task; 1 if no other one was possible.
    """

    input: str
    task: str
    answer: str
    score: float
    alternatives: list[tuple[str, float]] = field(default_factory=list)
    embedding: list[float] = field(default_factory=list)
    confidence: float = 1.0


@dataclass(frozen=True)
class ReadInput:
    """Model input that was read from an item.

    Args:
        row: index of the row.
        task: that runs; "" if the router is unsure.
        tower: tower of the task, such as ``query``.
        name: identifier of the input in the result.
        array: that the tower reads.
        confidence: see :class:`TaskPrediction`.
        doubt: sentence of the router; "" if a task runs.
    """

    row: int
    task: str
    tower: str
    name: str
    array: np.ndarray
    confidence: float = 1.0
    doubt: str = ""


@dataclass(frozen=True)
class CaptionBank:
    """Known captions of a retrieval task and their embeddings, (N, E) of unit length."""

    captions: list[str]
    embeddings: np.ndarray


@dataclass(frozen=True)
class RowAnswers:
    """Answers to rows.

    Args:
        answered: rows with their predictions, in order; a Python file has several.
        rejected: unusable rows with their reasons, in order.
    """

    answered: list[tuple[InputRow, TaskPrediction]]
    rejected: list[InputRow]

    def list_documents(self, layout: "AnswerLayout | None" = None) -> list[dict[str, Any]]:
        """Return the predictions as plain values, with the place of their rows.

        Args:
            layout: what is kept; None keeps all.
        """
        layout = layout or AnswerLayout(has_embeddings=True)
        return [row.place | layout.format(prediction) for row, prediction in self.answered]

    def list_reasons(self) -> list[dict[str, Any]]:
        """Return the rejected rows as plain values."""
        return [row.place | {"reason": row.reason} for row in self.rejected]


class TaskPredictor:
    """Predictor for raw inputs.

    Args:
        model: the trained model.
        tokenizer: text encoder of the training corpora.
        tasks: task -> ``names`` of its classes or symbols (symbol 1 first), ``limit`` of its own
            modality's length and ``preprocessing`` settings of its corpus, as in training.
        banks: task -> known captions.
        precision: see :class:`pipelines.training.evaluation.inference.InferenceRunner`.
        counts: task -> file with the features of its training rows, which tell inputs without a
            task apart.
    """

    def __init__(
        self,
        model: TaskModel,
        tokenizer: Any,
        tasks: Mapping[str, Mapping[str, Any]],
        banks: Mapping[str, CaptionBank] | None = None,
        precision: str = "auto",
        counts: Mapping[str, Path] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.tasks = model, tokenizer, tasks
        self.banks, self._counts = dict(banks or {}), dict(counts or {})
        self._routers: dict[frozenset[str], InputRouter] = {}
        self.runner = InferenceRunner(model, precision)

    def describe_task(self, task: str) -> tuple[Any, ...]:
        """Return names, captions, limit and preprocessing of a task, to compare two predictors.

        Args:
            task: name of the task.
        """
        bank, about = self.banks.get(task), self.tasks[task]
        settings = (about["limit"], about["preprocessing"])
        return bank and bank.captions, list(about["names"]), *settings

    def predict(
        self, items: Sequence[PredictionItem], top: int = DEFAULT_TOP
    ) -> list[TaskPrediction]:
        """Predict for each item, in order, with each task that answers it.

        A Python file gives predictions for each of its functions.

        Args:
            items: inputs.
            top: number of alternatives.

        Raises:
            UserError: an input is unreadable, or no task of the model reads its modality.
        """
        rows = [InputRow(item.label, {}, item, is_required=True) for item in items]
        return [made for each in self.answer_rows(rows, top) for _, made in each.answered]

    def answer_rows(
        self, rows: Iterable[InputRow], top: int = DEFAULT_TOP
    ) -> "Iterator[RowAnswers]":
        """Yield the answers to rows, in parts whose rows fit into memory.

        Args:
            rows: usable and rejected ones.
            top: number of alternatives.

        Raises:
            UserError: a required row is unusable.
        """
        for part in _cut_rows(rows):
            # A part is read before the model runs, so that a damaged file fails early.
            inputs, rejected = self.read_rows(part)
            found = self.predict_inputs(inputs, top)
            yield RowAnswers([(part[number], made) for number, made in found], rejected)

    def read_rows(
        self, rows: Sequence[InputRow], budget: WorkBudget | None = None
    ) -> tuple[list[ReadInput], list[InputRow]]:
        """Return the model inputs of rows, in order, and the unusable rows with their reasons.

        Args:
            rows: usable and rejected ones.
            budget: seconds and cancellation of the request that the rows belong to. No row but
                the last takes more than a quarter of what is left, so that one slow file leaves
                time for the others.

        Raises:
            UserError: a required row is unusable.
        """
        inputs: list[ReadInput] = []
        rejected: list[InputRow] = []
        for number, row in enumerate(rows):
            is_last = number == len(rows) - 1
            own = budget if budget is None or is_last else budget.part(SLOWEST_ITEM_FRACTION)
            try:
                if row.item is None:
                    raise UserError(row.reason)
                found = self._read_item(row.item, number, own)
                if budget is not None and len(inputs) + len(found) > len(rows) + MAX_FUNCTIONS:
                    raise UserError(TOO_MANY_FUNCTIONS)
            except ValueError as error:
                if row.is_required:
                    raise UserError(f"{row.where}: {error}") from None
                rejected.append(replace(row, item=None, reason=str(error)))
                continue
            inputs += found
        return inputs, rejected

    def predict_inputs(
        self, inputs: Sequence[ReadInput], top: int, budget: WorkBudget | None = None
    ) -> list[tuple[int, TaskPrediction]]:
        """Predict for model inputs, in order.

        Args:
            inputs: result of :meth:`read_rows`.
            top: number of alternatives.
            budget: seconds and cancellation of the request that all inputs belong to; the model
                stops when it is over.

        Returns:
            Index of the row, and a prediction for it.

        Raises:
            UserError: the budget is over.
        """
        out: list[TaskPrediction | None] = [
            TaskPrediction(each.name, "", each.doubt, each.confidence, confidence=each.confidence)
            if each.doubt
            else None
            for each in inputs
        ]
        # One pass per task and tower, so that the model runs in batches and not item by item.
        for key in dict.fromkeys((each.task, each.tower) for each in inputs if not each.doubt):
            chosen = [i for i, each in enumerate(inputs) if (each.task, each.tower) == key]
            step = len(chosen) if budget is None else INPUTS_PER_LOOK
            for start in range(0, len(chosen), step):
                if budget is not None and not budget.rest:
                    raise UserError(NO_TIME_LEFT)
                indices = chosen[start : start + step]
                answers = self._run_task(*key, [inputs[i].array for i in indices], top)
                for index, found in zip(indices, answers, strict=True):
                    out[index] = TaskPrediction(
                        inputs[index].name,
                        key[0],
                        found.answer,
                        found.score,
                        list(found.alternatives),
                        list(found.embedding),
                        inputs[index].confidence,
                    )
        return [(n.row, each) for n, each in zip(inputs, out, strict=True) if each is not None]

    def tokenize(self, texts: Sequence[str], limit: int) -> list[np.ndarray]:
        """Return the token ids of each text, truncated to ``limit``.

        Args:
            texts: to tokenize.
            limit: maximum number of tokens.
        """
        rows = text.tokenize_texts(self.tokenizer, texts, limit)
        # An encoder needs at least one token; id 1 is the unknown token (decision 24).
        return [np.array(row or [1], np.int32) for row in rows]

    def embed_texts(self, task: str, texts: Sequence[str]) -> np.ndarray:
        """Return the embeddings of queries in a retrieval task's space, (N, E) of unit length.

        Args:
            task: a retrieval task.
            texts: N queries.
        """
        spec = find_task(task, self.model.config.tasks)
        tower = spec.caption_tower or "query"
        rows = self.tokenize([text.strip() for text in texts], self._max_tokens(task, CAPTION_KEYS))
        inputs = memory_inputs(rows, spec.towers[tower], self.model.config)
        return self.runner.embed(task, tower, inputs)

    def read_row(
        self, item: PredictionItem, task: str, tower: str, budget: WorkBudget | None = None
    ) -> np.ndarray:
        """Return the model input of one item; of a Python file its only outermost function.

        Args:
            item: text or file of the modality that the tower reads.
            task: name of the task.
            tower: tower of the task, such as ``query``.
            budget: seconds and cancellation of the request that the item belongs to.

        Raises:
            UserError: the input is damaged, or a file with several functions.
        """
        with named_errors(item.label):
            ((_, row),) = self.preprocess(item, task, tower, budget, is_one=True)
        return row

    def embed_row(self, row: np.ndarray, task: str, tower: str) -> np.ndarray:
        """Return the unit vector (E,) of one model input in a retrieval task's space.

        Args:
            row: result of :meth:`read_row`.
            task: a retrieval task.
            tower: tower of the task, such as ``query``.
        """
        plan = self.model.config.tasks[task].towers[tower]
        inputs = memory_inputs([row], plan, self.model.config)
        vector: np.ndarray = self.runner.embed(task, tower, inputs)[0]
        return vector

    def _max_tokens(self, task: str, keys: Sequence[str], is_own: bool = True) -> int:
        """Return the maximum tokens of a text, of code or of a query, as in training.

        The limit of a task is about the corpus' own modality, not about a second medium.
        """
        settings = self.tasks[task]["preprocessing"]
        limits = [settings[key] for key in keys if settings.get(key)]
        if keys is CAPTION_KEYS:
            limits = limits or [text.CAPTION_TOKENS]
        elif is_own and (limit := self.tasks[task]["limit"]):
            limits.append(limit)
        # Preparation, training and the model each have a limit; the tightest one held in training.
        return min([*limits, self.model.config.max_tokens])

    # -- selection of the task and preprocessing -------------------------------------------

    def _read_item(
        self, item: PredictionItem, row: int, budget: WorkBudget | None
    ) -> list[ReadInput]:
        """Return the model inputs of an item, for each task that answers it."""
        towers = self._find_towers(item)
        is_certain = len(towers) == 1
        router = None if is_certain else self._find_router(towers, item)
        # The features of an input do not need the settings of the task that it belongs to.
        first = next(iter(towers))
        read: dict[str, list[tuple[str, np.ndarray]]] = {
            first: self.preprocess(item, first, towers[first], budget)
        }
        inputs = []
        for index, (name, array) in enumerate(read[first]):
            routed = RoutedInput((first,), 1.0)
            if router is not None:
                routed = router.route(self._find_features(first, towers[first], array))
            name, sure = printable_name(name), routed.confidence
            if routed.doubt:
                inputs.append(ReadInput(row, "", "", name, array, sure, routed.doubt))
            for task in routed.tasks:
                if task not in read:
                    read[task] = self.preprocess(item, task, towers[task], budget)
                inputs.append(ReadInput(row, task, towers[task], name, read[task][index][1], sure))
        return inputs

    def _find_towers(self, item: PredictionItem) -> dict[str, str]:
        """Return the tasks that may answer an item, with the tower that reads it."""
        answering = [each.name for each in list_objectives() if each.has_labels]
        # A text without a task is classified; the embedding of a query needs an explicit task.
        ranks = (lambda spec: spec.row_tower, lambda spec: spec.paired_tower)
        tasks, modality = self.model.config.tasks, find_item_modality(item)
        among = {name: tasks[name] for name in item.among} if item.among else tasks
        return find_towers(among, modality, item.task, answering, ranks)

    def _find_router(self, towers: Mapping[str, str], item: PredictionItem) -> InputRouter:
        """Return the router between tasks; it is computed at its first use.

        Raises:
            UserError: the model has no counts of the rows of a task.
        """
        if missing := sorted(towers.keys() - self._counts.keys()):
            raise UserError(
                f"{describe_several(towers, find_item_modality(item))}. The model has no counts "
                f"of the inputs of {', '.join(missing)} that could choose; they are written when "
                "it is exported from its run"
            )
        key = frozenset(towers)
        if key not in self._routers:
            self._routers[key] = InputRouter(
                {task: load_counts(self._counts[task]) for task in towers}
            )
        return self._routers[key]

    def _find_features(self, task: str, tower: str, array: np.ndarray) -> np.ndarray:
        plan = self.model.config.tasks[task].towers[tower]
        batch = memory_inputs([array], plan, self.model.config).load_batch(np.arange(1))
        buckets = find_buckets(self.model, plan, batch)
        assert buckets is not None  # a model without them has no counts
        found: np.ndarray = buckets[0]
        return found

    def preprocess(
        self,
        item: PredictionItem,
        task: str,
        tower: str,
        budget: WorkBudget | None = None,
        is_one: bool = False,
    ) -> list[tuple[str, np.ndarray]]:
        """Return named model inputs of an item; several for a file with functions.

        Args:
            item: input of the modality that the tower reads.
            task: name of the task.
            tower: tower of the task, such as ``query``.
            budget: seconds and cancellation of the request that the item belongs to.
            is_one: whether a Python file must have one function; its inner ones do not count.

        Raises:
            ValueError: the input is empty, damaged or of another kind; the message is the reason
                alone.
        """
        spec = find_task(task, self.model.config.tasks)
        is_caption, is_own = tower == spec.caption_tower, tower == spec.row_tower

        def limit_tokens(keys: Sequence[str]) -> int:
            return self._max_tokens(task, CAPTION_KEYS if is_caption else keys, is_own)

        context = InputContext(
            self.model.config,
            self.tasks[task]["preprocessing"],
            partial(decode_media, budget=budget),
            self.tokenize,
            limit_tokens,
            is_caption,
            is_one,
            None if budget is None else MAX_FUNCTIONS,
        )
        files: ModalityFiles = find_modality(spec.towers[tower].modality).file_half
        return files.read_inputs(item, context)

    # -- inference -------------------------------------------------------------------------

    def _run_task(
        self, task: str, tower: str, arrays: list[np.ndarray], top: int
    ) -> list[RowAnswer]:
        spec = find_task(task, self.model.config.tasks)
        inputs = memory_inputs(arrays, spec.towers[tower], self.model.config)
        head = head_class(spec)
        predictions = head.infer(self.runner, task, {tower: inputs})
        bank = self.banks.get(task) if tower != spec.caption_tower else None
        if bank is not None:
            return head.answer(predictions, bank.captions, top, bank.embeddings)
        return head.answer(predictions, self.tasks[task]["names"], top)


@dataclass(frozen=True)
class AnswerLayout:
    """Fields that a prediction has as plain values: an answer is short unless more is asked for.

    Args:
        top: alternatives that are kept; 0 leaves them out, and None keeps all.
        has_embeddings: whether a prediction with an answer has its embedding, too.
    """

    top: int | None = None
    has_embeddings: bool = False

    def format(self, prediction: TaskPrediction) -> dict[str, Any]:
        """Return a prediction as plain values for JSON.

        Args:
            prediction: answer for an input.
        """
        values = vars(prediction).copy()
        alternatives = prediction.alternatives[: self.top]
        values["alternatives"] = [{"answer": name, "score": score} for name, score in alternatives]
        if self.top == 0:
            del values["alternatives"]
        # A vector is several times as long as the rest of an answer.
        if not self.has_embeddings and (prediction.answer or not prediction.embedding):
            del values["embedding"]
        if not prediction.answer:
            # The score of an embedding is NaN, which JSON does not have.
            values["score"] = None
        return values


def find_towers(
    tasks: Mapping[str, Task],
    modality: str | None,
    given: str | None,
    objectives: Collection[str],
    ranks: Sequence[Callable[[Task], str | None]],
) -> dict[str, str]:
    """Return task -> tower of all tasks that may answer an input: the rule of every entry.

    Args:
        tasks: all tasks that the model has.
        modality: medium of the input; None if any may be meant, as for a value of Python.
        given: name of the task; None selects by what tasks read.
        objectives: names of those that give the wanted answer.
        ranks: tower of a task that may read an input without ``given``, the first choice first.

    Raises:
        UserError: the task does not read the input or has another objective; or no task reads it.
    """

    def reads(tower: str | None, spec: Task) -> bool:
        return tower is not None and modality in (None, spec.towers[tower].modality)

    wanted = " or ".join(objectives)
    if given is not None:
        spec = find_task(given, tasks)
        if spec.objective not in objectives:
            raise UserError(f"{given} is a {spec.objective} task, expected {wanted}")
        for tower in reversed(find_objective(spec.objective).towers):
            if reads(tower, spec):
                return {given: tower}
        media = sorted({plan.modality for plan in spec.towers.values()})
        raise UserError(f"{given} reads {' or '.join(media)}, this is {modality}")
    for rank in ranks:
        towers = {n: rank(spec) for n, spec in tasks.items() if spec.objective in objectives}
        found = {n: tower for n, tower in towers.items() if tower and reads(tower, tasks[n])}
        if found:
            return found
    missing = f"task of this model reads {modality}" if modality else f"{wanted} task in this model"
    raise UserError(f"no {missing}; it has {', '.join(tasks)}")


def describe_several(found: Mapping[str, str], modality: str | None) -> str:
    """Return the sentence about an input that several tasks may answer.

    Args:
        found: result of :func:`find_towers`.
        modality: medium of the input, or None.
    """
    return (
        f"several tasks of this model {f'read {modality}' if modality else 'fit'}: "
        f"{', '.join(found)}. Choose one, for example task={next(iter(found))!r}"
    )


def _cut_rows(rows: Iterable[InputRow]) -> Iterator[list[InputRow]]:
    """Yield rows in parts that fit into memory."""
    part: list[InputRow] = []
    size = 0
    for row in rows:
        part.append(row)
        size += len(row.item.data or b"") if row.item is not None else 0
        if len(part) >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part
