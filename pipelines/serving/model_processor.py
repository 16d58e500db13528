"""Raw inputs of a loaded model, read as in its training: the processor of the Python API.

:class:`skillnet.raw_inputs.RawInputModel` calls :func:`open_processor`. Neither Ray nor MLflow is
imported.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.evaluation.inference import InferenceRunner, memory_inputs
from pipelines.evaluation.tables import sort_rows
from pipelines.runs.bundle_manifest import BUNDLE_MANIFEST, read_bundle_manifest
from pipelines.serving.bundle import read_predictor
from pipelines.serving.input_items import PredictionItem, guess_modality, read_file_bytes
from pipelines.serving.predictor import TaskPrediction, TaskPredictor
from skillnet.multitask_model import Batch, TaskModel
from skillnet.raw_inputs import TaskVectors
from skillnet.skills import Modality, find_task
from skillnet_platform.errors import UserError


class ModelProcessor:
    """Preprocessing of a model, with the names of its outputs and its known captions.

    Args:
        predictor: of the model.
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
            inputs: of the modality that the tower reads, see :class:`skillnet.RawInputModel`.
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

    def encode(self, modality: str, inputs: Sequence[Any], task: str | None) -> TaskVectors:
        """Return the vectors (N, E) of inputs of one modality.

        Args:
            modality: of the inputs.
            inputs: N inputs.
            task: task of the vectors; None selects one.

        Raises:
            UserError: no task reads the modality, or an input is damaged.
        """
        task, tower = self._select(modality, task)
        spec = find_task(task, self.model.config.tasks)
        rows = self._read(inputs, task, tower)
        batches = memory_inputs(rows, spec.towers[tower], self.model.config)
        runner = InferenceRunner(self.model)
        infer = runner.embed if spec.objective == "retrieval" else runner.pool
        vectors = torch.from_numpy(infer(task, tower, batches)).as_subclass(TaskVectors)
        vectors.task = task
        return vectors

    def classify(
        self, inputs: Sequence[Any], task: str | None = None, top: int = 5
    ) -> list[TaskPrediction]:
        """Return the best classes of inputs of one modality.

        Args:
            inputs: texts or media.
            task: a classification task; None takes the first that reads the modality.
            top: number of listed classes.

        Raises:
            UserError: no such task, or an input is damaged.
        """
        return self._predict(inputs, task, ("classification", "multi_label"), top)

    def transcribe(self, recordings: Sequence[Any], task: str | None = None) -> list[str]:
        """Return the transcripts of recordings.

        Args:
            recordings: (samples, rate), paths or bytes.
            task: a CTC task; None takes the first.

        Raises:
            UserError: no such task, or an input is damaged.
        """
        return [found.answer for found in self._predict(recordings, task, ("ctc",), 1)]

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload the model with its tokenizer and a model card.

        Args:
            repository: ``owner/name``.
            **options: of ``huggingface_hub.ModelHubMixin.push_to_hub``.

        Returns:
            URL of the commit.
        """
        from pipelines.serving.export import write_exported_folder
        from pipelines.serving.hub import push_folder

        assert self.model.origin is not None
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            manifest = read_bundle_manifest(self.model.origin / BUNDLE_MANIFEST)
            title = repository.rpartition("/")[2]
            write_exported_folder(self.model.origin, manifest, self.model, folder, title)
            return push_folder(folder, repository, **options)

    def _predict(
        self, inputs: Sequence[Any], task: str | None, objectives: tuple[str, ...], top: int
    ) -> list[TaskPrediction]:
        tasks = self.model.config.tasks
        if not len(inputs):
            return []
        wanted = " or ".join(objectives)
        if task is not None and find_task(task, tasks).objective not in objectives:
            raise UserError(f"{task}: a {tasks[task].objective} task, expected {wanted}")
        _require_list(inputs)
        modality = guess_input_modality(inputs[0]) if task is None else None
        names = [
            name
            for name in ([task] if task is not None else sort_rows(tasks))
            if tasks[name].objective in objectives
            and modality in (None, tasks[name].towers["input"].modality)
        ]
        if not names:
            raise UserError(
                f"no {wanted} task of this model reads {modality}; it has {', '.join(tasks)}"
            )
        plan = tasks[names[0]].towers["input"]
        items = [
            replace(make_item(value, plan.modality, f"input {number}"), task=names[0])
            for number, value in enumerate(inputs)
        ]
        # The model may have moved to another device since the last call.
        self._predictor.runner = InferenceRunner(self.model)
        return self._predictor.predict(items, top)

    def _read(self, inputs: Sequence[Any], task: str, tower: str) -> list[np.ndarray]:
        plan = find_task(task, self.model.config.tasks).towers.get(tower)
        if plan is None:
            raise UserError(f"{task} has no tower {tower!r}")
        _require_list(inputs)
        rows = []
        for number, value in enumerate(inputs):
            item = make_item(value, plan.modality, f"input {number}")
            arrays = self._predictor.preprocess(item, task, tower)
            if len(arrays) != 1:
                raise UserError(f"input {number}: {len(arrays)} functions. Give one at a time")
            rows += [array for _, array in arrays]
        return rows

    def _select(self, modality: str, task: str | None) -> tuple[str, str]:
        """Return the task and tower that encode a modality."""
        tasks = self.model.config.tasks
        # Vectors of a retrieval task are comparable, so those come first.
        names = sorted(sort_rows(tasks), key=lambda name: tasks[name].objective != "retrieval")
        for name in names if task is None else [task]:
            towers = find_task(name, tasks).towers
            for tower in ("candidate", "query", "input"):
                if tower in towers and towers[tower].modality == modality:
                    return name, tower
        subject = "no task of this model reads" if task is None else f"{task} does not read"
        raise UserError(f"{subject} {modality}; the tasks are {', '.join(tasks)}")


def make_item(value: Any, modality: Modality, name: str) -> PredictionItem:
    """Return a raw input as an item.

    Args:
        value: a text, a path, bytes of a file, or media in memory.
        modality: of the tower that reads it.
        name: of the input in messages.

    Raises:
        UserError: a file is missing or unreadable.
    """
    if modality in ("text", "code") and isinstance(value, str):
        if modality == "text":
            return PredictionItem(value, text=value, where=name, modality=modality)
        data = value.encode("utf-8", "surrogatepass")
        return PredictionItem(name, data=data, modality=modality)
    if modality in ("text", "code") and not isinstance(value, Path | bytes | bytearray):
        raise UserError(f"{name}: expected a text, not {type(value).__name__}")
    if isinstance(value, str | Path):
        data = read_file_bytes(Path(value))
        return PredictionItem(str(value), data=data, modality=modality)
    if isinstance(value, bytes | bytearray):
        return PredictionItem(name, data=bytes(value), modality=modality)
    if modality == "sound" and not (isinstance(value, tuple) and len(value) == 2):
        raise UserError(f"{name}: expected (samples, rate in Hz), a path or bytes")
    return PredictionItem(name, content=value, modality=modality)


def guess_input_modality(value: Any) -> str:
    """Return the modality of a raw input; a string is a text.

    Args:
        value: see :func:`make_item`.

    Raises:
        UserError: the modality is unknown.
    """
    if isinstance(value, str):
        return "text"
    if isinstance(value, Path):
        return guess_modality(value.name, read_file_bytes(value))
    if isinstance(value, bytes | bytearray):
        return guess_modality("input 0", bytes(value))
    if isinstance(value, tuple):
        return "sound"
    return "video" if isinstance(value, np.ndarray) and value.ndim == 4 else "image"


def open_processor(model: TaskModel) -> ModelProcessor:
    """Return the processor of a model that was read from a bundle.

    Args:
        model: read by ``from_pretrained``.

    Raises:
        UserError: its folder has no tokenizer and output names, or they were altered.
    """
    if model.origin is None:
        raise UserError(
            "this model was not read from a folder, so its tokenizer is unknown. Save it, and read "
            "a registered or exported model with from_pretrained"
        )
    if not (model.origin / BUNDLE_MANIFEST).is_file():
        raise UserError(
            f"{model.origin}: weights without tokenizer and output names ({BUNDLE_MANIFEST}). Give "
            "the folder of a registered or an exported model"
        )
    return ModelProcessor(read_predictor(model.origin, model))


def _require_list(inputs: Any) -> None:
    if isinstance(inputs, str | bytes):
        raise UserError(f"expected a list of inputs, not a single {type(inputs).__name__}")
