"""Transform of videos: a fixed number of square, upright frames."""

import contextlib
import struct
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipelines.data.transforms import containers

#: Increase it when a change of this file changes the pixels of any file.
VERSION = 3
#: Frames of a video, and pixels of a side.
FRAMES = 8
SIZE = 32
#: Channels of a grey pixel; a coloured one has 3.
GREY: Final = 1
#: Ten minutes at 30 frames a second.
MAX_FRAMES_READ = 18_000
TOO_LONG = f"more than {MAX_FRAMES_READ} frames"
#: Pixels of a frame; 8K has 33 million.
MAX_PIXELS = 36 * 2**20
CUT_SHORT = "cut short: the file ends before its video does"


def count_frames(data: bytes) -> int:
    """Return the number of frames of a video file without decoding them.

    Raises:
        ValueError: the bytes are not a video, it is truncated, or its frames are too many or too
            large.
    """
    import av

    count, end = 0, 0.0
    with _open_video(data) as (container, stream):
        declared, seconds = stream.frames, (container.duration or 0) / av.time_base
        if declared > MAX_FRAMES_READ:
            raise ValueError(TOO_LONG)
        with contextlib.suppress(av.FFmpegError):  # a truncated file ends with an error
            for packet in container.demux():
                if packet.size and packet.stream is stream:
                    count += 1
                if packet.pts is not None:
                    end = max(end, float(packet.pts * packet.time_base))
                if count > MAX_FRAMES_READ:
                    raise ValueError(TOO_LONG)
    if count < 0.95 * declared - 1 or (not declared and end < 0.95 * seconds - 0.5):
        raise ValueError(CUT_SHORT)
    if not count:
        raise ValueError("a video without frames")
    return count


def read_video_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) of a video's upright frames in pixels.

    Raises:
        ValueError: the bytes are not a video, or its frames are too large.
    """
    frame = next(_iter_frames(data), None)
    if frame is None:
        raise ValueError("a video without frames")
    a, b, _, _ = _display_matrix(frame)
    return (frame.height, frame.width) if abs(b) > abs(a) else (frame.width, frame.height)


@contextlib.contextmanager
def _open_video(data: bytes) -> Iterator[tuple[Any, Any]]:
    """Open a video within size limits, and translate FFmpeg's errors to ValueError."""
    import av

    try:
        with containers.open_container(data) as container:
            stream = containers.first_stream(container.streams.video, "no video in the file")
            if stream.width * stream.height > MAX_PIXELS:
                raise ValueError(f"frames of more than {MAX_PIXELS // 10**6} million pixels")
            # A worker has one core, and several threads would compete for it.
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(f"not a video that can be read ({error.strerror})") from None


def _iter_frames(data: bytes) -> Iterator[Any]:
    """Decoded frames, one at a time."""
    with _open_video(data) as (container, stream):
        for count, frame in enumerate(container.decode(stream)):
            if count == MAX_FRAMES_READ:
                raise ValueError(TOO_LONG)
            if frame.width * frame.height > MAX_PIXELS:  # the size may change between frames
                raise ValueError(f"frames of more than {MAX_PIXELS // 10**6} million pixels")
            yield frame


def sample_frames(
    frames: NDArray[np.uint8], count: int = FRAMES, size: int = SIZE, channels: int = GREY
) -> NDArray[np.uint8]:
    """Sample frames evenly, and make them square: uint8 (count, size, size, channels).

    The last frame is always sampled, because it shows the result of an action.

    Args:
        frames: uint8 (N, H, W, 1) or (N, H, W, 3), N at least 1.
        count: number of sampled frames.
        size: side of a frame in pixels.
        channels: 1 for grey, 3 for colour.
    """
    chosen = _sample_indices(len(frames), count)
    return np.stack([_crop_square(frames[i], size, channels) for i in chosen])


def convert_frames(
    frames: Any, count: int = FRAMES, size: int = SIZE, channels: int = GREY
) -> NDArray[np.uint8]:
    """Convert frames in memory as :func:`load_video_frames` does, uint8 (count, size, size, C).

    Args:
        frames: uint8 (N, H, W, 1) or (N, H, W, 3).
        count: number of sampled frames.
        size: side of a frame in pixels.
        channels: 1 for grey, 3 for colour.

    Raises:
        ValueError: another type or shape, or too many or too large frames.
    """
    array = np.asarray(frames)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3):
        raise ValueError(
            f"frames are {array.dtype} {array.shape}, expected uint8 (N, H, W, 1) or (N, H, W, 3)"
        )
    if not array.size:
        raise ValueError("a video without frames")
    if len(array) > MAX_FRAMES_READ:
        raise ValueError(TOO_LONG)
    return sample_frames(array, count, size, channels)


def load_video_frames(
    data: bytes, count: int = FRAMES, size: int = SIZE, channels: int = GREY
) -> NDArray[np.uint8]:
    """Decode the frames of a video file that :func:`sample_frames` would sample.

    All frames are decoded, because later frames depend on them, but memory holds only one. Frames
    are rotated by the file's display matrix, because smartphones store the image of the sensor
    together with the orientation of the device.

    Args:
        data: bytes of the file.
        count: number of sampled frames.
        size: side of a frame in pixels.
        channels: 1 for grey, 3 for colour.

    Returns:
        uint8 (count, size, size, channels).

    Raises:
        ValueError: the bytes are not a video, it is truncated, or its frames are too many or too
            large.
    """
    expected = count_frames(data)
    decoded, sampled = _decode_sampled(data, expected, count, size, channels)
    if decoded != expected:
        # Some packets hold no visible frame. After one pass the number of frames is known.
        if decoded < 0.9 * expected - 2:
            raise ValueError(CUT_SHORT)
        decoded, sampled = _decode_sampled(data, decoded, count, size, channels)
    return np.stack(sampled)


def _decode_sampled(
    data: bytes, length: int, count: int, size: int, channels: int
) -> tuple[int, list[NDArray[np.uint8]]]:
    """Return the number of frames, and the square frames sampled from ``length``."""
    from av.video.reformatter import VideoReformatter

    indices = _sample_indices(length, count)
    sampled: list[NDArray[np.uint8]] = []
    decoded = 0
    pixels: Any = None
    reformatter = VideoReformatter()  # one object for all frames, because it caches its tables
    for frame in _iter_frames(data):
        while len(sampled) < count and indices[len(sampled)] == decoded:
            same = len(sampled) > 0 and indices[len(sampled) - 1] == decoded
            if not same:
                pixels = reformatter.reformat(frame, format="rgb24").to_ndarray()
            sampled.append(
                sampled[-1] if same else rotate_upright(frame, _crop_square(pixels, size, channels))
            )
        decoded += 1
    if not decoded:
        raise ValueError("a video without frames")
    return decoded, sampled


def _sample_indices(length: int, count: int) -> list[int]:
    """Return the indices of ``count`` frames, evenly spaced, among ``length``."""
    chosen = np.ceil(np.arange(1, count + 1) * length / count).astype(int) - 1
    return [max(index, 0) for index in chosen.tolist()]


def _crop_square(frame: NDArray[np.uint8], size: int, channels: int) -> NDArray[np.uint8]:
    """Return the centre square of a frame, uint8 (size, size, channels)."""
    from PIL import Image

    image = Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame)
    image = image.convert("L" if channels == GREY else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    if side != size:
        square = square.resize((size, size), Image.Resampling.BOX if side > size else 3)
    return np.asarray(square).reshape(size, size, channels)


def rotate_upright(frame: Any, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Rotate and mirror the pixels (H, W, C) of a PyAV frame by its display matrix.

    Args:
        frame: PyAV frame.
        pixels: colours, uint8 (H, W, 3).
    """
    a, b, c, d = _display_matrix(frame)
    if abs(b) > abs(a):  # a quarter turn: rightward becomes downward or upward
        pixels, right, down = pixels.swapaxes(0, 1), c, b
    else:
        right, down = a, d
    return pixels[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """Return (a, b, c, d) of the display matrix: pixel (x, y) is shown at (ax + cy, bx + dy)."""
    try:
        matrix = bytes(frame.side_data["DISPLAYMATRIX"])
    except (KeyError, ValueError):  # no matrix, or side data of a type unknown to PyAV
        return 1, 0, 0, 1
    if len(matrix) != 36:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    return a, b, c, d
