"""Chinese characters being written, with the names of their strokes in order.

What it is: pen paths of hanzi-writer's data, rendered, and a sentence joined from stroke names.
Characters with the same sequence are joint positives (one group), and on one side of a split.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from pipelines.corpora.archives import CNCHAR_DATA, Archive
from pipelines.corpora.base import (
    Corpus,
    IdAllocator,
    RejectedRow,
    Row,
    SourceArchives,
    stable_hash,
    tensor_field,
)
from pipelines.transforms import text, video
from pipelines.transforms.decode_guard import decode_each
from skillnet_platform.errors import UserError

TEST, VALIDATION = 1_000, 400
CAPTION_TOKENS = 64
#: The data's square: x from 0 to 1024, y upward from -124 to 900.
SIDE, TOP = 1024.0, 900.0

CNCHAR_ORDER = Archive(
    "cnchar-order-3.2.6.tgz",
    71_063,
    "98112307108d5815203d6eeafae05fac332f2040433f006782e305e96e729d58",
    "npm",
    "cnchar-order@3.2.6",
    "MIT",
)
_LITERAL = re.compile(r"JSON\.parse\('((?:[^'\\]|\\.)*)'\)")


class StrokesCorpus(Corpus):
    """Clips of characters being written, with one caption each."""

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
    #: One token a stroke: a name such as 横折钩 means one movement, not three.
    terms: ClassVar[tuple[str, ...]] = (
        "横折折折钩", "横折折撇", "横折折折", "横斜钩", "横折钩", "横折提", "竖折撇", "竖折折钩",
        "竖弯钩", "横折折", "横折", "横撇", "竖弯", "竖钩", "竖提", "撇折", "撇点", "弯钩", "斜钩",
    )  # fmt: skip
    shard_rows = 512

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Characters in the order of the archive; those without stroke names for pretraining."""
        captions = _captions(sources)
        number = IdAllocator()
        found = []
        for name, data in sources.members("cnchar-data", "package/draw/", ".json"):
            if len(name) == 1:
                found.append((name, json.loads(data)["medians"]))
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
                "group": number(caption) if caption else -1,
                "points": [value for path in paths for point in path for value in point],
                "counts": [len(path) for path in paths],
                "captions": [caption] if caption else [],
            }

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """Frames and tokens."""
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
        """Size of the clips and of the splits."""
        return {
            "frames": video.FRAMES,
            "size": video.SIZE,
            "supersample": video.SUPERSAMPLE,
            "pen": video.PEN,
            "test": TEST,
            "validation": VALIDATION,
            "caption_tokens": CAPTION_TOKENS,
            "split_by": "stroke sequence",
        }


def render_clips(block: pa.Table) -> tuple[pa.Array, pa.Array]:
    """The clips of a block of raw rows, and why a row cannot be drawn (null where it is)."""
    size = video.FRAMES * video.SIZE * video.SIZE
    drawn = np.zeros((block.num_rows, size), np.uint8)
    rejected: list[str | None] = []
    rows = zip(block["points"].to_pylist(), block["counts"].to_pylist(), strict=True)
    for clip, reason in decode_each(rows, lambda row: video.draw_pen_paths(_paths(*row))):
        if clip is not None:
            drawn[len(rejected)] = clip.reshape(-1)
        rejected.append(reason)
    frames = pa.FixedSizeListArray.from_arrays(pa.array(drawn.reshape(-1)), size)
    return frames, pa.array(rejected, pa.string())


def _captions(sources: SourceArchives) -> dict[str, list[str]]:
    """Character -> names of its strokes in order."""
    script = sources.read("cnchar-order", "package/cnchar.order.min.js").decode("utf-8")
    tables = [json.loads(found) for found in _LITERAL.findall(script)]
    if len(tables) != 2:
        path = sources.path("cnchar-order")
        raise UserError(f"{path}: expected two tables of stroke orders, found {len(tables)}")
    letters, strokes = tables
    # "点2" is a dot to the left; "竖折撇|竖折折" are two names of one letter: the first is taken.
    names = {letter: entry["name"].split("|")[0].rstrip("2") for letter, entry in strokes.items()}
    return {char: [names[letter] for letter in order] for char, order in letters.items()}


def _split(named: dict[str, str]) -> dict[str, str]:
    """Character -> split; characters of one sequence go together."""
    same = defaultdict(list)
    for char, caption in named.items():
        same[caption].append(char)
    ordered = sorted(same, key=lambda caption: stable_hash("strokes", caption))
    split = dict.fromkeys(named, "train")
    taken = 0
    for caption in ordered:
        home = "test" if taken < TEST else "validation"
        if taken + len(same[caption]) > TEST and taken < TEST:
            continue  # exactly 1,000: a larger group waits
        if taken >= TEST + VALIDATION:
            break
        split |= dict.fromkeys(same[caption], home)
        taken += len(same[caption])
    return split


def _paths(points: list[int], counts: list[int]) -> list[list[tuple[float, float]]]:
    pairs = [(x / SIDE, (TOP - y) / SIDE) for x, y in zip(points[::2], points[1::2], strict=True)]
    paths, start = [], 0
    for count in counts:
        paths.append(pairs[start : start + count])
        start += count
    return paths
