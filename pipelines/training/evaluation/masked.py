"""Masked-prediction losses of pretraining tasks on a split.

Rows are not augmented, and every evaluation masks the same tokens of each row. Metrics of different
steps and runs are therefore comparable. :func:`masked_losses` is the entry point of the evaluator.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipelines.training.config.data import MaskConfig
from pipelines.training.config.run import TaskTraining
from pipelines.training.evaluation.inference import InferenceRunner
from pipelines.training.evaluation.ranks import EvaluationRanks
from pipelines.training.loading.dataloader import Batch
from pipelines.training.loading.task_dataset import TaskDataset
from skillnet.keyed_random import BatchRandom
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective
from skillnet.objectives.heads import head_class
from skillnet.precision import find_device
from skillnet.skills import find_task

if TYPE_CHECKING:
    from pipelines.data.shards.dataset import PreparedCorpus

#: Rows of one forward pass.
BATCH_ROWS = 64


def masked_batches(
    model: TaskModel,
    task: str,
    corpus: "PreparedCorpus",
    split: str,
    masks: MaskConfig | None = None,
    limit: int | None = None,
    ranks: EvaluationRanks | None = None,
) -> Iterator[Batch]:
    """Yield the rows of a split in order, with masked tokens, on the model's device.

    Args:
        model: its configuration selects sizes and tasks.
        task: a masked task of the model.
        corpus: shards of the task.
        split: name of the split.
        masks: mask settings.
        limit: maximum row length in tokens or frames.
        ranks: that share the batches; None yields all batches.
    """
    dataset = open_masked_rows(model, task, corpus, split, masks, limit)
    device, dtype = find_device(model.parameters()), next(model.parameters()).dtype
    rows_N = np.arange(dataset.num_rows)
    starts = range(0, len(rows_N), BATCH_ROWS)
    for start in (ranks or EvaluationRanks()).select(starts):
        part = rows_N[start : start + BATCH_ROWS]
        # The key of the generator is constant, so that each evaluation masks the same tokens.
        draws = BatchRandom(("evaluation", start), len(part), slice(None))
        towers, targets, changes = dataset.load(part, draws)
        batch = Batch(task, towers, targets, part, len(part), changes=changes)
        if device.type == "cuda":
            batch = batch.pin_memory()
        yield batch.to(device, dtype)


def run_masked_batch(runner: InferenceRunner, batch: Batch) -> dict[str, Tensor]:
    """Return the outputs of the head for the masked tokens of a batch.

    Args:
        runner: inference on all ranks; the training mode of the model is restored.
        batch: from :func:`masked_batches`.
    """
    model = runner.model
    was_training = model.training
    model.eval()
    with torch.no_grad(), runner.precision.autocast():
        outputs = model(batch.task, batch.towers)
    # Training runs evaluate between two steps and must find the mode that they left.
    model.train(was_training)
    return outputs


def predict_masked_tokens(runner: InferenceRunner, batch: Batch) -> Tensor:
    """Return the model's predictions for the M masked tokens of a batch, (M, V) or (M, P).

    Args:
        runner: forward passes of the model.
        batch: from :func:`masked_batches`.
    """
    return run_masked_batch(runner, batch)["predicted"]


def masked_losses(
    runner: InferenceRunner,
    task: str,
    corpus: "PreparedCorpus",
    split: str,
    masks: MaskConfig | None = None,
    limit: int | None = None,
) -> dict[str, np.ndarray]:
    """Return per-row metrics of a masked task: loss, and accuracy for discrete tokens.

    Args:
        runner: inference with the model on all ranks.
        task: a masked task of the model.
        corpus: shards of the task.
        split: name of the split.
        masks: mask settings.
        limit: maximum row length in tokens or frames.

    Returns:
        The primary metric (N,), and ``masked_accuracy`` (N,) if the targets are token ids.
    """
    spec, rows = find_task(task, runner.model.config.tasks), corpus.splits[split].rows
    head = head_class(spec)
    # Loss, accuracy, and whether the task has an accuracy, which a rank without rows cannot know.
    values_N3 = np.zeros((rows, 3))
    for batch in masked_batches(
        runner.model, task, corpus, split, masks, limit, ranks=runner.ranks
    ):
        losses_B, hits_B = head.score_hidden(run_masked_batch(runner, batch), batch.targets)
        values_N3[batch.rows, 0] = losses_B.double().cpu().numpy()
        if hits_B is not None:
            values_N3[batch.rows, 1] = hits_B.cpu().numpy()
            values_N3[batch.rows, 2] = 1.0
    values_N3 = runner.ranks.merge(values_N3)
    metrics = {find_objective(spec.objective).primary.name: values_N3[:, 0]}
    if values_N3[:, 2].any():
        metrics["masked_accuracy"] = values_N3[:, 1]
    return metrics


def mean_masked_length(
    model: TaskModel, task: str, corpus: "PreparedCorpus", split: str, limit: int | None = None
) -> dict[str, int]:
    """Return the mean row length of a masked task's tower, for cost accounting.

    Args:
        model: its configuration selects sizes and tasks.
        task: a masked task of the model.
        corpus: shards of the task.
        split: name of the split.
        limit: maximum row length in tokens or frames.

    Returns:
        Tower -> length, or {} if all rows have one size.
    """
    # Masks hide tokens but do not remove them, so they do not matter for lengths.
    dataset = open_masked_rows(model, task, corpus, split, None, limit)
    lengths = dataset.row_lengths(np.arange(dataset.num_rows))
    tower = find_task(task, model.config.tasks).row_tower
    return {} if lengths is None else {tower: max(round(float(lengths.mean())), 1)}


def open_masked_rows(
    model: TaskModel,
    task: str,
    corpus: "PreparedCorpus",
    split: str,
    masks: MaskConfig | None,
    limit: int | None,
) -> TaskDataset:
    """Return the rows of a split as a masked task of the model reads them.

    Args:
        model: its configuration selects sizes and tasks.
        task: a masked task of the model.
        corpus: shards of the task.
        split: name of the split.
        masks: mask settings.
        limit: maximum row length in tokens or frames.
    """
    settings = TaskTraining(corpus.name, split=split, max_length=limit)
    return TaskDataset(
        task, find_task(task, model.config.tasks), corpus, model.config, settings, masks
    )
