"""Digests of a model's raw outputs on a split: equal digests mean outputs equal to the bit."""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pipelines.data.shards.dataset import PreparedCorpus
from pipelines.training.evaluation.evaluator import uses_all_captions
from pipelines.training.evaluation.inference import batches_by_length, send_batch, split_inputs
from pipelines.training.loading.task_columns import is_row_tower, tower_column
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective
from skillnet.skills import find_task


@torch.no_grad()
def digest_outputs(
    model: TaskModel, task: str, corpus: PreparedCorpus, split: str, limit: int | None = None
) -> str:
    """Return the SHA-256 of the raw outputs of a task on every row of a split.

    The outputs are logits, log-probabilities or unit vectors in full precision, before any
    decision that hides a difference.

    Args:
        model: in evaluation mode.
        task: name of the task.
        corpus: shards of the task.
        split: name of the split.
        limit: maximum length of a row in tokens or frames.
    """
    digest = hashlib.sha256()
    for rows, outputs in _iterate_outputs(model, task, corpus, split, limit):
        digest.update(rows.tobytes())
        digest.update(outputs.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _iterate_outputs(
    model: TaskModel, task: str, corpus: PreparedCorpus, split: str, limit: int | None
) -> Iterator[tuple[np.ndarray, Tensor]]:
    spec = find_task(task, model.config.tasks)
    device = next(model.parameters()).device
    output = find_objective(spec.objective).output
    table = corpus.splits[split].table()
    for tower, plan in spec.towers.items():
        inputs = split_inputs(
            table,
            plan,
            model.config,
            f"{corpus.name}/{split}",
            column=tower_column(spec, tower),
            all_captions=uses_all_captions(corpus),
            # The limit is about the corpus' own modality.
            limit=limit if is_row_tower(spec, tower) else None,
        )
        for rows in batches_by_length(inputs.lengths, 4096):
            batch = send_batch(inputs.load_batch(rows), device)
            if output:
                yield rows, model(task, {tower: batch})[output]
            else:
                yield rows, model.embed(task, tower, batch)
