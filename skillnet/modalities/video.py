"""Videos: tubelets as tokens.

Shapes: B batch, T tokens, D model width, N frames, C channels, S positions of a frame.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.modalities.pixels import PixelTensors, cut_tubelets, scale_to_signed, with_motion
from skillnet.modalities.tensors import (
    Batch,
    PixelScale,
    RowMasking,
    Tokens,
    build_stem_norm,
    make_positions,
    sample_mask,
)


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

    def count_tokens(self, config: SkillNetConfig, length: Any = None) -> int:
        f, h, w = config.tubelet
        return (config.video_frames // f) * (config.video_size // h) * (config.video_size // w)

    def count_elements(self, config: SkillNetConfig, length: int | None = None) -> int:
        return config.video_frames * config.video_size**2

    def make_example(
        self,
        config: SkillNetConfig,
        rows: int,
        length: int | None = None,
        draw: Generator | None = None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> Batch:
        shape = (rows, config.video_frames, config.video_size, config.video_size)
        if draw is None:
            return {"frames": torch.zeros((*shape, 3))}
        channels = settings.get("video_channels", 1)
        return {
            "frames": torch.randint(0, 256, (*shape, channels), generator=draw, dtype=torch.uint8)
        }

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
