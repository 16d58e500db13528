"""Corpus ``strokes``: videos of Chinese characters being written, with their stroke names in order.

The videos are rendered from the pen paths of hanzi-writer. The caption joins the stroke names.
Characters with the same sequence form one group, because each is a correct answer to the caption.
A group lies in one split.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.data.corpora.base import (
    Archive,
    Corpus,
    RejectedRow,
    Row,
    SourceArchives,
    stable_hash,
)
from pipelines.data.shards.format import tensor_field
from pipelines.data.transforms import text, video
from pipelines.data.transforms.decode_guard import decode_each
from skillnet_corpora.archives import iter_archive, read_archive
from skillnet_corpora.demo import CNCHAR_DATA, IdAllocator
from skillnet_platform.errors import UserError

#: Numbers of characters in the evaluated splits.
TEST, VALIDATION = 1_000, 400
CAPTION_TOKENS = 64
#: Coordinates of the data: x from 0 to 1024, y upward from -124 to 900.
SIDE, TOP = 1024.0, 900.0

CNCHAR_ORDER = Archive(
    "cnchar-order-3.2.6.tgz",
    71_063,
    "98112307108d5815203d6eeafae05fac332f2040433f006782e305e96e729d58",
    "npm",
    "cnchar-order@3.2.6",
    "MIT",
)
#: JSON literals in the minified script of cnchar-order.
_LITERAL = re.compile(r"JSON\.parse\('((?:[^'\\]|\\.)*)'\)")
#: Pen paths are drawn this many times larger and then reduced, for smooth edges.
SUPERSAMPLE = 4
#: Pen width as a fraction of the frame's side.
PEN = 0.055
#: Points (x, y) of a pen path on a square of side 1, y downward.
PenPath = Sequence[tuple[float, float]]


class StrokesCorpus(Corpus):
    """Videos of characters being written, with one caption each."""

    name = "strokes"
    modality = "video"
    task = "text_to_video"
    archives = (CNCHAR_DATA, CNCHAR_ORDER)
    raw_schema = pa.schema(
        [
            # Points of all paths as x, y, x, y …, and how many points each path has.
            ("points", pa.list_(pa.int16())),
            ("counts", pa.list_(pa.int16())),
            ("captions", pa.list_(pa.string())),
        ]
    )
    columns = pa.schema(
        [
            tensor_field("frames", pa.uint8(), (video.FRAMES, video.SIZE, video.SIZE, 1)),
            pa.field("captions", pa.list_(pa.string())),
            pa.field("caption_tokens", pa.list_(pa.list_(pa.int32()))),
        ]
    )
    omitted_columns: ClassVar = {"pretrain": frozenset({"captions", "caption_tokens"})}
    text_columns: tuple[str, ...] = ("captions",)
    #: One token per stroke: a name such as 横折钩 is one movement, not three.
    terms: ClassVar[tuple[str, ...]] = (
        "横折折折钩", "横折折撇", "横折折折", "横斜钩", "横折钩", "横折提", "竖折撇", "竖折折钩",
        "竖弯钩", "横折折", "横折", "横撇", "竖弯", "竖钩", "竖提", "撇折", "撇点", "弯钩", "斜钩",
    )  # fmt: skip
    shard_rows = 512

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield characters in the order of the archive; without stroke names, for pretraining."""
        captions = _captions(sources)
        group_ids = IdAllocator()
        found = []
        for name, data in iter_archive(sources, "cnchar-data", "package/draw/", ".json"):
            if len(name) == 1:
                found.append((name, json.loads(data)["medians"]))
        # Only characters whose pen paths agree with the stroke order get a caption.
        named = {
            name: "、".join(captions[name])
            for name, paths in found
            if name in captions and len(captions[name]) == len(paths)
        }
        split = _split(named)
        for name, paths in found:
            caption = named.get(name)
            if not paths:
                yield RejectedRow(name, "no pen path")
                continue
            yield {
                "split": split[name] if caption else "pretrain",
                "key": name,
                "group": group_ids(caption) if caption else -1,
                "unit": caption,
                "points": [value for path in paths for point in path for value in point],
                "counts": [len(path) for path in paths],
                "captions": [caption] if caption else [],
            }

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """Return frames and tokens."""
        captions = block["captions"].to_pylist()
        frames, rejected = render_clips(block)
        return pa.table(
            {
                "frames": frames,
                "captions": block["captions"],
                "caption_tokens": text.encode_captions(tokenizer, captions, CAPTION_TOKENS),
                "rejected": rejected,
            }
        )

    def preprocessing(self) -> dict[str, Any]:
        """Return the sizes of the videos and of the splits."""
        return {
            "frames": video.FRAMES,
            "size": video.SIZE,
            "supersample": SUPERSAMPLE,
            "pen": PEN,
            "test": TEST,
            "validation": VALIDATION,
            "caption_tokens": CAPTION_TOKENS,
            "split_by": "stroke sequence",
        }


def render_clips(block: pa.Table) -> tuple[pa.Array, pa.Array]:
    """Render the videos of a block of raw rows.

    Returns:
        Frames, flat per row; and the reason of each row that cannot be rendered, else null.
    """
    size = video.FRAMES * video.SIZE * video.SIZE
    rendered = np.zeros((block.num_rows, size), np.uint8)
    rejected: list[str | None] = []
    rows = zip(block["points"].to_pylist(), block["counts"].to_pylist(), strict=True)
    for frames, reason in decode_each(rows, lambda row: draw_pen_paths(_paths(*row))):
        if frames is not None:
            rendered[len(rejected)] = frames.reshape(-1)
        rejected.append(reason)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rendered.reshape(-1)), size)
    return column, pa.array(rejected, pa.string())


def _captions(sources: SourceArchives) -> dict[str, list[str]]:
    """Return character -> names of its strokes in order."""
    script = read_archive(sources, "cnchar-order", "package/cnchar.order.min.js").decode("utf-8")
    tables = [json.loads(found) for found in _LITERAL.findall(script)]
    if len(tables) != 2:
        path = sources.path("cnchar-order")
        raise UserError(
            f"{path}: expected two tables of stroke orders, found {len(tables)}. Check that it is "
            "the pinned version of the archive."
        )
    letters, strokes = tables
    # "点2" is a dot to the left. "竖折撇|竖折折" are two names of one stroke; the first is used.
    names = {letter: entry["name"].split("|")[0].rstrip("2") for letter, entry in strokes.items()}
    return {char: [names[letter] for letter in order] for char, order in letters.items()}


def _split(named: dict[str, str]) -> dict[str, str]:
    """Return character -> split; characters of one sequence stay together."""
    # Groups are assigned in a random but fixed order until the splits are full.
    by_caption = defaultdict(list)
    for char, caption in named.items():
        by_caption[caption].append(char)
    ordered = sorted(by_caption, key=lambda caption: stable_hash("strokes", caption))
    split = dict.fromkeys(named, "train")
    taken = 0
    for caption in ordered:
        name = "test" if taken < TEST else "validation"
        if taken + len(by_caption[caption]) > TEST and taken < TEST:
            continue  # the test has exactly 1,000 characters, so a larger group is skipped
        if taken >= TEST + VALIDATION:
            break
        split |= dict.fromkeys(by_caption[caption], name)
        taken += len(by_caption[caption])
    return split


def _paths(points: list[int], counts: list[int]) -> list[list[tuple[float, float]]]:
    pairs = [(x / SIDE, (TOP - y) / SIDE) for x, y in zip(points[::2], points[1::2], strict=True)]
    paths, start = [], 0
    for count in counts:
        paths.append(pairs[start : start + count])
        start += count
    return paths


def draw_pen_paths(
    paths: Sequence[PenPath], count: int = video.FRAMES, size: int = video.SIZE
) -> NDArray[np.uint8]:
    """Render a video of pen paths being written, white on black.

    Frame i shows the paths up to the fraction (i + 1) / count of their total length. Moves with the
    pen lifted take no time.

    Args:
        paths: pen paths in their order.
        count: number of frames.
        size: side of a frame in pixels.

    Returns:
        uint8 (count, size, size, 1).

    Raises:
        ValueError: no path has a length.
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
    """Pen for lines with round ends on the unit square."""

    def __init__(self, canvas: Any, side: int) -> None:
        self.canvas, self.side, self.width = canvas, side, max(1, round(PEN * side))

    def line(self, a: tuple[float, float], b: tuple[float, float]) -> None:
        ends = [(x * self.side, y * self.side) for x, y in (a, b)]
        self.canvas.line(ends, fill=255, width=self.width)
        radius = self.width / 2
        for x, y in ends:
            box = (x - radius, y - radius, x + radius, y + radius)
            self.canvas.ellipse(box, fill=255)
