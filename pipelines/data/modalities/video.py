"""Videos: frames of one number and size."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Interval

from pipelines.data.config.bounds import BoundedOptions
from pipelines.data.modalities.base import MAX_SIDE, PixelFiles, largest_divisor
from pipelines.data.shards.jpeg import PixelStorage
from pipelines.data.transforms import containers, video


@dataclass
class VideoOptions(BoundedOptions):
    """Videos: frames, spread evenly over the video, the square in the middle of each.

    Args:
        frames: frames per video; 8 to 32 are common. Set model.video_frames to the same value.
        video_size: pixels per side of a frame; set model.video_size to the same value.
        video_channels: 1 for grey frames, 3 for colour. A model reads both.
        storage: "raw" pixels, "encoded" as JPEG, or "auto": raw up to 64 KiB per row.
    """

    frames: Annotated[int, Interval(ge=1, le=MAX_SIDE)] = video.FRAMES
    video_size: Annotated[int, Interval(ge=1, le=MAX_SIDE)] = video.SIZE
    video_channels: Literal[1, 3] = video.GREY
    storage: PixelStorage = "auto"


class VideoFiles(PixelFiles):
    """File half of videos."""

    Options = VideoOptions
    noun = "a video"
    settings_keys = ("frames", "video_size", "video_channels")

    def find_shape(self, options: VideoOptions) -> tuple[int, ...]:
        return options.frames, options.video_size, options.video_size, options.video_channels

    def reader_arguments(self, options: VideoOptions) -> tuple[Any, ...]:
        return options.frames, options.video_size, options.video_channels

    def decode(self, data: bytes, *arguments: Any) -> np.ndarray:
        return video.load_video_frames(data, *arguments)

    def describe_constants(self) -> dict[str, Any]:
        return {"pixels": video.VERSION}

    def measure(self, data: bytes) -> dict[str, float]:
        facts = containers.measure_seconds(data)
        with containers.open_container(data) as container:
            streams = container.streams.video
            frames = streams[0].frames if streams else None
        if frames is None:
            return facts
        width, height = video.read_video_size(data)
        return facts | {"frames": float(frames), "width": float(width), "height": float(height)}

    def fit_grid(self, sizes: dict[str, Any], default: Callable[[str], Any]) -> None:
        wanted = [sizes.get("video_frames", default("video_frames"))]
        wanted += 2 * [sizes.get("video_size", default("video_size"))]
        if any(size % part for size, part in zip(wanted, default("tubelet"), strict=True)):
            frames = 2 if wanted[0] % 2 == 0 else 1
            sizes["tubelet"] = [frames, *2 * [largest_divisor(wanted[1])]]

    def model_arguments(self, config: Any, settings: Mapping[str, Any]) -> tuple[Any, ...]:
        # A model reads grey and coloured frames; it was trained on those of its corpus.
        channels = settings.get("video_channels", video.GREY)
        return config.video_frames, config.video_size, channels

    def convert(self, content: Any, *arguments: Any) -> np.ndarray:
        return video.convert_frames(content, *arguments)
