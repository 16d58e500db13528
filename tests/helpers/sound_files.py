"""Recordings of tones as files."""

import io

import av
import numpy as np


def encode_tone() -> bytes:
    """Return half a second of a 440 Hz tone as MP3."""
    wave = (0.3 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)).astype(np.float32)
    target = io.BytesIO()
    with av.open(target, mode="w", format="mp3") as container:
        stream = container.add_stream("libmp3lame", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return target.getvalue()
