"""Copies of a dense encoder in every skill, and noise for copies that would stay equal.

The mean of equal weights is the weight, and the mean of equal outputs is the output. So a SkillNet
whose skills are all copies computes what the dense model computed, with any set of active skills.

Skills that are active in the same towers of all trained tasks get equal gradients and stay equal
for ever. Noise separates them. Only weights that are merged by concatenation (those of feed-forward
layers) get it: of weights that are merged by the mean only their mean matters, and all of them get
the gradient of the mean.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.skill_weights import SkillWeights

#: Skill of a dense model; :mod:`skillnet.baselines.dense` uses the name too.
DENSE_SKILL = "dense"
#: The only task of a converted model whose stem is zero, because the checkpoint's reads another
#: input.
LAYERS_TASK = "imported_layers"
#: Name of the weights of a layer without skills.
_SHARED = "shared"
#: Positions of sequences: a shorter limit takes the first ones.
_SEQUENCE_POSITIONS = ("stems.token.position", "stems.log_mel.position")


def copy_to_skills(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return initial weights of a SkillNet whose skills are all copies of a dense model.

    Args:
        weights: tensors of the dense model, whose only skill is ``dense``.
        model: the SkillNet.

    Returns:
        Name in the SkillNet -> weight, for the names that the dense model has.

    Raises:
        ValueError: the layers of the SkillNet have no place for a weight of the dense model.
    """
    found, used = {}, set()
    for name, parameter in model.named_parameters():
        source = _find_source(name, weights)
        if source is None:
            continue
        used.add(source)
        value = weights[source]
        if name in _SEQUENCE_POSITIONS and len(value) > len(parameter):
            value = value[: len(parameter)]
        found[name] = value
    lost = [f"{n} {tuple(weights[n].shape)}" for n in weights if n.startswith("encoder.")
            and n not in used]  # fmt: skip
    if lost:
        raise ValueError(
            f"this model has no place for {len(lost)} weights of its encoder: "
            f"{', '.join(lost[:4])}{', …' if len(lost) > 4 else ''}"
        )
    return found


def _find_source(name: str, weights: Mapping[str, Tensor]) -> str | None:
    """Return the weight of the dense model that a weight of a SkillNet copies."""
    path = name.rpartition(".weights.")[0] or name
    options = (name, f"{path}.weights.{DENSE_SKILL}", f"{path}.weights.{_SHARED}", path)
    return next((option for option in options if option in weights), None)


def is_difference(name: str) -> bool:
    """Return whether a parameter is a factor of a low-rank difference, which starts at zero.

    Args:
        name: dotted path of the parameter in the module.
    """
    return name.split(".")[-2:-1] in (["left"], ["right"])


def is_unset_weight(name: str, config: SkillNetConfig) -> bool:
    """Return whether a weight of a stem is zero because the checkpoint's reads another input.

    Args:
        name: name of the weight.
        config: settings of the model that it belongs to; other models have no such weights.
    """
    is_stem = name.startswith("stems.") and not name.startswith("stems.log_mel.norm.")
    return is_stem and set(config.tasks) == {LAYERS_TASK}


def find_inseparable_skills(
    plans: Iterable[Collection[str]], skills: Sequence[str]
) -> list[tuple[str, ...]]:
    """Return the groups of skills that every plan activates together or not at all.

    Args:
        plans: active skills of each tower of the trained tasks.
        skills: all skills, in their order.
    """
    towers = list(plans)
    groups: dict[tuple[int, ...], list[str]] = {}
    for skill in skills:
        active = tuple(number for number, plan in enumerate(towers) if skill in plan)
        if active:
            groups.setdefault(active, []).append(skill)
    return [tuple(group) for group in groups.values() if len(group) > 1]


@torch.no_grad()
def separate_skills(
    model: nn.Module, groups: Iterable[Sequence[str]], noise: float, seed: int
) -> list[str]:
    """Add noise to all skills but the first of each group.

    Args:
        model: a SkillNet; its feed-forward weights are changed in place.
        groups: names of equal skills.
        noise: standard deviation, relative to that of a weight's values.
        seed: start of the random numbers of the noise.

    Returns:
        The changed skills.
    """
    changed = [name for group in groups for name in group[1:]] if noise else []
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, SkillWeights) and module.axis is not None and len(module.shape) > 1:
            for name in changed:
                if name in module.weights:
                    weight = module.weights[name]
                    values = torch.randn(weight.shape, generator=generator).to(weight)
                    weight.add_(values, alpha=noise * float(weight.std()))
    return changed


#: Position weights of SkillNet's stems that lie on a grid.
IMAGE_POSITIONS, VIDEO_POSITIONS = "stems.patch.position", "stems.tubelet.position"


def position_grids(config: SkillNetConfig) -> dict[str, tuple[int, ...]]:
    """Return position weight -> sizes of its grid: (rows, columns) or (time, rows, columns).

    Args:
        config: sizes of the inputs.
    """
    across = config.image_size // config.patch_size
    f, h, w = config.tubelet
    times, size = config.video_frames // f, config.video_size
    return {
        IMAGE_POSITIONS: (across, across),
        VIDEO_POSITIONS: (times, size // h, size // w),
    }


def resize_positions(
    weights: Mapping[str, Tensor], trained: SkillNetConfig, wanted: SkillNetConfig
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Interpolate the positions of a trained model for inputs of other sizes.

    Images are interpolated bicubically, as in DINOv2, and videos linearly in time and space.

    Args:
        weights: parameter name -> weights of the trained model.
        trained: its configuration.
        wanted: configuration of the new model.

    Returns:
        All weights, and name -> change of the grid of those that were interpolated.
    """
    found, changes = dict(weights), {}
    before, after = position_grids(trained), position_grids(wanted)
    for name, old in before.items():
        new = after[name]
        if name in found and old != new:
            found[name] = _interpolate(found[name], old, new)
            changes[name] = f"{_format_grid(old)} to {_format_grid(new)}"
    return found, changes


@torch.no_grad()
def _interpolate(position_TD: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    grid = position_TD.T.reshape(1, -1, *old)
    mode = "bicubic" if len(old) == 2 else "trilinear"
    # Antialiasing matters only for a smaller grid; torch has it for images only.
    smooth = F.interpolate(grid, new, mode=mode, align_corners=False, antialias=mode == "bicubic")
    return smooth.reshape(position_TD.shape[1], -1).T.contiguous()


def _format_grid(grid: tuple[int, ...]) -> str:
    return "x".join(map(str, grid))
