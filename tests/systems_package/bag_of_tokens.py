"""Tokens without order or context: SkillNet's stems, and layers that see one token at a time."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from skillnet.config import SkillNetConfig
from skillnet.modality import find_stem
from skillnet.multitask_model import Batch, TaskModel, Tokens
from skillnet.skills import find_task
from skillnet.systems import System


@dataclass(frozen=True)
class BagOptions:
    """How deep it is.

    Args:
        layers: number of layers.
    """

    layers: int = 1


class Bag(TaskModel):
    """All tasks share the layers; stems are those of SkillNet."""

    system = "bag"
    options_class = BagOptions

    def __init__(self, config: SkillNetConfig, options: Any = None) -> None:
        super().__init__(config, options)
        needed = {stem for task in config.tasks.values() for stem in task.stems}
        self.stems = nn.ModuleDict({name: find_stem(name)(config) for name in sorted(needed)})
        layers = [
            nn.Sequential(nn.Linear(config.dim, config.dim), nn.GELU())
            for _ in range((options or BagOptions()).layers)
        ]
        self.layers = nn.Sequential(*layers)
        self.add_heads()

    def tower_tokens(self, task: str, tower: str, batch: Batch) -> Tokens:
        plan = find_task(task, self.config.tasks).towers[tower]
        x_BTD, mask_BT = self.stems[plan.stem](batch, plan.modality)
        return x_BTD + self.layers(x_BTD), mask_BT

    def file_of(self, name: str) -> str:
        parts = name.split(".")
        return {"stems": f"stem-{parts[1]}", "heads": f"head-{parts[1]}"}.get(parts[0], "shared")

    def uses_parameter(self, name: str, task: str) -> bool:
        spec, parts = self.config.tasks[task], name.split(".")
        if parts[0] == "stems" and parts[2] == "modality":
            return parts[3] in {plan.modality for plan in spec.towers.values()}
        read = {"shared", f"head-{task}", *(f"stem-{stem}" for stem in spec.stems)}
        return self.file_of(name) in read


BAG = System("bag", Bag, summary="tokens without order or context")
