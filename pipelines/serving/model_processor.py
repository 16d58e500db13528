"""Raw inputs of a loaded model, read as in its training: the processor of the Python API.

:class:`skillnet.raw_inputs.RawInputModel` calls :func:`open_processor`. Neither Ray nor MLflow is
imported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.serving.bundle import read_predictor
from pipelines.serving.inputs import InputFields, find_suffix_modality, make_item
from pipelines.serving.predictor import (
    DEFAULT_TOP,
    TaskPrediction,
    TaskPredictor,
    describe_several,
    find_towers,
)
from pipelines.training.evaluation.inference import InferenceRunner, memory_inputs
from pipelines.training.runs.bundle_manifest import is_bundle, read_bundle_manifest
from skillnet.modality import CAPTION_MODALITY
from skillnet.multitask_model import Batch, TaskModel
from skillnet.objectives.base import find_objective, list_objectives
from skillnet.raw_inputs import TaskVectors
from skillnet.skills import Task, find_task
from skillnet_files.entry_points import find_entries
from skillnet_platform import console
from skillnet_platform.errors import UserError

#: How to make a folder with everything that a processor reads.
EXPORT_REMEDY = (
    "Run `skillnet export --model {0} --to hf --output {1}`, with --corpora.TASK NAME for tasks "
    'of your own, and read it with from_pretrained("{1}")'
)


class ModelProcessor:
    """Preprocessing of a model, with the names of its outputs and its known captions.

    Args:
        predictor: reader and runner of the model.
    """

    def __init__(self, predictor: TaskPredictor) -> None:
        self.model, self._predictor = predictor.model, predictor

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of text and code: of the library ``tokenizers``, if its patterns are known."""
        return self._predictor.tokenizer

    def __call__(self, inputs: Sequence[Any], task: str, tower: str = "input") -> Batch:
        """Return the batch of a tower for raw inputs, as ``model(task, {tower: batch})`` takes it.

        Args:
            inputs: raw values of the modality that the tower reads, see
                :class:`skillnet.RawInputModel`.
            task: name of the task.
            tower: ``input``, ``query`` or ``candidate``.

        Raises:
            UserError: an input is empty, damaged or of another kind.
        """
        rows = self._read(inputs, task, tower)
        plan = find_task(task, self.model.config.tasks).towers[tower]
        batch = memory_inputs(rows, plan, self.model.config).load_batch(np.arange(len(rows)))
        device = next(self.model.parameters()).device
        return {name: values.to(device) for name, values in batch.items()}

    def encode(
        self, modality: str, inputs: Sequence[Any], task: str | None, tower: str | None = None
    ) -> TaskVectors:
        """Return the vectors (N, E) of inputs of one modality.

        Args:
            modality: medium of the inputs.
            inputs: N inputs.
            task: task of the vectors; None takes the only one that reads the modality.
            tower: tower of the task that encodes; None takes one that reads the modality.

        Raises:
            UserError: none or several tasks read the modality, or an input is damaged.
        """
        _require_list(inputs)
        task, found = self._select(modality, task)
        tower = tower or found
        spec = find_task(task, self.model.config.tasks)
        rows = self._read(inputs, task, tower)
        batches = memory_inputs(rows, spec.towers[tower], self.model.config)
        runner = InferenceRunner(self.model)
        is_pair = find_objective(spec.objective).pairs_towers
        infer = runner.embed if is_pair else runner.pool
        vectors = torch.from_numpy(infer(task, tower, batches)).as_subclass(TaskVectors)
        vectors.task = task
        return vectors

    def classify(
        self, inputs: Sequence[Any], task: str | None = None, top: int = DEFAULT_TOP
    ) -> list[TaskPrediction]:
        """Return the best classes of inputs of one modality.

        Args:
            inputs: texts or media.
            task: a classification task; None takes the one that the inputs belong to.
            top: number of listed classes.

        Returns:
            Predictions in the order of the inputs. Without ``task``, an input has one of each
            classification task of its domain, or one without a task if the router is unsure.

        Raises:
            UserError: no such task, several of different media, several in a model without counts
                of their inputs, an input is damaged, or a text may be the name of a file.
        """
        return self._predict(inputs, task, "labels", top)

    def predict(
        self,
        rows: Any,
        task: str | None = None,
        top: int | None = None,
        embeddings: bool = False,
        text_column: str | None = None,
        file_column: str | None = None,
    ) -> Any:
        """Return a table with the columns of its rows and of their predictions.

        Args:
            rows: a data frame, an Arrow table or a list of mappings.
            task: for rows that do not name one.
            top: number of alternatives; None leaves them out.
            embeddings: whether answers have the vector of their row, too.
            text_column: column of the text; None takes a common name.
            file_column: column of the file or the media; None takes a common name.

        Raises:
            UserError: the rows are no table, or none of them is usable.
        """
        # Tables of files need pyarrow, which single inputs do not.
        from pipelines.serving.memory_tables import predict_memory_table

        # The model may have moved to another device since the last call.
        self._predictor.runner = InferenceRunner(self.model)
        fields = InputFields(text_column, file_column)
        return predict_memory_table(self._predictor, rows, task, top, embeddings, fields)

    def transcribe(self, recordings: Sequence[Any], task: str | None = None) -> list[str]:
        """Return the transcripts of recordings.

        Args:
            recordings: (samples, rate), paths or bytes.
            task: a CTC task; None takes the only one.

        Raises:
            UserError: none or several such tasks, or an input is damaged.
        """
        return [found.answer for found in self._predict(recordings, task, "symbols", 1)]

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload the model with its tokenizer and a model card.

        Args:
            repository: ``owner/name``.
            **options: further arguments of ``huggingface_hub.ModelHubMixin.push_to_hub``.

        Returns:
            URL of the commit.
        """
        # Exports are a plug-in, which this package does not import.
        found = find_entries("skillnet.exporters").get("hub")
        if found is None:
            raise UserError("no installed package uploads models. Install skillnet_serving")
        return str(found.load()(self.model, repository, **options))

    def _predict(
        self, inputs: Sequence[Any], task: str | None, listed: str, top: int
    ) -> list[TaskPrediction]:
        objectives = [each.name for each in list_objectives() if each.listed == listed]
        _require_list(inputs)
        tasks = self.model.config.tasks
        # Any string may be a path, so the modality is that of the task.
        ranks = [lambda spec: spec.row_tower]
        found = find_towers(tasks, None, task, objectives, ranks)
        media = {tasks[name].towers[tower].modality for name, tower in found.items()}
        # A transcript has no place for the doubt of the router.
        if listed != "labels" or len(media) > 1:
            _require_one(found, None)
        name, modality = next(iter(found)), media.pop()
        # One task needs no router.
        chosen = {"task": name} if len(found) == 1 else {"among": tuple(found)}
        for number, value in enumerate(inputs):
            if task is None and modality == CAPTION_MODALITY:
                _reject_file_name(value, f"input {number}", name)
        items = [
            replace(make_item(value, modality, f"input {number}", name), **chosen)
            for number, value in enumerate(inputs)
        ]
        if not items:
            return []
        # The model may have moved to another device since the last call.
        self._predictor.runner = InferenceRunner(self.model)
        return self._predictor.predict(items, top)

    def _read(self, inputs: Sequence[Any], task: str, tower: str) -> list[np.ndarray]:
        _require_list(inputs)
        plan = find_task(task, self.model.config.tasks).towers.get(tower)
        if plan is None:
            raise UserError(f"{task} has no tower {tower!r}")
        rows = []
        for number, value in enumerate(inputs):
            item = make_item(value, plan.modality, f"input {number}", task)
            rows.append(self._predictor.read_row(item, task, tower))
        return rows

    def _select(self, modality: str, task: str | None) -> tuple[str, str]:
        """Return the task and tower that encode a modality."""

        def reading(spec: Task) -> str | None:
            towers = reversed(find_objective(spec.objective).towers)
            return next((t for t in towers if spec.towers[t].modality == modality), None)

        def paired(spec: Task) -> str | None:
            return reading(spec) if find_objective(spec.objective).pairs_towers else None

        objectives = [each.name for each in list_objectives()]
        # Only vectors of a retrieval task are trained to be compared.
        tasks, ranks = self.model.config.tasks, (paired, reading)
        found = find_towers(tasks, modality, task, objectives, ranks)
        _require_one(found, modality)
        return next(iter(found.items()))


def open_processor(model: TaskModel) -> ModelProcessor:
    """Return the processor of a model that was read from a bundle.

    Args:
        model: read by ``from_pretrained``.

    Raises:
        UserError: its folder has no tokenizer and output names, or they were altered.
    """
    if model.origin is None:
        raise UserError(
            "this model was built in Python, so its tokenizer and output names are unknown. They "
            'are those of its corpora. Save it: model.save_pretrained("my-weights"). '
            + EXPORT_REMEDY.format("my-weights", "my-model")
        )
    if not is_bundle(model.origin):
        raise UserError(
            f"{model.origin}: weights without tokenizer and output names. "
            + EXPORT_REMEDY.format(model.origin, f"{model.origin}-exported")
        )
    return ModelProcessor(read_predictor(model.origin, model))


def save_described(model: TaskModel, folder: Path) -> bool:
    """Write a model with tokenizer, names of outputs and card; return whether it has them.

    Args:
        model: read from a folder; its weights may have changed.
        folder: directory to write; an older model there is replaced.

    Raises:
        UserError: no installed package writes cards.
    """
    if model.origin is None or not is_bundle(model.origin):
        return False
    described = read_bundle_manifest(model.origin)["tasks"]
    if added := sorted(model.config.tasks.keys() - described.keys()):
        console.print_warning(
            f"{folder}: written without tokenizer and names of outputs, because {added[0]} was "
            "added in memory. Add it to the folder of the model with `skillnet add`"
        )
        return False
    # Exports are a plug-in, which this package does not import.
    found = find_entries("skillnet.exporters").get("folder")
    if found is None:
        raise UserError("no installed package writes models with cards. Install skillnet_serving")
    found.load()(model, folder)
    return True


def _reject_file_name(value: Any, name: str, task: str) -> None:
    """Raise UserError for a text that may be meant as a file; the file need not exist."""
    if isinstance(value, str) and find_suffix_modality(value.strip()) is not None:
        raise UserError(
            f"{name}: {value!r} names a file, and {task} reads texts. Give task={task!r} to take "
            f"it as a text, or Path({value!r}) for the text in the file"
        )


def _require_one(found: Mapping[str, str], modality: str | None) -> None:
    # Each of the tasks would answer, and the user wants one answer.
    if len(found) > 1:
        raise UserError(describe_several(found, modality))


def _require_list(inputs: Any) -> None:
    if isinstance(inputs, str | bytes):
        raise UserError(f"expected a list of inputs, not a single {type(inputs).__name__}")
