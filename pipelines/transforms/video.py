"""Clips to frames: so many of them, square, upright, grey; and drawing pen paths as clips."""

import contextlib
import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.transforms import containers

#: Count it up when a change of this file changes pixels that it makes of a file.
VERSION = 3
FRAMES = 8
SIZE = 32
#: Pen paths are drawn this many times larger and then reduced, for smooth edges.
SUPERSAMPLE = 4
#: Pen width as a share of the picture's side.
PEN = 0.055
#: Ten minutes at 30 frames a second.
MAX_FRAMES_READ = 18_000
TOO_LONG = f"more than {MAX_FRAMES_READ} frames"
#: Of a frame; 8K has 33 million.
MAX_PIXELS = 36 * 2**20
CUT_SHORT = "cut short: the file ends before its clip does"

#: A pen path: points (x, y) on a square of side 1, y downward.
PenPath = Sequence[tuple[float, float]]


def count_frames(data: bytes) -> int:
    """Number of frames of a video file, found without decoding them.

    Raises:
        ValueError: the bytes are no video, it is cut short, or one of too many or too large frames.
    """
    import av

    count, end = 0, 0.0
    with _opened(data) as (container, stream):
        said, seconds = stream.frames, (container.duration or 0) / av.time_base
        if said > MAX_FRAMES_READ:
            raise ValueError(TOO_LONG)
        with contextlib.suppress(av.FFmpegError):  # where it breaks off, it is cut
            for packet in container.demux():
                if packet.size and packet.stream is stream:
                    count += 1
                if packet.pts is not None:
                    end = max(end, float(packet.pts * packet.time_base))
                if count > MAX_FRAMES_READ:
                    raise ValueError(TOO_LONG)
    if count < 0.95 * said - 1 or (not said and end < 0.95 * seconds - 0.5):
        raise ValueError(CUT_SHORT)
    if not count:
        raise ValueError("a video without frames")
    return count


def read_video_size(data: bytes) -> tuple[int, int]:
    """(Width, height) of a video file's frames in pixels, as they are shown.

    Raises:
        ValueError: the bytes are no video, or one of too large frames.
    """
    frame = next(_frames(data), None)
    if frame is None:
        raise ValueError("a video without frames")
    a, b, _, _ = _display(frame)
    return (frame.height, frame.width) if abs(b) > abs(a) else (frame.width, frame.height)


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[tuple[Any, Any]]:
    """The container and the stream of a video, its sizes within limits. FFmpeg's errors become
    ours."""
    import av

    try:
        with containers.open_container(data) as container:
            stream = containers.first_stream(container.streams.video, "no pictures in the file")
            if stream.width * stream.height > MAX_PIXELS:
                raise ValueError(f"frames of more than {MAX_PIXELS // 10**6} million pixels")
            # A worker has a core of its own: more threads only get in each other's way.
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.FFmpegError as problem:
        raise ValueError(f"not a video that can be read ({problem.strerror})") from None


def _frames(data: bytes) -> Iterator[Any]:
    """Decoded frames, one at a time."""
    with _opened(data) as (container, stream):
        for count, frame in enumerate(container.decode(stream)):
            if count == MAX_FRAMES_READ:
                raise ValueError(TOO_LONG)
            if frame.width * frame.height > MAX_PIXELS:  # it may change on the way
                raise ValueError(f"frames of more than {MAX_PIXELS // 10**6} million pixels")
            yield frame


def sample_frames(
    frames: NDArray[np.uint8], count: int = FRAMES, size: int = SIZE
) -> NDArray[np.uint8]:
    """Take ``count`` frames evenly, make them square and grey: uint8 (count, size, size, 1).

    The last frame is always taken: what happens by the end of a clip is seen.

    Args:
        frames: uint8 (N, H, W, 1) or (N, H, W, 3), N at least 1.
    """
    return np.stack([_square(frames[i], size) for i in _chosen(len(frames), count)])[..., None]


def load_video_frames(data: bytes, count: int = FRAMES, size: int = SIZE) -> NDArray[np.uint8]:
    """A video file's bytes to uint8 (count, size, size, 1), as ``clip`` would choose them.

    Frames that are not taken are decoded, as later ones build on them, and dropped at once:
    memory holds one frame, however long the video is. They are turned as the file's display matrix
    says: telephones write what the sensor saw, and how they were held.

    Raises:
        ValueError: the bytes are no video, it is cut short, or one of too many or too large frames.
    """
    expected = count_frames(data)
    found, taken = _take(data, expected, count, size)
    if found != expected:
        # Some packets are no frames to be shown: now their number is known.
        if found < 0.9 * expected - 2:
            raise ValueError(CUT_SHORT)
        found, taken = _take(data, found, count, size)
    return np.stack(taken)[..., None]


def _take(data: bytes, length: int, count: int, size: int) -> tuple[int, list[NDArray[np.uint8]]]:
    """The number of frames, and those chosen of ``length``, made square and grey."""
    from av.video.reformatter import VideoReformatter

    wanted = _chosen(length, count)
    taken: list[NDArray[np.uint8]] = []
    found = 0
    pixels: Any = None
    colours = VideoReformatter()  # one for all frames: it keeps its tables
    for frame in _frames(data):
        while len(taken) < count and wanted[len(taken)] == found:
            same = len(taken) > 0 and wanted[len(taken) - 1] == found
            if not same:
                pixels = colours.reformat(frame, format="rgb24").to_ndarray()
            taken.append(taken[-1] if same else rotate_upright(frame, _square(pixels, size)))
        found += 1
    if not found:
        raise ValueError("a video without frames")
    return found, taken


def _chosen(length: int, count: int) -> list[int]:
    """Which of ``length`` frames are taken."""
    chosen = np.ceil(np.arange(1, count + 1) * length / count).astype(int) - 1
    return [max(index, 0) for index in chosen.tolist()]


def _square(frame: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The middle of a frame, grey: uint8 (size, size)."""
    from PIL import Image

    image = Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame).convert("L")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    if side != size:
        square = square.resize((size, size), Image.Resampling.BOX if side > size else 3)
    return np.asarray(square)


def rotate_upright(frame: Any, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels (H, W) of a frame of PyAV's, turned and mirrored as it is to be shown."""
    a, b, c, d = _display(frame)
    if abs(b) > abs(a):  # a quarter turn: what ran to the right runs downward, or upward
        pixels, right, down = pixels.T, c, b
    else:
        right, down = a, d
    return pixels[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]


def _display(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d) of the display matrix: pixel (x, y) is shown at (ax + cy, bx + dy)."""
    try:
        matrix = bytes(frame.side_data["DISPLAYMATRIX"])
    except (KeyError, ValueError):  # none; or beside data that PyAV has no name for
        return 1, 0, 0, 1
    if len(matrix) != 36:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    return a, b, c, d


def draw_pen_paths(
    paths: Sequence[PenPath], count: int = FRAMES, size: int = SIZE
) -> NDArray[np.uint8]:
    """Film pen paths being written, white on black: uint8 (count, size, size, 1).

    Frame i shows the paths up to the share (i + 1) / count of their total length. Moves with
    the pen lifted take no time.

    Raises:
        ValueError: there is no path of any length.
    """
    from PIL import Image, ImageDraw

    pieces = [(a, b) for path in paths for a, b in pairwise(path)]
    lengths = np.array([np.hypot(b[0] - a[0], b[1] - a[1]) for a, b in pieces])
    total = float(lengths.sum()) if pieces else 0.0
    if total <= 0:
        raise ValueError("no pen path to draw")
    side = size * SUPERSAMPLE
    canvas = Image.new("L", (side, side))
    pen = _Pen(ImageDraw.Draw(canvas), side)
    ends = np.cumsum(lengths)
    frames, current = [], 0
    for index in range(count):
        until = total * (index + 1) / count
        while current < len(pieces) and ends[current] <= until * (1 + 1e-12):
            pen.line(*pieces[current])
            current += 1
        if current < len(pieces):
            start = ends[current] - lengths[current]
            if until > start:
                (ax, ay), (bx, by) = pieces[current]
                share = (until - start) / lengths[current]
                pen.line((ax, ay), (ax + share * (bx - ax), ay + share * (by - ay)))
        frames.append(np.asarray(canvas.reduce(SUPERSAMPLE)))
    return np.stack(frames)[..., None]


class _Pen:
    """Draws round-ended lines given on the unit square."""

    def __init__(self, canvas: Any, side: int) -> None:
        self.canvas, self.side, self.width = canvas, side, max(1, round(PEN * side))

    def line(self, a: tuple[float, float], b: tuple[float, float]) -> None:
        ends = [(x * self.side, y * self.side) for x, y in (a, b)]
        self.canvas.line(ends, fill=255, width=self.width)
        radius = self.width / 2
        for x, y in ends:
            box = (x - radius, y - radius, x + radius, y + radius)
            self.canvas.ellipse(box, fill=255)
