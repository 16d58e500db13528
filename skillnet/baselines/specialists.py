"""Specialists: for each tower of each task an encoder of its own from transformers or timm.

They live in one module, but no two tasks share a parameter, and clipping, weight decay and the
optimiser act on a step's own parameters: each is trained exactly as if it were alone.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from skillnet.baselines import families, matching
from skillnet.baselines.checkpoints import find_checkpoint
from skillnet.baselines.families import FAMILIES
from skillnet.baselines.towers import Tower
from skillnet.config import SkillNetConfig
from skillnet.layers import check_free
from skillnet.skills import MODALITIES, Modality, find_task, nearest
from skillnet.systems import System
from skillnet.task_model import Batch, TaskModel, Tokens

#: The families that can read a modality; the first is the default.
READERS: dict[str, tuple[str, ...]] = {
    "text": ("bert", "roberta"),
    "code": ("bert", "roberta"),
    "image": ("vit",),
    "sound": ("speech2text", "ast"),
    "video": ("videomae",),
}


@dataclass(frozen=True)
class SpecialistOptions:
    """Which library model reads which modality, and where its weights come from.

    Args:
        text: bert or roberta.
        code: bert or roberta.
        image: vit.
        sound: speech2text or ast.
        video: videomae.
        checkpoints: modality -> folder, or model of the Hugging Face hub, whose weights and sizes
            its towers start from; without one a model of the study's size starts from scratch.
        download: fetch checkpoints that are not on this machine.
        hidden: feed-forward width from scratch; none makes the layers of a task's towers as
            large as what a task of SkillNet activates, both on average over tasks.
        shapes: modality -> configuration of the library's model that a checkpoint had; filled in
            when a model is saved, so that it can be read without the checkpoint.
    """

    text: str = "bert"
    code: str = "bert"
    image: str = "vit"
    sound: str = "speech2text"
    video: str = "videomae"
    checkpoints: dict[str, str] = field(default_factory=dict)
    download: bool = False
    hidden: int | None = None
    shapes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for modality, known in READERS.items():
            name = getattr(self, modality)
            if name not in known:
                raise ValueError(f"options.{modality}: no family {name!r}{nearest(name, known)}")
        for key in ("checkpoints", "shapes"):
            for modality in getattr(self, key):
                if modality not in MODALITIES:
                    hint = nearest(modality, MODALITIES)
                    raise ValueError(f"options.{key}: unknown modality {modality!r}{hint}")
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"options.hidden must be at least 1, got {self.hidden}")

    def family(self, modality: str) -> families.Family:
        """The family that reads a modality."""
        return FAMILIES[getattr(self, modality)]


class Specialist(TaskModel):
    """An encoder of a library for each tower of each task."""

    system = "specialist"

    def __init__(self, config: SkillNetConfig, options: SpecialistOptions | None = None) -> None:
        options = options or SpecialistOptions()
        super().__init__(config, options)
        self.towers = nn.ModuleDict()
        for name, task in config.tasks.items():
            check_free(self.towers, name, "task")
            self.towers[name] = nn.ModuleDict(
                {t: self._tower(plan.modality, options) for t, plan in task.towers.items()}
            )
        self.add_heads()

    def _tower(self, modality: Modality, options: SpecialistOptions) -> Tower:
        family, dim = options.family(modality), self.config.dim
        if modality in options.shapes:
            return family.build(options.shapes[modality], dim)
        if modality not in options.checkpoints:
            return family.build(family.fresh(self.config, self.config.hidden), dim)
        folder = find_checkpoint(options.checkpoints[modality], options.download)
        shape = family.read(folder, self.config)
        self.options["shapes"] = {**self.options["shapes"], modality: shape}
        return family.build(shape, dim, folder)

    # -- running ---------------------------------------------------------------------------

    def tower(self, task: str, tower: str) -> Tower:
        """The encoder of a task's tower."""
        find_task(task, self.config.tasks)
        found: Any = self.towers[task]
        return found[tower]

    def tower_tokens(self, task: str, tower: str, batch: Batch) -> Tokens:
        """Encoded tokens (B, T, D) on the grid of SkillNet's stem for that modality."""
        return self.tower(task, tower)(batch)

    def token_embedding(self, task: str, tower: str) -> Tensor:
        """Embedding (V, D) of the tower's own tokens."""
        return self.tower(task, tower).token_embedding(self.config.vocab_size)

    # -- ownership -------------------------------------------------------------------------

    def owner(self, name: str) -> str:
        """File of a parameter: ``specialist-TASK-TOWER`` or ``head-TASK``."""
        parts = name.split(".")
        return f"head-{parts[1]}" if parts[0] == "heads" else f"specialist-{parts[1]}-{parts[2]}"

    def touches(self, name: str, task: str) -> bool:
        """True for what is the task's own: nothing is shared."""
        return name.split(".")[1] == task

    def forget(self, task: str) -> None:
        """Drop the task's encoders and head."""
        super().forget(task)
        del self.towers[task]

    def counterpart(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """The same parameter, or the one of the encoder pretrained on masks of the modality."""
        parts = name.split(".")
        if parts[0] != "towers" or name in tensors:
            return name
        plan = self.config.tasks[parts[1]].towers[parts[2]]
        return ".".join(["towers", f"masked_{plan.modality}", "input", *parts[3:]])


def configure(config: SkillNetConfig, options: SpecialistOptions) -> SkillNetConfig:
    """The study's configuration with the feed-forward width of the specialists' layers.

    Raises:
        ValueError: a family that cannot read the study's inputs, or a checkpoint that is missing
            or does not fit.
    """
    own = dataclasses.replace(config, hidden=options.hidden or _width(config))
    for modality in {p.modality for task in config.tasks.values() for p in task.towers.values()}:
        family = options.family(modality)
        if modality not in options.checkpoints:
            family.fresh(own, own.hidden)
        elif modality not in options.shapes:
            where = find_checkpoint(options.checkpoints[modality], options.download)
            family.read(where, own)
    return own


def _width(config: SkillNetConfig) -> int:
    """Feed-forward width of a Transformer with biases, as all families are."""
    D, depth = config.dim, config.depth
    wanted = matching.activated(config) / matching.towers(config)
    fixed = depth * (4 * D * D + 4 * D + D + 4 * D)
    return matching.solve_width(wanted, fixed, depth * (2 * D + 1), "options.hidden")


SPECIALIST = System(
    "specialist",
    Specialist,
    configure,
    SpecialistOptions,
    summary="an encoder of transformers or timm for each tower of each task",
)
