"""Batches of the longest rows that a configuration allows, without corpora.

Shapes: B rows, T tokens, M masked tokens of all rows.
"""

import numpy as np
import torch
from torch import Tensor

from pipelines.training.config.data import MASKS
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loading.dataloader import Batch
from pipelines.training.loading.task_columns import is_row_tower
from skillnet.modality import find_modality
from skillnet.objectives.base import find_objective
from skillnet.objectives.heads import head_class
from skillnet.skills import find_task

Tensors = dict[str, Tensor]


def longest_lengths(config: FinetuneConfig, name: str) -> dict[str, int]:
    """Return tower -> longest row of a task, in tokens of text or code, or frames of sound.

    Args:
        config: settings of the run.
        name: key of the task in ``model.tasks``.
    """
    task, settings, lengths = find_task(name, config.model.tasks), config.tasks[name], {}
    for tower, plan in task.towers.items():
        half = find_modality(plan.modality).tensor_half
        limit = half.find_longest(config.model) or config.model.max_tokens
        # The limit of a task applies to the rows of its corpus, not to captions.
        if settings.max_length and (is_row_tower(task, tower) or settings.views):
            limit = min(limit, settings.max_length)
        lengths[tower] = limit
    return lengths


def build_example_batch(config: FinetuneConfig, name: str, rows: int, global_rows: int) -> Batch:
    """Build a batch of the longest rows of a task. Its values have no meaning.

    Args:
        config: settings of the run.
        name: key of the task in ``model.tasks``.
        rows: number of rows of this worker.
        global_rows: number of rows of all workers.
    """
    task, lengths = find_task(name, config.model.tasks), longest_lengths(config, name)
    towers = {
        tower: find_modality(plan.modality).tensor_half.make_example(
            config.model, rows, lengths[tower]
        )
        for tower, plan in task.towers.items()
    }
    tower, counts = task.row_tower, None
    modality = find_modality(task.towers[tower].modality)
    tokens, hidden = modality.tensor_half.count_tokens(config.model, lengths[tower]), 0
    if find_objective(task.objective).hides_inputs:
        share = getattr(MASKS[config.training.masking], modality.name, modality.masked_fraction)
        hidden = max(round(share * tokens), 1)
        towers[tower]["places"] = torch.zeros(rows * hidden, dtype=torch.long)
        counts = np.full(rows, hidden)
    targets = head_class(task).example_targets(config.model, task, rows, tokens, hidden)
    return Batch(name, towers, targets, np.arange(rows), global_rows, masked_counts=counts)
