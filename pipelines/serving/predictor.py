"""Predictions of a trained model for raw inputs: texts and the bytes of media files.

:class:`TaskPredictor` is the main entry point; ``skillnet predict``, ``skillnet search`` and the
MLflow model use it. It preprocesses inputs with the settings of the training corpora.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from pipelines.data.modalities.base import InputContext, ModalityFiles
from pipelines.data.transforms import text
from pipelines.data.transforms.decode_guard import NO_TIME_LEFT, WorkBudget
from pipelines.data.transforms.decoder_process import decode_media
from pipelines.serving.input_items import (
    PredictionItem,
    find_item_modality,
    printable_name,
)
from pipelines.training.evaluation.inference import InferenceRunner, memory_inputs
from skillnet.modality import find_modality
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective
from skillnet.objectives.heads import RowAnswer, head_class
from skillnet.skills import find_task
from skillnet_platform.errors import UserError

#: Share of a request's time that one of its items may take.
SLOWEST_ITEM_FRACTION = 0.25
#: Functions that a request may have beyond one per row, and inputs between looks at its time.
MAX_FUNCTIONS, INPUTS_PER_LOOK = 1024, 256
TOO_MANY_FUNCTIONS = f"more than {MAX_FUNCTIONS:,} functions in a request. Split the file"
#: Keys of a corpus' preprocessing settings that limit the tokens of its captions.
CAPTION_KEYS = ("max_caption_tokens", "caption_tokens")


@dataclass(frozen=True)
class TaskPrediction:
    """Result of a task for one input.

    Args:
        input: name of the input; each function of a Python file is an input.
        task: the task that ran.
        answer: best class, transcript, or the known caption nearest to an image, video or function.
            Empty for a text in a retrieval task: its embedding is the result.
        score: probability of the class; geometric mean of the transcript's probabilities; cosine
            similarity of the caption.
        alternatives: best answers with their scores, including the first.
        embedding: unit vector of the input, for retrieval tasks.
    """

    input: str
    task: str
    answer: str
    score: float
    alternatives: list[tuple[str, float]] = field(default_factory=list)
    embedding: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class ReadInput:
    """Model input that was read from an item.

    Args:
        item: index of the item.
        task: that runs.
        tower: tower of the task, such as ``query``.
        name: identifier of the input in the result.
        array: that the tower reads.
    """

    item: int
    task: str
    tower: str
    name: str
    array: np.ndarray


@dataclass(frozen=True)
class CaptionBank:
    """Known captions of a retrieval task and their embeddings, (N, E) of unit length."""

    captions: list[str]
    embeddings: np.ndarray


class TaskPredictor:
    """Predictor for raw inputs.

    Args:
        model: the trained model.
        tokenizer: text encoder of the training corpora.
        names: task -> names of its classes or symbols (symbol 1 first).
        banks: task -> known captions.
        limits: task -> maximum length of the task's own modality, as in training.
        precision: see :class:`pipelines.training.evaluation.inference.InferenceRunner`.
        preprocessing: task -> preprocessing settings of its corpus.
    """

    def __init__(
        self,
        model: TaskModel,
        tokenizer: Any,
        names: Mapping[str, Sequence[str]],
        banks: Mapping[str, CaptionBank] | None = None,
        limits: Mapping[str, int | None] | None = None,
        precision: str = "auto",
        preprocessing: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.names, self.banks, self.limits = dict(names), dict(banks or {}), dict(limits or {})
        self.preprocessing = dict(preprocessing or {})
        self.runner = InferenceRunner(model, precision)

    def predict(
        self,
        items: Sequence[PredictionItem],
        top: int = 5,
        on_error: Callable[[int, str], None] | None = None,
    ) -> list[TaskPrediction]:
        """Predict for each item, in order; see :meth:`predict_items`."""
        return [prediction for _, prediction in self.predict_items(items, top, on_error)]

    def predict_items(
        self,
        items: Sequence[PredictionItem],
        top: int = 5,
        on_error: Callable[[int, str], None] | None = None,
    ) -> list[tuple[int, TaskPrediction]]:
        """Predict for each item, in order; a Python file gives one prediction per function.

        Args:
            items: inputs.
            top: number of alternatives.
            on_error: called with the index and the message of an unreadable item. It may raise;
                otherwise the item is skipped. None raises the error.

        Returns:
            Index of the item, and a prediction for it.

        Raises:
            UserError: an input is unreadable, or no task of the model reads its modality.
        """
        # Everything is read before the model runs, so that a damaged file fails early.
        return self.predict_inputs(self.read_items(items, on_error), top)

    def read_items(
        self,
        items: Sequence[PredictionItem],
        on_error: Callable[[int, str], None] | None = None,
        budget: WorkBudget | None = None,
    ) -> list[ReadInput]:
        """Return the model inputs of items, in order.

        Args:
            items: see :meth:`predict_items`.
            on_error: see :meth:`predict_items`.
            budget: seconds and cancellation of the request that the items belong to. No item but
                the last takes more than a quarter of what is left, so that one slow file leaves
                time for the others.

        Raises:
            UserError: see :meth:`predict_items`.
        """
        inputs: list[ReadInput] = []
        for number, item in enumerate(items):
            is_last = number == len(items) - 1
            own = budget if budget is None or is_last else budget.part(SLOWEST_ITEM_FRACTION)
            try:
                task, tower = self._select_task(item)
                arrays = self.preprocess(item, task, tower, own)
                if budget is not None and len(inputs) + len(arrays) > len(items) + MAX_FUNCTIONS:
                    raise ValueError(TOO_MANY_FUNCTIONS)
            # An unknown task of a row is a plain ValueError.
            except ValueError as error:
                if on_error is None:
                    raise
                on_error(number, str(error))
                continue
            inputs += [
                ReadInput(number, task, tower, printable_name(name), array)
                for name, array in arrays
            ]
        return inputs

    def predict_inputs(
        self, inputs: Sequence[ReadInput], top: int, budget: WorkBudget | None = None
    ) -> list[tuple[int, TaskPrediction]]:
        """Predict for model inputs, in order.

        Args:
            inputs: result of :meth:`read_items`.
            top: number of alternatives.
            budget: seconds and cancellation of the request that all inputs belong to; the model
                stops when it is over.

        Returns:
            Index of the item, and a prediction for it.

        Raises:
            UserError: the budget is over.
        """
        out: list[TaskPrediction | None] = [None] * len(inputs)
        # One pass per task and tower, so that the model runs in batches and not item by item.
        for key in dict.fromkeys((each.task, each.tower) for each in inputs):
            chosen = [i for i, each in enumerate(inputs) if (each.task, each.tower) == key]
            step = len(chosen) if budget is None else INPUTS_PER_LOOK
            for start in range(0, len(chosen), step):
                if budget is not None and not budget.rest:
                    raise UserError(NO_TIME_LEFT)
                indices = chosen[start : start + step]
                answers = self._run_task(*key, [inputs[i].array for i in indices], top)
                for index, found in zip(indices, answers, strict=True):
                    alternatives, vector = list(found.alternatives), list(found.embedding)
                    out[index] = TaskPrediction(
                        inputs[index].name, key[0], found.answer, found.score, alternatives, vector
                    )
        return [(n.item, each) for n, each in zip(inputs, out, strict=True) if each is not None]

    def tokenize(self, texts: Sequence[str], limit: int) -> list[np.ndarray]:
        """Return the token ids of each text, truncated to ``limit``.

        Args:
            texts: to tokenize.
            limit: maximum number of tokens.
        """
        # An encoder needs at least one token; id 1 is the unknown token (decision 24).
        return [np.array(row or [1], np.int32) for row in self._encode(texts, limit)]

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
        settings = self.preprocessing.get(task, {})
        limits = [settings[key] for key in keys if settings.get(key)]
        if keys is CAPTION_KEYS:
            limits = limits or [text.CAPTION_TOKENS]
        elif is_own and (limit := self.limits.get(task)):
            limits.append(limit)
        # Preparation, training and the model each have a limit; the tightest one held in training.
        return min([*limits, self.model.config.max_tokens])

    def _encode(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        return text.encode_texts(self.tokenizer, list(texts), limit).to_pylist()

    # -- selection of the task and preprocessing -------------------------------------------

    def _select_task(self, item: PredictionItem) -> tuple[str, str]:
        """Return task and tower for an item."""
        tasks = self.model.config.tasks
        modality = find_item_modality(item)
        if item.task is not None:
            spec = find_task(item.task, tasks)
            if not find_objective(spec.objective).has_labels:
                raise UserError(f"{item.name}: {item.task} has no predictions per row")
            for tower in reversed(find_objective(spec.objective).towers):
                if spec.towers[tower].modality == modality:
                    return item.task, tower
            modalities = sorted({plan.modality for plan in spec.towers.values()})
            raise UserError(
                f"{item.name}: {item.task} reads {' or '.join(modalities)}, this is {modality}"
            )
        # A text without a task is classified; the embedding of a query needs an explicit task.
        names = [name for name in tasks if find_objective(tasks[name].objective).has_labels]
        for towers in (
            {name: tasks[name].row_tower for name in names},
            {name: each for name in names if (each := tasks[name].paired_tower)},
        ):
            found = [
                n for n, tower in towers.items() if tasks[n].towers[tower].modality == modality
            ]
            # Each of them would answer, and the user wants one answer.
            if len(found) > 1:
                raise UserError(
                    f"{item.name}: several tasks of this model read {modality}: "
                    f"{', '.join(found)}. Choose one by its name as task"
                )
            if found:
                return found[0], towers[found[0]]
        raise UserError(
            f"{item.name}: no task of this model reads {modality}; it has {', '.join(tasks)}"
        )

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
            UserError: the input is empty, damaged or of another kind.
        """
        spec = find_task(task, self.model.config.tasks)
        is_caption, is_own = tower == spec.caption_tower, tower == spec.row_tower

        def limit_tokens(keys: Sequence[str]) -> int:
            return self._max_tokens(task, CAPTION_KEYS if is_caption else keys, is_own)

        context = InputContext(
            self.model.config,
            self.preprocessing.get(task, {}),
            partial(decode_media, budget=budget),
            self.tokenize,
            limit_tokens,
            is_caption,
            is_one,
            None if budget is None else MAX_FUNCTIONS,
        )
        files: ModalityFiles = find_modality(spec.towers[tower].modality).file_half
        try:
            return files.read_inputs(item, context)
        # Transforms raise ValueError for damaged media and do not know the file's name.
        except ValueError as error:
            raise UserError(f"{item.where or item.name}: {error}") from None

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
        return head.answer(predictions, self.names.get(task, ()), top)


def to_document(prediction: TaskPrediction, top: int | None = None) -> dict[str, Any]:
    """Return a prediction as plain values for JSON.

    Args:
        prediction: answer for an input.
        top: alternatives to keep; None keeps all.
    """
    values = asdict(prediction)
    values["alternatives"] = [
        {"answer": name, "score": score} for name, score in prediction.alternatives[:top]
    ]
    if not prediction.answer:
        # The score of an embedding is NaN, which JSON does not have.
        values["score"] = None
    return values
