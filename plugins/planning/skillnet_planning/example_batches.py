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
from skillnet.config import SkillNetConfig
from skillnet.objectives.base import find_objective
from skillnet.objectives.heads import head_class
from skillnet.skills import SkillPlan, find_task

Tensors = dict[str, Tensor]


def longest_lengths(config: FinetuneConfig, name: str) -> dict[str, int]:
    """Return tower -> longest row of a task, in tokens of text or code, or frames of sound.

    Args:
        config: settings of the run.
        name: key of the task in ``model.tasks``.
    """
    task, settings, lengths = find_task(name, config.model.tasks), config.tasks[name], {}
    for tower, plan in task.towers.items():
        limit = _model_limit(config.model, plan)
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
        tower: _tower_inputs(config.model, plan, rows, lengths[tower])
        for tower, plan in task.towers.items()
    }
    tower, counts = task.row_tower, None
    plan = task.towers[tower]
    tokens = count_tokens(config.model, plan, lengths[tower])
    share: float = getattr(MASKS[config.training.masking], plan.modality)
    hidden = max(round(share * tokens), 1)
    targets = head_class(task).example_targets(config.model, task, rows, tokens, hidden)
    if find_objective(task.objective).hides_inputs:
        towers[tower]["places"] = torch.zeros(rows * hidden, dtype=torch.long)
        counts = np.full(rows, hidden)
    return Batch(name, towers, targets, np.arange(rows), global_rows, masked_counts=counts)


def count_tokens(model: SkillNetConfig, plan: SkillPlan, length: int) -> int:
    """Return the tokens T of a row.

    Args:
        model: sizes of the inputs.
        plan: names the modality.
        length: tokens of text or code, or frames of sound.
    """
    if plan.modality in ("text", "code"):
        return length
    if plan.modality == "sound":
        return -(-length // model.mel_stack)
    if plan.modality == "image":
        return model.image_tokens
    f, h, w = model.tubelet
    return (model.video_frames // f) * (model.video_size // h) * (model.video_size // w)


def _model_limit(model: SkillNetConfig, plan: SkillPlan) -> int:
    return model.max_frames if plan.modality == "sound" else model.max_tokens


def _tower_inputs(model: SkillNetConfig, plan: SkillPlan, rows: int, length: int) -> Tensors:
    if plan.modality in ("text", "code"):
        return {"tokens": torch.ones(rows, length, dtype=torch.long)}
    if plan.modality == "sound":
        return {
            "log_mel": torch.zeros(rows, length, model.n_mels),
            "frames": torch.ones(rows, dtype=torch.long),
        }
    if plan.modality == "image":
        return {"pixels": torch.zeros(rows, model.image_size, model.image_size, 3)}
    size = (rows, model.video_frames, model.video_size, model.video_size, 3)
    return {"frames": torch.zeros(size)}
