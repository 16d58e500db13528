"""Time series: rows of numbers from CSV files, one line per step and one column per channel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Interval
from torch import nn

from pipelines.data.config.bounds import BoundedOptions
from pipelines.data.modalities.base import ModalityFiles
from skillnet.config import SkillNetConfig
from skillnet.modalities.sound import stack_frames, unstack_frames
from skillnet.modalities.tensors import Batch, ModalityTensors, Tokens, make_positions
from skillnet.modality import InputSize, Modality


@dataclass(frozen=True)
class SeriesSizes:
    """Sizes of the model, below ``model.inputs.series``."""

    channels: int = 1
    steps: int = 64
    stride: int = 4


class SeriesStem(nn.Module):
    """Linear embedding of a few steps as one token."""

    def __init__(self, config: SkillNetConfig) -> None:
        super().__init__()
        self.sizes = SERIES.build_options(config.inputs.get("series", {}))
        self.project = nn.Linear(self.sizes.stride * self.sizes.channels, config.dim)
        self.position = make_positions(-(-self.sizes.steps // self.sizes.stride), config.dim)

    def forward(self, batch: Batch, modality: str) -> Tokens:
        values_BNC, stride = batch["values"], self.sizes.stride
        x_BTD = self.project(stack_frames(values_BNC.to(self.position.dtype), stride))
        T = x_BTD.shape[1]
        lengths_B = -(-batch["steps"] // stride)
        mask_BT = torch.arange(T, device=x_BTD.device) < lengths_B[:, None]
        return x_BTD + self.position[:T], mask_BT


class SeriesTensors(ModalityTensors):
    """Tensor half: lengths, batches and masks. Rows are padded."""

    stem_class = SeriesStem

    def find_longest(self, config: SkillNetConfig) -> int:
        return self.options(config).steps

    def count_tokens(self, config: SkillNetConfig, length: Any = None) -> Any:
        sizes = self.options(config)
        return -(-(sizes.steps if length is None else length) // sizes.stride)

    def count_values(self, config: SkillNetConfig) -> int:
        return self.options(config).stride * self.options(config).channels

    def make_example(
        self,
        config: SkillNetConfig,
        rows: int,
        length: int | None = None,
        draw: torch.Generator | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Batch:
        steps, channels = length or self.options(config).steps, self.options(config).channels
        values = torch.zeros(rows, steps, channels)
        if draw is not None:
            values = torch.randn(values.shape, generator=draw)
        return {"values": values, "steps": torch.full((rows,), steps)}

    def cut(self, x: torch.Tensor, config: SkillNetConfig) -> torch.Tensor:
        return stack_frames(x, self.options(config).stride)

    def join(self, x_BTP: torch.Tensor, shape: torch.Size, config: SkillNetConfig) -> torch.Tensor:
        return unstack_frames(x_BTP, self.options(config).stride, shape[1])

    def find_visible(self, inputs: Batch) -> torch.Tensor:
        steps = torch.arange(inputs["values"].shape[1])
        return (steps < inputs["steps"][:, None])[..., None]


@dataclass
class SeriesOptions(BoundedOptions):
    """Time series.

    Args:
        channels: columns of a file.
        steps: lines kept of a file.
    """

    channels: Annotated[int, Interval(ge=1, le=64)] = 1
    steps: Annotated[int, Interval(ge=1, le=10_000)] = 64


class SeriesFiles(ModalityFiles):
    """File half: from the bytes of a file to (steps, channels)."""

    Options = SeriesOptions
    noun = "a series"

    def find_shape(self, options: SeriesOptions) -> tuple[int | None, ...]:
        return None, options.channels

    def reader_arguments(self, options: SeriesOptions) -> tuple[Any, ...]:
        return options.channels, options.steps

    def decode(self, data: bytes, *arguments: Any) -> np.ndarray:
        channels, steps = arguments
        try:
            lines = data.decode("utf-8").split()
            rows = np.array([line.split(",") for line in lines[:steps]], np.float32)
        except ValueError:
            raise ValueError("not a table of numbers") from None
        return self.convert(rows, channels, steps)

    def convert(self, content: Any, *arguments: Any) -> np.ndarray:
        channels, steps = arguments
        values = np.asarray(content, np.float32)[:steps]
        if values.ndim != 2 or values.shape[1] != channels or not len(values):
            raise ValueError(f"a table of {values.shape}, expected (steps, {channels})")
        if not np.isfinite(values).all():
            raise ValueError("numbers that are not finite")
        return values


SERIES = Modality(
    "series",
    "series",
    tensors="time_series:SeriesTensors",
    files="time_series:SeriesFiles",
    column="values",
    batch=("values", "steps"),
    extensions=("csv",),
    sizes=(
        InputSize("inputs.series.channels", "channels"),
        InputSize("inputs.series.steps", "steps", is_limit=True),
    ),
    options=SeriesSizes,
)
