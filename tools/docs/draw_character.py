"""``python -m tools.docs.draw_character``: draw the video that ``examples/skills.sh`` predicts.

The video shows 林 (forest) being written with straight lines of our own, in frames like those of
the corpus ``strokes``: frame i shows the first (i + 1) / 8 of the pen's path, white on black.
"""

from pathlib import Path

import av
from PIL import Image, ImageDraw

TARGET = Path("examples/forest.mp4")
#: Frames per video and per second, and pixels per side for each point of the plan below.
FRAMES, RATE, SCALE = 8, 4, 4
SIDE = 32
#: Strokes as lines (x, y) to (x, y), in the order of writing: twice 木.
STROKES = [
    ((2, 11), (15, 9)),
    ((9, 1), (9, 28)),
    ((8, 12), (1, 24)),
    ((10, 12), (13, 16)),
    ((16, 11), (28, 8)),
    ((21, 1), (20, 30)),
    ((20, 12), (12, 23)),
    ((21, 12), (30, 22)),
]


def draw_frames() -> list[Image.Image]:
    """Return the frames of the video, the whole character last."""
    lengths = [abs(x - u) + abs(y - v) for (x, y), (u, v) in STROKES]
    frames = []
    for number in range(1, FRAMES + 1):
        frame = Image.new("RGB", (SCALE * SIDE, SCALE * SIDE))
        pen, left = ImageDraw.Draw(frame), sum(lengths) * number / FRAMES
        for ((x, y), (u, v)), length in zip(STROKES, lengths, strict=True):
            part = min(max(left / length, 0.0), 1.0)
            if part:
                line = [x, y, x + part * (u - x), y + part * (v - y)]
                pen.line([SCALE * each for each in line], fill="white", width=2 * SCALE)
            left -= length
        frames.append(frame)
    return frames


def main() -> int:
    """Write the video."""
    with av.open(TARGET, mode="w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width = stream.height = SCALE * SIDE
        stream.pix_fmt = "yuv420p"
        for frame in draw_frames():
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
