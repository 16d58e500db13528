"""Images: pixels of one size."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Interval

from pipelines.data.config.bounds import BoundedOptions
from pipelines.data.modalities.base import MAX_SIDE, PixelFiles, largest_divisor
from pipelines.data.shards.jpeg import PixelStorage
from pipelines.data.transforms import image


@dataclass
class ImageOptions(BoundedOptions):
    """Images.

    Args:
        size: pixels per side; 224 is common. Set model.image_size to the same value.
        fit: "crop" keeps the square in the middle, as is common; "pad" keeps the entire image on
            white.
        storage: "raw" pixels, "encoded" as JPEG, or "auto": raw up to 64 KiB per row.
    """

    size: Annotated[int, Interval(ge=1, le=MAX_SIDE)] = image.SIZE
    fit: Literal["crop", "pad"] = "crop"
    storage: PixelStorage = "auto"


class ImageFiles(PixelFiles):
    """File half of images."""

    Options = ImageOptions
    noun = "an image"
    settings_keys = ("size", "fit")

    def find_shape(self, options: ImageOptions) -> tuple[int, ...]:
        return options.size, options.size, 3

    def reader_arguments(self, options: ImageOptions) -> tuple[Any, ...]:
        return options.size, options.fit

    def decode(self, data: bytes, *arguments: Any) -> np.ndarray:
        return image.load_pixels(data, *arguments)

    def describe_constants(self) -> dict[str, Any]:
        return {"pixels": image.VERSION}

    def measure(self, data: bytes) -> dict[str, float]:
        size = image.read_image_size(data)
        return {"width": float(size[0]), "height": float(size[1])} if size else {}

    def fit_grid(self, sizes: dict[str, Any], default: Callable[[str], Any]) -> None:
        if "image_size" in sizes and sizes["image_size"] % default("patch_size"):
            sizes["patch_size"] = largest_divisor(sizes["image_size"])

    def model_arguments(self, config: Any, settings: Mapping[str, Any]) -> tuple[Any, ...]:
        return config.image_size, settings.get("fit", "pad")

    def convert(self, content: Any, *arguments: Any) -> np.ndarray:
        return image.convert_image(content, *arguments)
