"""How well a model restores what is hidden of the rows of a split: the figures of masked tasks.

Rows are taken as they are, without augmentation, and the same of each row is hidden at every
evaluation, so that figures of different steps and runs compare.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipelines.config.data import MaskConfig
from pipelines.config.run import TaskTraining
from pipelines.evaluation.inference import InferenceRunner
from pipelines.loading.augment import Draws
from pipelines.loading.dataloader import Batch
from pipelines.loading.task_dataset import TaskRows
from skillnet.losses import masked_loss_per_row
from skillnet.multitask_model import TaskModel
from skillnet.skills import find_task

if TYPE_CHECKING:
    from pipelines.shards.dataset import PreparedCorpus

BATCH = 64


def masked_batches(
    model: TaskModel,
    task: str,
    corpus: "PreparedCorpus",
    split: str,
    masks: MaskConfig | None = None,
    limit: int | None = None,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Rows of a split in order, a part of each hidden, on the model's device.

    Args:
        model: its sizes, its tasks.
        task: a masked task of the model.
        corpus: where the rows are.
        split: of the corpus.
        masks: what is hidden.
        limit: longest row, in tokens or frames.
        rows: their numbers; none takes all.
    """
    source = pretrained_modality(model, task, corpus, split, masks, limit)
    like = next(model.parameters())
    wanted = np.arange(source.count) if rows is None else rows
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        draws = Draws(("evaluation", start), len(part), slice(None))
        towers, targets = source.load(part, draws)
        yield Batch(task, towers, targets, part, len(part)).to(like.device, like.dtype)


def restored_inputs(runner: InferenceRunner, batch: Batch) -> Tensor:
    """What the model puts at the hidden tokens of a batch, (M, V) or (M, P)."""
    model = runner.model
    training = model.training
    model.eval()
    with torch.no_grad(), runner.precision.autocast():
        predicted = model(batch.task, batch.towers)["predicted"]
    model.train(training)
    return predicted


def masked_losses(
    runner: InferenceRunner,
    task: str,
    corpus: "PreparedCorpus",
    split: str,
    masks: MaskConfig | None = None,
    limit: int | None = None,
) -> dict[str, np.ndarray]:
    """``masked_loss`` (N,) of every row, and ``masked_accuracy`` (N,) where tokens are restored."""
    losses: list[Tensor] = []
    right: list[Tensor] = []
    for batch in masked_batches(runner.model, task, corpus, split, masks, limit):
        predicted = restored_inputs(runner, batch)
        values, masked = batch.targets["values"], batch.targets["masked"]
        losses.append(masked_loss_per_row(predicted, values, masked))
        if not values.is_floating_point():
            hits_M = (predicted.argmax(1) == values).double()
            hits_B = torch.zeros(len(masked), dtype=hits_M.dtype, device=masked.device)
            hits_B.index_add_(0, masked.nonzero()[:, 0], hits_M)
            right.append(hits_B / masked.sum(1))
    found = {"masked_loss": torch.cat(losses).double().cpu().numpy()}
    if right:
        found["masked_accuracy"] = torch.cat(right).cpu().numpy()
    return found


def mean_masked_length(
    model: TaskModel, task: str, corpus: "PreparedCorpus", split: str, limit: int | None = None
) -> dict[str, int]:
    """Mean length of the rows of sequences, as costs are counted with; {} for the others."""
    lengths = pretrained_modality(model, task, corpus, split, None, limit).lengths()
    return {} if lengths is None else {"input": max(round(float(lengths.mean())), 1)}


def pretrained_modality(
    model: TaskModel,
    task: str,
    corpus: "PreparedCorpus",
    split: str,
    masks: MaskConfig | None,
    limit: int | None,
) -> TaskRows:
    """The rows of a split as a masked task of the model reads them."""
    settings = TaskTraining(corpus.name, split=split, max_length=limit)
    return TaskRows(
        task, find_task(task, model.config.tasks), corpus, model.config, settings, masks
    )
