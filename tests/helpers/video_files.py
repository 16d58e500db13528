"""Frames as MP4 files, for tests that read clips."""

import io
import struct

import numpy as np
from numpy.typing import NDArray


def encode_video(frames: NDArray[np.uint8], rate: int = 4, scale: int = 4) -> bytes:
    """Write frames as an MP4 file, enlarged ``scale`` times.

    Args:
        frames: uint8 (N, H, W, 1) or (N, H, W, 3).
    """
    import av

    large = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    if large.shape[-1] == 1:
        large = large.repeat(3, axis=-1)
    target = io.BytesIO()
    with av.open(target, mode="w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = large.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for picture in large:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return target.getvalue()


def held(video: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """An MP4 file that says how it is to be shown, as telephones write it: pixel (x, y) at
    (ax + cy, bx + dy). The frames stay as the sensor saw them."""
    at = video.index(b"tkhd") + 4 + 40  # the matrix of its track header, version 0
    matrix = struct.pack(">9i", *(n << 16 for n in (a, b, 0, c, d, 0)), 0, 0, 1 << 30)
    return video[:at] + matrix + video[at + len(matrix) :]
