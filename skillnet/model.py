"""SkillNet: stems, encoder and heads, and the file of each parameter.

Shapes: B batch, T tokens, D model width, E width of the retrieval space.
"""

import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.encoder import Encoder
from skillnet.flops import task_flops
from skillnet.modalities.tokens import TokenStem
from skillnet.modality import find_stem, stem_names
from skillnet.multitask_model import Batch, TaskModel, Tokens
from skillnet.objectives.heads import mean_pool
from skillnet.skill_weights import find_weight_skill, is_read_by_plan
from skillnet.skills import SkillPlan, Task, find_task

#: Functions that add and remove packages. Names, so that this module imports no higher one.
JOIN, DROP = "skillnet.package_joins:join_package", "skillnet.package_joins:drop_package"


class SkillNet(TaskModel):
    """Sparsely activated encoder for all tasks of its configuration.

    Only stems that a task reads are built. A model of one task is therefore as small as the part
    that the task activates.
    """

    system = "skillnet"

    def __init__(self, config: SkillNetConfig, options: Any = None) -> None:
        super().__init__(config, options)
        # Unused stems would be saved and counted although no task reads them.
        needed = {plan.stem for task in config.tasks.values() for plan in task.towers.values()}
        self.stems = nn.ModuleDict({n: find_stem(n)(config) for n in stem_names() if n in needed})
        self.encoder = Encoder(config)
        self.add_heads()

    # -- running ---------------------------------------------------------------------------

    def tokens(self, batch: Batch, plan: SkillPlan) -> Tokens:
        """Encode a batch with a plan.

        Args:
            batch: input tensors; see :meth:`encode`.
            plan: active skills and modality.

        Returns:
            Tokens (B, T, D) and their mask (B, T), None if every token is real.

        Raises:
            ValueError: the model lacks the stem or a skill of the plan.
        """
        if plan.stem not in self.stems:
            raise ValueError(
                f"this model has no {plan.stem!r} stem for {plan.modality}; it was built or "
                f"loaded for the tasks {', '.join(self.config.tasks)}"
            )
        x_BTD, mask_BT = self.stems[plan.stem](batch, plan.modality)
        return self.encoder(x_BTD, plan.skills, mask_BT), mask_BT

    def tower_tokens(self, task: str, tower: str, batch: Batch) -> Tokens:
        """Encode the input of a task's tower with the plan of the tower; see :meth:`tokens`."""
        return self.tokens(batch, find_task(task, self.config.tasks).towers[tower])

    def token_embedding(self, task: str, tower: str) -> Tensor:
        """Return the embedding (V, D) of the token stem that the tower reads."""
        stem = self.stems[find_task(task, self.config.tasks).towers[tower].stem]
        assert isinstance(stem, TokenStem)
        return stem.embedding.weight

    def encode(self, batch: Batch, plan: SkillPlan) -> Tensor:
        """Encode a batch and average its real tokens, (B, D).

        Args:
            batch: ``tokens`` (B, T) for text and code; ``log_mel`` (B, N, M) and ``frames`` (B,)
                for sound; ``pixels`` (B, H, W, 3) for images; ``frames`` (B, N, H, W, C) for video.
            plan: active skills and modality.

        Raises:
            ValueError: the model lacks a skill or stem of the plan, or an input has the wrong size.
        """
        return mean_pool(*self.tokens(batch, plan))

    # -- packages --------------------------------------------------------------------------

    def add(self, package: str | Path) -> list[Any]:
        """Add a package of skills, and compare the outputs of every task.

        Args:
            package: file that ``skillnet pack`` wrote.

        Returns:
            A ``skillnet.skill_proofs.TaskProof`` of each task.

        Raises:
            ValueError: the package does not fit the model, which is then as before.
        """
        proofs: list[Any] = pkgutil.resolve_name(JOIN)(self, Path(package))
        return proofs

    def remove(self, name: str) -> list[Any]:
        """Remove a package that was added; every other output keeps its bits.

        Args:
            name: key of the package in :attr:`packages`.

        Raises:
            ValueError: the model has no such package.
        """
        proofs: list[Any] = pkgutil.resolve_name(DROP)(self, name)
        return proofs

    def skills(self) -> dict[str, str | None]:
        """Return skill -> the package that brought it, None for a skill of the base."""
        origin = {skill: name for name, each in self.packages.items() for skill in each["skills"]}
        return {skill: origin.get(skill) for skill in self.config.skills}

    # -- ownership -------------------------------------------------------------------------

    def file_of(self, name: str) -> str:
        """Return ``shared``, ``skill-NAME``, ``stem-NAME`` or ``head-TASK`` of a parameter."""
        parts = name.split(".")
        if parts[0] == "stems":
            return f"stem-{parts[1]}"
        if parts[0] == "heads":
            return f"head-{parts[1]}"
        skill = find_weight_skill(name)
        if skill in self.config.skills:
            return f"skill-{skill}"
        return "shared"

    @classmethod
    def possible_files(cls, config: SkillNetConfig) -> set[str]:
        """Return ``shared``, and the files of all skills, stems and tasks."""
        return {
            "shared",
            *(f"skill-{name}" for name in config.skills),
            *(f"stem-{name}" for name in stem_names()),
            *(f"head-{task}" for task in config.tasks),
        }

    def required_files(self, task: str) -> set[str]:
        """Return the files of all skills, stems and heads that a task activates."""
        return self.needed_files(self.config, [task])

    @classmethod
    def needed_files(cls, config: SkillNetConfig, tasks: Iterable[str]) -> set[str]:
        """Return the files of all skills, stems and heads that some tasks activate."""
        files = {"shared"}
        for task in tasks:
            spec = find_task(task, config.tasks)
            files |= {f"head-{task}"}
            files |= {f"skill-{name}" for name in config.find_sources(spec.skills)}
            files |= {f"stem-{name}" for name in spec.stems}
        return files

    def uses_parameter(self, name: str, task: str) -> bool:
        """Return whether the plans, stems or head of a task read a parameter."""
        spec = find_task(task, self.config.tasks)
        if self.file_of(name) not in self.required_files(task) or _other_modality(name, spec):
            return False
        return is_read_by_plan(name, spec.skills)

    def flops(self, task: str, lengths: Mapping[str, int] | None = None) -> tuple[int, int]:
        """Compute the forward cost by closed formulas; tests compare them with torch's counter."""
        return task_flops(self, task, lengths)

    # -- files -----------------------------------------------------------------------------

    @classmethod
    def config_for(cls, config: SkillNetConfig, task: str) -> SkillNetConfig:
        """Return the configuration with one task and only the skills that it activates."""
        spec = find_task(task, config.tasks)
        return config.restrict_to(spec.skills, {task: spec})


def _other_modality(name: str, task: Task) -> bool:
    """Return whether a parameter is a modality vector that the task does not read."""
    parts = name.split(".")
    return (
        parts[:1] == ["stems"]
        and parts[2] == "modality"
        and parts[3] not in {plan.modality for plan in task.towers.values()}
    )
