"""Images and videos: patches and tubelets as tokens, masks, and the range of pixels.

An image is a video of one frame without motion.

Shapes: B batch, T tokens, D model width, N frames, H, W sides, C channels, p side of a patch, M
masked tokens of all rows, P values of a token, S positions of a frame.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.modalities.tensors import (
    Batch,
    ModalityTensors,
    PixelScale,
    RowMasking,
    Tokens,
    build_stem_norm,
    fill_masked,
    make_positions,
    normalise_tokens,
    sample_mask,
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

    def count_tokens(self, config: SkillNetConfig, length: Any = None) -> int:
        *frames, height, width = self.find_size(config)
        f, h, w = self.find_tubelet(config)
        return math.prod(frames) // f * (height // h) * (width // w)

    def count_elements(self, config: SkillNetConfig, length: int | None = None) -> int:
        return math.prod(self.find_size(config))

    def count_stem_flops(self, config: SkillNetConfig, stem: nn.Module, length: int | None) -> int:
        assert isinstance(stem, self.stem_class)
        own: Any = stem
        return int(2 * len(own.position) * own.project.in_features * config.dim)

    def find_size(self, config: SkillNetConfig) -> tuple[int, ...]:
        """Return the frames, if a row has several, and the sides of a frame."""
        raise NotImplementedError

    def count_channels(self, settings: Mapping[str, Any]) -> int:
        """Return the channels of the rows of a corpus, from its preprocessing."""
        return 3

    def make_example(
        self,
        config: SkillNetConfig,
        rows: int,
        length: int | None = None,
        draw: Generator | None = None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> Batch:
        (name,), shape = self.modality.batch, (rows, *self.find_size(config))
        if draw is None:
            return {name: torch.zeros((*shape, 3))}
        shape = (*shape, self.count_channels(settings))
        return {name: torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)}


class PatchStem(nn.Module):
    """Patch embedding of images. Batch: ``pixels`` (B, H, W, 3), uint8 or floats in [0, 1].

    T = (H/p)(W/p), and one more with ``class_token``, which comes first.
    """

    def __init__(self, config: SkillNetConfig) -> None:
        super().__init__()
        self.size, self.patch = config.image_size, config.patch_size
        count = (self.size // self.patch) ** 2
        self.project = nn.Linear(3 * self.patch**2, config.dim)
        self.position = make_positions(count, config.dim)
        self.class_token = nn.Parameter(torch.zeros(config.dim)) if config.class_token else None
        self.norm = build_stem_norm(config)

    def patches(self, pixels_BHWC: Tensor) -> Tensor:
        """Cut images into patches with values in [-1, 1], (B, H, W, 3) -> (B, T, p*p*3).

        Raises:
            ValueError: images of another size than ``model.image_size``.
        """
        H, W, C = pixels_BHWC.shape[1:]
        if (H, W, C) != (self.size, self.size, 3):
            raise ValueError(
                f"images are {H}x{W}x{C}, the model reads {self.size}x{self.size}x3; "
                "prepare them at model.image_size"
            )
        return patchify(scale_to_signed(pixels_BHWC, self.position.dtype), self.patch)

    def forward(self, batch: Batch, modality: str) -> Tokens:
        x_BTD = self.project(self.patches(batch["pixels"])) + self.position
        if self.class_token is not None:
            first_B1D = self.class_token.expand(len(x_BTD), 1, -1)
            x_BTD = torch.cat([first_B1D.to(x_BTD.dtype), x_BTD], 1)
        return self.norm(x_BTD), None


class ImageTensors(PixelTensors):
    """Tensor half of images."""

    stem_class = PatchStem

    def count_tokens(self, config: SkillNetConfig, length: Any = None) -> int:
        return config.image_tokens

    def find_size(self, config: SkillNetConfig) -> tuple[int, ...]:
        return config.image_size, config.image_size

    def check_shape(self, shape: tuple[int, ...], config: SkillNetConfig) -> dict[str, int]:
        return {"image_size": shape[0]} if shape[0] != config.image_size else {}

    def scale_pixels(self, settings: Any) -> PixelScale:
        return PixelScale(settings.image_shift, settings.image_scale, settings.image_colour)

    def find_tubelet(self, config: SkillNetConfig) -> tuple[int, int, int]:
        return 1, config.patch_size, config.patch_size


class TubeletStem(nn.Module):
    """Tubelet embedding of video. Batch: ``frames`` (B, N, H, W, C), C 1 or 3.

    T = (N/f)(H/h)(W/w). With ``video_motion``, three more channels of each frame hold its
    difference to the previous frame (ours). A tubelet then sees changes across its own border in
    time.
    """

    def __init__(self, config: SkillNetConfig) -> None:
        super().__init__()
        self.count, self.size = config.video_frames, config.video_size
        self.tubelet = config.tubelet
        f, h, w = self.tubelet
        tokens = (self.count // f) * (self.size // h) * (self.size // w)
        self.motion = config.video_motion
        self.project = nn.Linear((6 if self.motion else 3) * f * h * w, config.dim)
        self.position = make_positions(tokens, config.dim)
        self.norm = build_stem_norm(config)

    def tubelets(self, frames_BNHWC: Tensor) -> Tensor:
        """Cut videos into tubelets with values in [-1, 1], (B, N, H, W, C) -> (B, T, f*h*w*3 or 6).

        Grey frames are repeated to 3 channels.

        Raises:
            ValueError: videos of another size than ``model.video_frames`` and ``model.video_size``.
        """
        B, N, H, W, C = frames_BNHWC.shape
        if (N, H, W) != (self.count, self.size, self.size) or C not in (1, 3):
            raise ValueError(
                f"videos are {N} frames of {H}x{W}x{C}, the model reads {self.count} frames of "
                f"{self.size}x{self.size} with 1 or 3 channels; prepare them at "
                "model.video_frames and model.video_size"
            )
        x = scale_to_signed(frames_BNHWC, self.position.dtype).expand(B, N, H, W, 3)
        return cut_tubelets(with_motion(x) if self.motion else x, self.tubelet)

    def forward(self, batch: Batch, modality: str) -> Tokens:
        x_BTD = self.project(self.tubelets(batch["frames"])) + self.position
        return self.norm(x_BTD), None


class VideoTensors(PixelTensors):
    """Tensor half of videos."""

    stem_class = TubeletStem

    def find_size(self, config: SkillNetConfig) -> tuple[int, ...]:
        return config.video_frames, config.video_size, config.video_size

    def count_channels(self, settings: Mapping[str, Any]) -> int:
        return settings.get("video_channels", 1)

    def check_shape(self, shape: tuple[int, ...], config: SkillNetConfig) -> dict[str, int]:
        sizes = {"video_frames": shape[0], "video_size": shape[1]}
        return {key: size for key, size in sizes.items() if size != getattr(config, key)}

    def scale_pixels(self, settings: Any) -> PixelScale:
        return PixelScale(settings.video_shift, settings.video_scale)

    def find_tubelet(self, config: SkillNetConfig) -> tuple[int, int, int]:
        return config.tubelet

    def draw_mask(self, inputs: Batch, masking: RowMasking, random: Any) -> np.ndarray:
        if not masking.settings.video_tubes:
            return super().draw_mask(inputs, masking, random)
        times = masking.model.video_frames // masking.model.tubelet[0]
        chance_BS = random.uniform("mask", self.count_tokens(masking.model) // times)
        return sample_tube_mask(chance_BS, times, masking.share)


def sample_tube_mask(chance_BS: np.ndarray, times: int, share: float) -> np.ndarray:
    """Return a (B, times * S) mask of equal positions in all frames (VideoMAE, Tong et al. 2022).

    Args:
        chance_BS: random numbers of the S positions of a frame.
        times: frames, in tokens.
        share: fraction of the positions to mask.
    """
    B, S = chance_BS.shape
    return np.tile(sample_mask(chance_BS, np.full(B, S), share), (1, times))


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
