"""Images and videos as the model reads them, changed like those of the data loader."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.training.config.data import AugmentConfig, MaskConfig
from pipelines.training.loading.pixel_changes import (
    MASKED,
    PLACES,
    PixelChange,
    apply_changes,
    draw_change,
)
from skillnet.config import SkillNetConfig
from skillnet.keyed_random import BatchRandom
from skillnet.modalities.tensors import RowMasking, list_places
from skillnet.modality import find_modality


def augment_pixels(
    modality: str, stored: np.ndarray, config: AugmentConfig, random: BatchRandom
) -> Tensor:
    """Return augmented images or videos, float32 in [0, 1]."""
    found = find_modality(modality)
    scale = found.tensor_half.scale_pixels(config)
    change, drawn = draw_change(found.column, scale, random)
    stored_rows = {change.column: torch.from_numpy(stored)} | drawn
    return apply_changes({"input": stored_rows}, {}, {"input": change})[0]["input"][change.column]


def make_masking(model: SkillNetConfig, modality: str, **changes: Any) -> RowMasking:
    """Return the masks of rows of a modality, with some settings changed."""
    masks = MaskConfig(**changes)
    return RowMasking(model, masks, getattr(masks, modality), vocab_size=60, longest=24)


def mask_pixels(
    masking: RowMasking, modality: str, stored: Tensor, random: BatchRandom
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the inputs and targets of a masked task without augmentation."""
    column, half = find_modality(modality).column, find_modality(modality).tensor_half
    masked_BT = torch.from_numpy(half.draw_mask({column: stored}, masking, random))
    change = PixelChange(column, tubelet=half.find_tubelet(masking.model), has_targets=True)
    rows = {column: stored, PLACES: list_places(masked_BT)}
    inputs, targets = apply_changes({"input": rows}, {MASKED: masked_BT}, {"input": change})
    return inputs["input"], targets
