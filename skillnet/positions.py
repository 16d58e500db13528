"""Position vectors of images and videos of another size, by interpolation on their grid.

A model that was trained on small inputs can start the training on large ones. Positions of text,
code and sound are not interpolated: the tenth token is the tenth token in a longer text as well.

Shapes: T tokens, D model width.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from skillnet.config import SkillNetConfig

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
