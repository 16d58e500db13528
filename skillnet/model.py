"""SkillNet: stems, encoder and heads, and which file each of its parameters belongs to.

Shapes: B batch, T tokens, D model width, E width of the retrieval space.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.encoder import Encoder
from skillnet.multitask_model import Batch, TaskModel, Tokens, mean
from skillnet.skills import SkillPlan, Task, find_task
from skillnet.stems import STEMS, TokenStem


class SkillNet(TaskModel):
    """One sparsely activated encoder for all tasks of its configuration.

    Only the stems that some task reads through are built, so a model of one task is as small
    as what that task activates.
    """

    system = "skillnet"

    def __init__(self, config: SkillNetConfig, options: Any = None) -> None:
        super().__init__(config, options)
        needed = {plan.stem for task in config.tasks.values() for plan in task.towers.values()}
        self.stems = nn.ModuleDict({n: make(config) for n, make in STEMS.items() if n in needed})
        self.encoder = Encoder(config)
        self.add_heads()

    # -- running ---------------------------------------------------------------------------

    def tokens(self, batch: Batch, plan: SkillPlan) -> Tokens:
        """Encoded tokens (B, T, D) and their mask (B, T), None where every token is real."""
        if plan.stem not in self.stems:
            raise ValueError(
                f"this model has no {plan.stem!r} stem for {plan.modality}; it was built or "
                f"loaded for the tasks {', '.join(self.config.tasks)}"
            )
        x_BTD, mask_BT = self.stems[plan.stem](batch, plan.modality)
        x_BTD = F.dropout(x_BTD, self.config.dropout, self.training)
        return self.encoder(x_BTD, plan.skills, mask_BT), mask_BT

    def tower_tokens(self, task: str, tower: str, batch: Batch) -> Tokens:
        """Encoded tokens of a task's tower, with that tower's plan; see :meth:`tokens`."""
        return self.tokens(batch, find_task(task, self.config.tasks).towers[tower])

    def token_embedding(self, task: str, tower: str) -> Tensor:
        """Embedding (V, D) of the token stem that the tower reads through."""
        stem = self.stems[find_task(task, self.config.tasks).towers[tower].stem]
        assert isinstance(stem, TokenStem)
        return stem.embedding.weight

    def encode(self, batch: Batch, plan: SkillPlan) -> Tensor:
        """Mean of the encoded real tokens, (B, D).

        Args:
            batch: ``tokens`` (B, T) for text and code; ``log_mel`` (B, N, M) and ``frames``
                (B,) for sound; ``pixels`` (B, H, W, 3) for pictures; ``frames``
                (B, N, H, W, C) for clips.
            plan: the skills to activate and the modality to read.

        Raises:
            ValueError: a skill or a stem that this model lacks, or inputs of the wrong size.
        """
        return mean(*self.tokens(batch, plan))

    # -- ownership -------------------------------------------------------------------------

    def owner(self, name: str) -> str:
        """File of a parameter: ``shared``, ``skill-NAME``, ``stem-NAME`` or ``head-TASK``."""
        parts = name.split(".")
        if parts[0] == "stems":
            return f"stem-{parts[1]}"
        if parts[0] == "heads":
            return f"head-{parts[1]}"
        if parts[-2] == "weights" and parts[-1] in self.config.skills:
            return f"skill-{parts[-1]}"
        return "shared"

    def needs(self, task: str) -> set[str]:
        """Files of what a task activates."""
        spec = find_task(task, self.config.tasks)
        return {
            "shared",
            f"head-{task}",
            *(f"skill-{name}" for name in spec.skills),
            *(f"stem-{name}" for name in spec.stems),
        }

    def touches(self, name: str, task: str) -> bool:
        """True for what the task's plans, stems and head read."""
        spec = find_task(task, self.config.tasks)
        return self.owner(name) in self.needs(task) and not _other_modality(name, spec)

    def flops(self, task: str, lengths: Mapping[str, int] | None = None) -> tuple[int, int]:
        """By closed formulas; tests hold them equal to what torch counts."""
        from skillnet.flops import task_flops

        return task_flops(self, task, lengths)

    # -- files -----------------------------------------------------------------------------

    @classmethod
    def config_for(cls, config: SkillNetConfig, task: str) -> SkillNetConfig:
        """One task and only the skills that it activates."""
        spec = find_task(task, config.tasks)
        kept = tuple(name for name in config.skills if name in spec.skills)
        return dataclasses.replace(config, skills=kept, tasks={task: spec})


def _other_modality(name: str, task: Task) -> bool:
    """True for the modality vectors of the token stem that the task does not read."""
    parts = name.split(".")
    return (
        parts[:1] == ["stems"]
        and parts[2] == "modality"
        and parts[3] not in {plan.modality for plan in task.towers.values()}
    )
