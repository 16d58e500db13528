"""Clips of any length to a fixed number of frames: only the frames that are taken are kept."""

import io

import numpy as np
from numpy.typing import NDArray

from pipelines.transforms import video

#: Half an hour at 30 frames a second; a longer clip is not decoded.
MAX_FRAMES = 54_000


def sample_clip(
    data: bytes, count: int = video.FRAMES, size: int = video.SIZE
) -> NDArray[np.uint8]:
    """``count`` frames spread evenly over a clip, square and grey: uint8 (count, size, size, 1).

    Equal to ``video.load_clip``, whatever the clip's length and size: packets are counted first,
    without decoding, and a decoded frame that is not taken is let go.

    Raises:
        ValueError: the bytes are no video, or one of more than ``MAX_FRAMES`` frames.
    """
    import av

    try:
        total = _packets(data)
        chosen = np.ceil(np.arange(1, count + 1) * total / count).astype(int) - 1
        taken: list[NDArray[np.uint8]] = []
        with av.open(io.BytesIO(data), "r", metadata_errors="ignore") as container:
            container.streams.video[0].thread_type = "NONE"  # workers are as many as cores
            last = None
            for index, frame in enumerate(container.decode(video=0)):
                last = frame
                while len(taken) < count and max(int(chosen[len(taken)]), 0) <= index:
                    taken.append(_square(frame, size))
                if len(taken) == count:
                    break
    except av.FFmpegError as problem:
        raise ValueError(f"not a video that can be read ({problem.strerror})") from None
    if last is None:
        raise ValueError("a video without frames")
    while len(taken) < count:  # fewer frames came out than the container told
        taken.append(_square(last, size))
    return np.stack(taken)


def _packets(data: bytes) -> int:
    import av

    with av.open(io.BytesIO(data), "r", metadata_errors="ignore") as container:
        if not container.streams.video:
            raise ValueError("no pictures in the file")
        total = 0
        for packet in container.demux(container.streams.video[0]):
            total += packet.size > 0
            if total > MAX_FRAMES:
                raise ValueError(f"more than {MAX_FRAMES} frames")
    return max(total, 1)


def _square(frame: object, size: int) -> NDArray[np.uint8]:
    picture = frame.to_ndarray(format="rgb24")  # type: ignore[attr-defined]
    return video.clip(picture[None], 1, size)[0]
