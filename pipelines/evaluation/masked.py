"""Masked-prediction losses of pretraining tasks on a split.

Rows are not augmented, and every evaluation masks the same tokens of each row. Metrics of different
steps and runs are therefore comparable. :func:`masked_losses` is the entry point of the evaluator;
:mod:`pipelines.evaluation.reconstructions` draws the predictions.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipelines.config.data import MaskConfig
from pipelines.config.run import TaskTraining
from pipelines.evaluation.inference import InferenceRunner
from pipelines.loading.augment import BatchRandom
from pipelines.loading.dataloader import Batch
from pipelines.loading.task_dataset import TaskDataset
from skillnet.losses import masked_loss_per_row
from skillnet.multitask_model import TaskModel
from skillnet.skills import find_task

if TYPE_CHECKING:
    from pipelines.shards.dataset import PreparedCorpus

#: Rows of one forward pass.
BATCH_ROWS = 64


def masked_batches(
    model: TaskModel,
    task: str,
    corpus: "PreparedCorpus",
    split: str,
    masks: MaskConfig | None = None,
    limit: int | None = None,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Yield the rows of a split in order, with masked tokens, on the model's device.

    Args:
        model: its configuration selects sizes and tasks.
        task: a masked task of the model.
        corpus: of the task.
        split: name of the split.
        masks: mask settings.
        limit: maximum row length in tokens or frames.
        rows: row numbers; None selects all rows.
    """
    dataset = open_masked_rows(model, task, corpus, split, masks, limit)
    parameter = next(model.parameters())
    selected = np.arange(dataset.num_rows) if rows is None else rows
    for start in range(0, len(selected), BATCH_ROWS):
        part = selected[start : start + BATCH_ROWS]
        # The key of the generator is constant, so that each evaluation masks the same tokens.
        draws = BatchRandom(("evaluation", start), len(part), slice(None))
        towers, targets = dataset.load(part, draws)
        yield Batch(task, towers, targets, part, len(part)).to(parameter.device, parameter.dtype)


def predict_masked_tokens(runner: InferenceRunner, batch: Batch) -> Tensor:
    """Return the model's predictions for the M masked tokens of a batch, (M, V) or (M, P).

    Args:
        runner: of the model; the training mode of the model is restored.
        batch: from :func:`masked_batches`.
    """
    model = runner.model
    was_training = model.training
    model.eval()
    with torch.no_grad(), runner.precision.autocast():
        predicted = model(batch.task, batch.towers)["predicted"]
    # Training runs evaluate between two steps and must find the mode that they left.
    model.train(was_training)
    return predicted


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
        runner: of the model.
        task: a masked task of the model.
        corpus: of the task.
        split: name of the split.
        masks: mask settings.
        limit: maximum row length in tokens or frames.

    Returns:
        ``masked_loss`` (N,), and ``masked_accuracy`` (N,) if the targets are token ids.
    """
    losses: list[Tensor] = []
    accuracies: list[Tensor] = []
    for batch in masked_batches(runner.model, task, corpus, split, masks, limit):
        predicted = predict_masked_tokens(runner, batch)
        values, masked = batch.targets["values"], batch.targets["masked"]
        # The loss is kept per row, because the bootstrap resamples rows.
        losses.append(masked_loss_per_row(predicted, values, masked))
        # Only discrete targets (token ids, sound units) have an accuracy; others are regressed.
        if not values.is_floating_point():
            hits_M = (predicted.argmax(1) == values).double()
            hits_B = torch.zeros(len(masked), dtype=hits_M.dtype, device=masked.device)
            hits_B.index_add_(0, masked.nonzero()[:, 0], hits_M)
            accuracies.append(hits_B / masked.sum(1))
    metrics = {"masked_loss": torch.cat(losses).double().cpu().numpy()}
    if accuracies:
        metrics["masked_accuracy"] = torch.cat(accuracies).cpu().numpy()
    return metrics


def mean_masked_length(
    model: TaskModel, task: str, corpus: "PreparedCorpus", split: str, limit: int | None = None
) -> dict[str, int]:
    """Return the mean row length of a masked task's tower, for cost accounting.

    Args:
        model: its configuration selects sizes and tasks.
        task: a masked task of the model.
        corpus: of the task.
        split: name of the split.
        limit: maximum row length in tokens or frames.

    Returns:
        ``{"input": length}``, or {} if all rows have one size.
    """
    # Masks hide tokens but do not remove them, so they do not matter for lengths.
    lengths = open_masked_rows(model, task, corpus, split, None, limit).row_lengths()
    return {} if lengths is None else {"input": max(round(float(lengths.mean())), 1)}


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
        corpus: of the task.
        split: name of the split.
        masks: mask settings.
        limit: maximum row length in tokens or frames.
    """
    settings = TaskTraining(corpus.name, split=split, max_length=limit)
    return TaskDataset(
        task, find_task(task, model.config.tasks), corpus, model.config, settings, masks
    )
