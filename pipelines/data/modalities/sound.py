"""Sound: log-mel frames of recordings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from annotated_types import Interval

from pipelines.data.config.bounds import BoundedOptions
from pipelines.data.modalities.base import ModalityFiles
from pipelines.data.transforms import containers, sound

#: Frames per second: one every 10 ms.
FRAME_RATE = sound.RATE // sound.HOP


@dataclass
class SoundOptions(BoundedOptions):
    """Audio: resampled to 16 kHz mono, 80 log-mel bins of 25 ms every 10 ms.

    Args:
        max_seconds: longer audio is rejected if it has a transcript, because the model would be
            asked for words that it does not hear; without a transcript it is truncated. Set
            model.max_frames to 100 times this value.
        trim: remove silence before and after speech. Speech recognition usually keeps it.
    """

    max_seconds: Annotated[float, Interval(ge=0.1, le=3600)] = 20.0
    trim: bool = False


class SoundFiles(ModalityFiles):
    """File half of sound."""

    Options = SoundOptions
    noun = "audio"
    text_fields = ("transcription", "transcript", "sentence", "text", "txt")
    settings_keys = ("max_seconds", "trim", "rate", "mean", "deviation")
    is_played = True

    def find_shape(self, options: SoundOptions) -> tuple[int | None, ...]:
        return None, sound.MELS

    def decode(self, data: bytes, *arguments: Any) -> np.ndarray:
        return sound.load_log_mel(data, *arguments)

    def read_row(self, data: bytes, text: str | None, options: SoundOptions) -> np.ndarray:
        wave = sound.decode_audio(data)
        if text is not None and wave.size > options.max_seconds * sound.RATE:
            raise ValueError(f"audio longer than {options.max_seconds:g} s")
        return sound.compute_log_mel(wave, round(options.max_seconds * FRAME_RATE), options.trim)

    def estimate_row_bytes(self, options: SoundOptions) -> int:
        # Five seconds are typical.
        return 5 * FRAME_RATE * sound.MELS * 4

    def describe_constants(self) -> dict[str, Any]:
        frames = {"mean": sound.MEAN, "deviation": sound.DEVIATION, "rate": sound.RATE}
        return {**frames, "samples": sound.VERSION}

    def measure(self, data: bytes) -> dict[str, float]:
        return containers.measure_seconds(data)

    def model_arguments(self, config: Any, settings: Mapping[str, Any]) -> tuple[Any, ...]:
        seconds = settings.get("max_seconds")
        frames = round(seconds * FRAME_RATE) if seconds else sound.MAX_FRAMES
        return frames, settings.get("trim", True)

    def describe_wrong_content(self, content: Any) -> str:
        is_pair = isinstance(content, tuple) and len(content) == 2
        return "" if is_pair else "expected (samples, rate in Hz), a path or bytes"

    def convert(self, content: Any, *arguments: Any) -> np.ndarray:
        return sound.compute_log_mel(sound.resample_audio(*content), *arguments)
