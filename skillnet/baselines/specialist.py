"""Specialists: for each tower of each task an encoder of its own from transformers or timm.

They live in one module, but no two tasks share a parameter, and clipping, weight decay and the
optimiser act on a step's own parameters: each is trained exactly as if it were alone.

Self-supervised tasks are no tasks of a specialist but its pretraining: all those of a modality
train one encoder, from which the towers of that modality later start.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from skillnet.baselines import library_models, size_matching
from skillnet.baselines.hf_checkpoints import find_checkpoint
from skillnet.baselines.library_encoders import Tower
from skillnet.baselines.library_models import FAMILIES
from skillnet.config import SkillNetConfig
from skillnet.layers import check_free
from skillnet.multitask_model import Batch, TaskModel, Tokens
from skillnet.skills import MODALITIES, Modality, Task, find_task, nearest
from skillnet.systems import System

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
        ffn_dim: feed-forward width from scratch; none makes the layers of a task's towers as
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
    ffn_dim: int | None = None
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
        if self.ffn_dim is not None and self.ffn_dim < 1:
            raise ValueError(f"options.ffn_dim must be at least 1, got {self.ffn_dim}")

    def family(self, modality: str) -> library_models.Family:
        """The family that reads a modality."""
        return FAMILIES[getattr(self, modality)]


def pretrains(task: Task) -> Modality | None:
    """The modality whose encoder a self-supervised task trains; none for the task of a specialist.

    Self-supervised are masked modelling and pairs within one modality: two views of a row, a word
    and its definition.
    """
    modalities = {plan.modality for plan in task.towers.values()}
    if task.objective in ("masked", "retrieval") and len(modalities) == 1:
        return modalities.pop()
    return None


class Specialist(TaskModel):
    """An encoder of a library for each tower of each task, and one a modality in pretraining."""

    system = "specialist"

    def __init__(self, config: SkillNetConfig, options: SpecialistOptions | None = None) -> None:
        options = options or SpecialistOptions()
        super().__init__(config, options)
        self.towers = nn.ModuleDict()
        self.pretrained = nn.ModuleDict()
        for name, task in config.tasks.items():
            modality = pretrains(task)
            if modality is not None:
                if modality not in self.pretrained:
                    self.pretrained[modality] = self._tower(modality, options)
                continue
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
            return family.build(family.fresh(self.config, self.config.ffn_dim), dim)
        folder = find_checkpoint(options.checkpoints[modality], options.download)
        shape = family.read(folder, self.config)
        self.options["shapes"] = {**self.options["shapes"], modality: shape}
        return family.build(shape, dim, folder)

    # -- running ---------------------------------------------------------------------------

    def tower(self, task: str, tower: str) -> Tower:
        """The encoder of a task's tower."""
        modality = pretrains(find_task(task, self.config.tasks))
        found: Any = self.towers[task][tower] if modality is None else self.pretrained[modality]  # type: ignore[index]
        return found

    def tower_tokens(self, task: str, tower: str, batch: Batch) -> Tokens:
        """Encoded tokens (B, T, D) on the grid of SkillNet's stem for that modality."""
        return self.tower(task, tower)(batch)

    def token_embedding(self, task: str, tower: str) -> Tensor:
        """Embedding (V, D) of the tower's own tokens."""
        return self.tower(task, tower).token_embedding(self.config.vocab_size)

    # -- ownership -------------------------------------------------------------------------

    def owner(self, name: str) -> str:
        """File: ``specialist-TASK-TOWER``, ``pretrained-MODALITY`` or ``head-TASK``."""
        parts = name.split(".")
        if parts[0] == "towers":
            return f"specialist-{parts[1]}-{parts[2]}"
        return f"head-{parts[1]}" if parts[0] == "heads" else f"pretrained-{parts[1]}"

    def touches(self, name: str, task: str) -> bool:
        """True for what is the task's own, or what it pretrains: tasks share nothing."""
        kind, of = name.split(".")[:2]
        if kind == "pretrained":
            return pretrains(find_task(task, self.config.tasks)) == of
        return of == task

    def forget(self, task: str) -> None:
        """Drop the task's encoders and head, and an encoder that no task pretrains any more."""
        super().forget(task)
        if task in self.towers:
            del self.towers[task]
        kept = {pretrains(other) for other in self.config.tasks.values()}
        for modality in set(self.pretrained) - kept:
            del self.pretrained[modality]

    def counterpart(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """The same parameter, or the one of the encoder that was pretrained for the modality."""
        parts = name.split(".")
        if parts[0] != "towers" or name in tensors:
            return name
        plan = self.config.tasks[parts[1]].towers[parts[2]]
        return ".".join(["pretrained", plan.modality, *parts[3:]])


def configure(config: SkillNetConfig, options: SpecialistOptions) -> SkillNetConfig:
    """The study's configuration with the feed-forward width of the specialists' layers.

    Raises:
        ValueError: a family that cannot read the study's inputs, or a checkpoint that is missing
            or does not fit.
    """
    own = dataclasses.replace(config, ffn_dim=options.ffn_dim or _width(config))
    for modality in {p.modality for task in config.tasks.values() for p in task.towers.values()}:
        family = options.family(modality)
        if modality not in options.checkpoints:
            family.fresh(own, own.ffn_dim)
        elif modality not in options.shapes:
            where = find_checkpoint(options.checkpoints[modality], options.download)
            family.read(where, own)
    return own


def _width(config: SkillNetConfig) -> int:
    """Feed-forward width of a Transformer with biases, as all families are."""
    D, depth = config.dim, config.num_layers
    wanted = size_matching.activated(config) / size_matching.towers(config)
    fixed = depth * (4 * D * D + 4 * D + D + 4 * D)
    return size_matching.solve_width(wanted, fixed, depth * (2 * D + 1), "options.ffn_dim")


SPECIALIST = System(
    "specialist",
    Specialist,
    configure,
    SpecialistOptions,
    summary="an encoder of transformers or timm for each tower of each task",
)
