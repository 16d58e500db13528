"""Images: patches as tokens.

Shapes: B batch, T tokens, D model width, C channels, p side of a patch.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Generator, Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.modalities.pixels import PixelTensors, patchify, scale_to_signed
from skillnet.modalities.tensors import (
    Batch,
    PixelScale,
    Tokens,
    build_stem_norm,
    make_positions,
)


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

    def count_elements(self, config: SkillNetConfig, length: int | None = None) -> int:
        return config.image_size**2

    def make_example(
        self,
        config: SkillNetConfig,
        rows: int,
        length: int | None = None,
        draw: Generator | None = None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> Batch:
        shape = (rows, config.image_size, config.image_size, 3)
        if draw is None:
            return {"pixels": torch.zeros(shape)}
        return {"pixels": torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)}

    def check_shape(self, shape: tuple[int, ...], config: SkillNetConfig) -> dict[str, int]:
        return {"image_size": shape[0]} if shape[0] != config.image_size else {}

    def scale_pixels(self, settings: Any) -> PixelScale:
        return PixelScale(settings.image_shift, settings.image_scale, settings.image_colour)

    def find_tubelet(self, config: SkillNetConfig) -> tuple[int, int, int]:
        return 1, config.patch_size, config.patch_size
