"""Pixels of images and videos: cutting into tokens, masks, and the range of their values.

Shapes: B batch, T tokens, N frames, C channels, M masked tokens of all rows, P values of a token.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.modalities.tensors import (
    ModalityTensors,
    fill_masked,
    normalise_tokens,
    spread_flags,
)

#: CPU seconds to read and decode a pixel, which the GPU then changes: 0.407 ms for 224 x 224
#: (benchmarks/results/2026-11-25-reading.csv). Frames are assumed to cost as much.
SECONDS_PER_PIXEL = 0.407e-3 / 224**2


class PixelTensors(ModalityTensors):
    """Tensor half of images or videos: a device changes and masks their pixels.

    A linear layer of the stem makes a token of the pixels of each tubelet.
    """

    has_pixels = True
    seconds_per_element = SECONDS_PER_PIXEL

    def count_values(self, config: SkillNetConfig) -> int:
        return 3 * math.prod(self.find_tubelet(config))

    def count_stem_flops(self, config: SkillNetConfig, stem: nn.Module, length: int | None) -> int:
        assert isinstance(stem, self.stem_class)
        own: Any = stem
        return int(2 * len(own.position) * own.project.in_features * config.dim)


def patchify(x_BHWC: Tensor, side: int) -> Tensor:
    """Cut images into squares, row by row: (B, H, W, C) -> (B, T, p*p*C).

    Args:
        x_BHWC: images whose sides divide by ``side``.
        side: p, pixels per side of a patch.
    """
    B, H, W, C = x_BHWC.shape
    x = x_BHWC.reshape(B, H // side, side, W // side, side, C)
    return x.transpose(2, 3).reshape(B, -1, side * side * C)


def cut_tubelets(x_BNHWC: Tensor, tubelet: tuple[int, int, int]) -> Tensor:
    """Cut videos into tubelets, frame by frame: (B, N, H, W, C) -> (B, T, f*h*w*C).

    Args:
        x_BNHWC: videos whose sizes divide by the tubelet.
        tubelet: (frames, height, width) of one token.
    """
    B, N, H, W, C = x_BNHWC.shape
    f, h, w = tubelet
    x = x_BNHWC.reshape(B, N // f, f, H // h, h, W // w, w, C)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(B, -1, f * h * w * C)


def join_tubelets(x_BTP: Tensor, tubelet: tuple[int, int, int], frames: int, size: int) -> Tensor:
    """Invert :func:`cut_tubelets`.

    Args:
        x_BTP: tubelets.
        tubelet: (frames, height, width) of one token.
        frames: frames of the video.
        size: pixels per side of a frame.
    """
    f, h, w = tubelet
    x = x_BTP.reshape(x_BTP.shape[0], frames // f, size // h, size // w, f, h, w, -1)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(x.shape[0], frames, size, size, -1)


def with_motion(x_BNHWC: Tensor) -> Tensor:
    """Append to each frame its difference to the previous one, (B, N, H, W, C) -> (…, 2 C)."""
    # The first frame has no predecessor, so its difference is zero.
    before = torch.cat([x_BNHWC[:, :1], x_BNHWC[:, :-1]], 1)
    return torch.cat([x_BNHWC, x_BNHWC - before], -1)


def scale_to_signed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert pixels, uint8 or floats in [0, 1], to floats in [-1, 1].

    Args:
        x: pixels of any shape.
        dtype: floating-point type of the result.
    """
    if x.dtype == torch.uint8:
        return x.to(dtype) * (2 / 255) - 1
    return x.to(dtype) * 2 - 1


def hide_pixels(
    x_BNHWC: Tensor,
    masked_BT: Tensor,
    tubelet: tuple[int, int, int],
    places_M: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mask tokens of images or videos; the values are their normalised pixels, with 3 channels.

    Args:
        x_BNHWC: rows in [0, 1]; an image is one frame.
        masked_BT: flags of the masked tokens.
        tubelet: (frames, height, width) of a token.
        places_M: masked tokens among the B T tokens; None returns no values.

    Returns:
        Masked rows, and (M, P) values or None.
    """
    frames, size = x_BNHWC.shape[1:3]
    f, h, w = tubelet
    cover = join_tubelets(spread_flags(masked_BT, f * h * w), tubelet, frames, size)
    values_MP = None
    if places_M is not None:
        signed = scale_to_signed(x_BNHWC, x_BNHWC.dtype).expand(*x_BNHWC.shape[:-1], 3)
        values_MP = normalise_tokens(cut_tubelets(signed, tubelet).flatten(0, 1)[places_M])
    return fill_masked(x_BNHWC, cover), values_MP
