"""Images and videos as the model reads them, changed like those of the data loader."""

import numpy as np
import torch
from torch import Tensor

from pipelines.data.shards.columns import INPUT_COLUMNS
from pipelines.training.config.data import AugmentConfig
from pipelines.training.loading.augment import BatchRandom
from pipelines.training.loading.masking import InputMasker, list_places
from pipelines.training.loading.pixel_changes import (
    MASKED,
    PLACES,
    PixelChange,
    apply_changes,
    draw_change,
)


def augment_pixels(
    modality: str, stored: np.ndarray, config: AugmentConfig, random: BatchRandom
) -> Tensor:
    """Return augmented images or videos, float32 in [0, 1]."""
    change, drawn = draw_change(modality, config, random)
    stored_rows = {change.column: torch.from_numpy(stored)} | drawn
    return apply_changes({"input": stored_rows}, {}, {"input": change})[0]["input"][change.column]


def mask_pixels(
    masker: InputMasker, modality: str, stored: Tensor, random: BatchRandom
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the inputs and targets of a masked task without augmentation."""
    column = INPUT_COLUMNS[modality]
    masked_BT = masker.draw_pixel_mask(modality, len(stored), random)
    change = PixelChange(column, tubelet=masker.find_tubelet(modality), has_targets=True)
    rows = {column: stored, PLACES: list_places(masked_BT)}
    inputs, targets = apply_changes({"input": rows}, {MASKED: masked_BT}, {"input": change})
    return inputs["input"], targets
