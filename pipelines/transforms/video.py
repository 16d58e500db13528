"""Clips to frames: a fixed number of them, square, grey; and drawing pen paths as clips."""

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

FRAMES = 8
SIZE = 32
#: Pen paths are drawn this many times larger and then reduced, for smooth edges.
SUPERSAMPLE = 4
#: Pen width as a share of the picture's side.
PEN = 0.055
MAX_FRAMES_READ = 4096

#: A pen path: points (x, y) on a square of side 1, y downward.
Path = Sequence[tuple[float, float]]


def decode_video(data: bytes) -> NDArray[np.uint8]:
    """Read an MP4 (or whatever FFmpeg reads) file: uint8 (N, H, W, 3), all frames.

    Raises:
        ValueError: the bytes are no video, or one of more than 4,096 frames.
    """
    import av

    try:
        with av.open(io.BytesIO(data), "r", metadata_errors="ignore") as container:
            if not container.streams.video:
                raise ValueError("no pictures in the file")
            frames = []
            for frame in container.decode(video=0):
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) > MAX_FRAMES_READ:
                    raise ValueError(f"more than {MAX_FRAMES_READ} frames")
    except av.FFmpegError as problem:
        raise ValueError(f"not a video that can be read ({problem.strerror})") from None
    if not frames:
        raise ValueError("a video without frames")
    return np.stack(frames)


def encode_video(frames: NDArray[np.uint8], rate: int = 4, scale: int = 4) -> bytes:
    """Write frames as an MP4 file, enlarged ``scale`` times: for showing them, and for tests.

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


def clip(frames: NDArray[np.uint8], count: int = FRAMES, size: int = SIZE) -> NDArray[np.uint8]:
    """Take ``count`` frames evenly, make them square and grey: uint8 (count, size, size, 1).

    The last frame is always taken: what happens by the end of a clip is seen.

    Args:
        frames: uint8 (N, H, W, 1) or (N, H, W, 3), N at least 1.
    """
    from PIL import Image

    chosen = np.ceil(np.arange(1, count + 1) * len(frames) / count).astype(int) - 1
    out = []
    for index in chosen:
        frame = frames[max(index, 0)]
        image = Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame).convert("L")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        if side != size:
            square = square.resize((size, size), Image.Resampling.BOX if side > size else 3)
        out.append(np.asarray(square))
    return np.stack(out)[..., None]


def load_clip(data: bytes, count: int = FRAMES, size: int = SIZE) -> NDArray[np.uint8]:
    """A video file's bytes to uint8 (count, size, size, 1).

    Raises:
        ValueError: the bytes are no video.
    """
    return clip(decode_video(data), count, size)


def draw_paths(paths: Sequence[Path], count: int = FRAMES, size: int = SIZE) -> NDArray[np.uint8]:
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
