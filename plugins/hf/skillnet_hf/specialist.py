"""Specialist baseline: for each tower of each task a separate encoder of transformers or timm.

All encoders are in one module, but no two tasks share a parameter. Clipping, weight decay and the
optimizer apply only to the parameters of a step. Each specialist is therefore trained exactly as
if it were alone.

Self-supervised tasks pretrain the specialists: all such tasks of a modality train one encoder, and
the towers of that modality start from it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skillnet.baselines import size_matching
from skillnet.bounds import LayerSize, check_bounds
from skillnet.config import SkillNetConfig
from skillnet.modality import BUILT_IN_MODALITIES, modality_names
from skillnet.multitask_model import Batch, TaskModel, Tokens
from skillnet.skill_weights import require_unused_name
from skillnet.skills import find_task, nearest_hint, pretrained_modalities
from skillnet.skipped_init import SkippedInit
from skillnet.systems import SizeMatch, System
from skillnet_hf import library_models
from skillnet_hf.hf_checkpoints import find_checkpoint
from skillnet_hf.library_encoders import EncoderAdapter
from skillnet_hf.library_models import FAMILIES


@dataclass(frozen=True)
class SpecialistOptions:
    """Architecture and initial weights of the encoder of each modality.

    Args:
        text: bert or roberta.
        code: bert or roberta.
        image: vit.
        sound: speech2text or ast.
        video: videomae.
        checkpoints: modality -> directory, or model of the Hugging Face hub, that gives initial
            weights and sizes; other modalities start from scratch at the study's size.
        download: download checkpoints that are not on this machine.
        ffn_dim: feed-forward width from scratch. None matches the layers of a task's towers to the
            parameters that a task of SkillNet activates, both on average over the reference tasks.
        shapes: modality -> configuration of the library's model of a checkpoint. It is filled in
            when a model is saved, so that it can be loaded without the checkpoint.

    Raises:
        ValueError: an unknown architecture or modality, or an invalid width.
    """

    text: str = "bert"
    code: str = "bert"
    image: str = "vit"
    sound: str = "speech2text"
    video: str = "videomae"
    checkpoints: dict[str, str] = field(default_factory=dict)
    download: bool = False
    ffn_dim: LayerSize | None = None
    shapes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in BUILT_IN_MODALITIES.values():
            name, known = getattr(self, each.name), each.specialists
            if name not in known:
                raise ValueError(
                    f"options.{each.name}: no architecture {name!r}{nearest_hint(name, known)}"
                )
        for key in ("checkpoints", "shapes"):
            for modality in getattr(self, key):
                if modality not in modality_names():
                    hint = nearest_hint(modality, modality_names())
                    raise ValueError(f"options.{key}: unknown modality {modality!r}{hint}")
        check_bounds(self, "options.")

    def family(self, modality: str) -> library_models.LibraryArchitecture:
        """Return the architecture of a modality.

        Raises:
            ValueError: no architecture of a library reads it.
        """
        name = getattr(self, modality, None)
        if name not in FAMILIES:
            raise ValueError(f"no library's encoder reads {modality}; use another system")
        return FAMILIES[name]


class SpecialistModel(TaskModel):
    """One library encoder per tower of each task, and one per modality in pretraining."""

    system = "specialist"
    options_class = SpecialistOptions

    def __init__(self, config: SkillNetConfig, options: SpecialistOptions | None = None) -> None:
        options = options or SpecialistOptions()
        super().__init__(config, options)
        self.towers = nn.ModuleDict()
        self.pretrained = nn.ModuleDict()
        for name, task in config.tasks.items():
            shared = pretrained_modalities(name, task)
            for modality in sorted(shared - set(self.pretrained)):
                self.pretrained[modality] = self._tower(modality, options)
            if shared:
                continue
            require_unused_name(self.towers, name, "task")
            self.towers[name] = nn.ModuleDict(
                {t: self._tower(plan.modality, options) for t, plan in task.towers.items()}
            )
        self.add_heads()

    @classmethod
    def parse_saved_options(cls, given: Mapping[str, Any] | None) -> SpecialistOptions:
        """Build the options of a saved model, which names no other files to load.

        Args:
            given: option name -> value.
        """
        options: SpecialistOptions = cls.parse_options(given)
        used = {name: path for name, path in options.checkpoints.items() if name in options.shapes}
        return dataclasses.replace(options, checkpoints=used, download=False)

    def _tower(self, modality: str, options: SpecialistOptions) -> EncoderAdapter:
        family, dim = options.family(modality), self.config.dim
        if modality in options.shapes:
            return family.build(options.shapes[modality], dim)
        if modality not in options.checkpoints:
            encoder = family.build(family.fresh(self.config, self.config.ffn_dim), dim)
            _scale_layers(encoder, self.config.init_scale)
            return encoder
        folder = find_checkpoint(options.checkpoints[modality], options.download)
        shape = family.read(folder, self.config)
        self.options["shapes"] = {**self.options["shapes"], modality: shape}
        # Without values, on the meta device, a model needs the sizes of the checkpoint only.
        is_empty = torch.empty(0).is_meta
        return family.build(shape, dim, None if is_empty else folder)

    # -- running ---------------------------------------------------------------------------

    def tower(self, task: str, tower: str) -> EncoderAdapter:
        """Return the encoder of a task's tower."""
        own = find_task(task, self.config.tasks)
        is_shared = bool(pretrained_modalities(task, own))
        towers: Any = self.pretrained if is_shared else self.towers[task]
        found: Any = towers[own.towers[tower].modality if is_shared else tower]
        return found

    def tower_tokens(self, task: str, tower: str, batch: Batch) -> Tokens:
        """Encode tokens (B, T, D) on the grid of SkillNet's stem of the modality."""
        return self.tower(task, tower)(batch)

    def token_embedding(self, task: str, tower: str) -> Tensor:
        """Return the embedding (V, D) of the tower's own tokens."""
        return self.tower(task, tower).token_embedding(self.config.vocab_size)

    def limit_kept_tokens(self, limit: int | None) -> None:
        """Let the backward pass compute all layers again, for each limit.

        Args:
            limit: None keeps all tokens.
        """
        for module in self.modules():
            if isinstance(module, EncoderAdapter):
                module.recompute_layers(limit is not None)

    # -- ownership -------------------------------------------------------------------------

    def file_of(self, name: str) -> str:
        """Return the file: ``specialist-TASK-TOWER``, ``pretrained-MODALITY`` or ``head-TASK``."""
        parts = name.split(".")
        if parts[0] == "towers":
            return f"specialist-{parts[1]}-{parts[2]}"
        return f"head-{parts[1]}" if parts[0] == "heads" else f"pretrained-{parts[1]}"

    @classmethod
    def possible_files(cls, config: SkillNetConfig) -> set[str]:
        """Return the files of each tower, head and pretrained encoder."""
        return {
            *(f"head-{task}" for task in config.tasks),
            *(
                f"specialist-{task}-{each}"
                for task in config.tasks
                for each in config.tasks[task].towers
            ),
            *(f"pretrained-{modality}" for modality in modality_names()),
        }

    def uses_parameter(self, name: str, task: str) -> bool:
        """Return whether a parameter belongs to the task, or to the encoder that it pretrains."""
        kind, of = name.split(".")[:2]
        if kind == "pretrained":
            return of in pretrained_modalities(task, find_task(task, self.config.tasks))
        return of == task

    def drop_task(self, task: str) -> None:
        """Delete the task's encoders and head, and encoders that no remaining task pretrains."""
        super().drop_task(task)
        if task in self.towers:
            del self.towers[task]
        # Several tasks may pretrain one encoder. It goes with the last of them.
        left = self.config.tasks.items()
        kept = {modality for each in left for modality in pretrained_modalities(*each)}
        for modality in set(self.pretrained) - kept:
            del self.pretrained[modality]

    def source_name(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Return the same name, or that of the encoder that was pretrained for the modality."""
        parts = name.split(".")
        if parts[0] != "towers" or name in tensors:
            return name
        plan = self.config.tasks[parts[1]].towers[parts[2]]
        return ".".join(["pretrained", plan.modality, *parts[3:]])


@torch.no_grad()
def _scale_layers(encoder: EncoderAdapter, factor: float) -> None:
    """Scale the initial matrices of the layers; biases, norms and embeddings stay."""
    for name, parameter in encoder.named_parameters():
        if is_layer_weight(name) and parameter.ndim >= 2:
            parameter.mul_(factor)


def configure_specialist(config: SkillNetConfig, options: SpecialistOptions) -> SkillNetConfig:
    """Return the study's configuration with the feed-forward width of the specialists.

    Args:
        config: configuration of the study.
        options: architectures and checkpoints.

    Raises:
        ValueError: an architecture that cannot read the study's inputs, or a checkpoint that is
            missing or does not fit.
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
    """Return the feed-forward width of a Transformer with biases, as all architectures are."""
    D, depth = config.dim, config.num_layers
    # The towers of a task share its parameter budget.
    tasks = size_matching.reference_tasks(config).values()
    towers = sum(len(task.towers) for task in tasks) / len(tasks)
    wanted = size_matching.mean_activated_params(config) / towers
    fixed = depth * (4 * D * D + 4 * D + D + 4 * D)
    return size_matching.solve_width(wanted, fixed, depth * (2 * D + 1), "options.ffn_dim")


def measure_specialist(config: SkillNetConfig, options: SpecialistOptions) -> SizeMatch:
    """Return the parameters that SkillNet's layers activate, and those of the specialists' layers.

    Args:
        config: configuration of the study.
        options: architectures and checkpoints. A checkpoint is read for its sizes only.
    """
    compared = size_matching.compared_config(config)
    own = configure_specialist(compared, options)
    shapes = {
        name: options.family(name).read(find_checkpoint(path, options.download), own)
        for name, path in options.checkpoints.items()
    }
    plain = dataclasses.replace(options, checkpoints={}, shapes=shapes | options.shapes)
    with torch.device("meta"), SkippedInit():
        model = SpecialistModel(own, plain)
    sizes = [
        sum(p.numel() for name, p in model.active_parameters(task) if is_layer_weight(name))
        for task in compared.tasks
    ]
    return SizeMatch(
        "activated parameters",
        size_matching.mean_activated_params(compared),
        sum(sizes) / len(sizes),
    )


def is_layer_weight(name: str) -> bool:
    """Return whether a parameter of a specialist belongs to the layers of an encoder.

    Args:
        name: identifier of the parameter. The libraries call the layers ``encoder``, ``blocks`` or
            ``layers``.
    """
    return not {"encoder", "blocks", "layers"}.isdisjoint(name.split("."))


SPECIALIST = System(
    "specialist",
    SpecialistModel,
    configure_specialist,
    measure_specialist,
    shares_weights=False,
    summary="an encoder of transformers or timm for each tower of each task",
)
