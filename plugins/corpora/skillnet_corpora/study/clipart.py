"""Corpus ``clipart``: drawings of the Open Clip Art Library, labelled with their topic.

The folders of the package name 22 topics. Drawings with one title, one longest outline, or names
that differ by numbers and directions are a unit: copies, variants, or a series by one artist. The
rows of a unit beyond ``LARGEST_SERIES`` are rejected, as 1,375 stars differ by two numbers.
Drawings of topics that are small or no topic ("unsorted") have no label: pretraining reads them.
"""

import html
import re
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from typing import Any, ClassVar

import pyarrow as pa

from pipelines.data.corpora.base import (
    Archive,
    Corpus,
    RejectedRow,
    Row,
    SourceArchives,
    stable_hash,
)
from pipelines.data.shards.format import tensor_field
from pipelines.data.transforms import image
from skillnet_corpora.archives import iter_archive
from skillnet_corpora.demo.drawings import draw_pictures
from skillnet_corpora.study.variant_units import describe_units, divide_units, join_variants

CLIPART = Archive(
    "openclipart-svg_1%3a0.18+dfsg-19_all.deb",
    24_919_068,
    "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    "debian",
    "openclipart-svg=1:0.18+dfsg-19",
    "public domain (Open Clip Art Library)",
    source="openclipart",
)
FOLDER = "./usr/share/openclipart/svg/"
#: Drawings of a unit.
LARGEST_SERIES = 50
#: Topics with at least 60 drawings: names of the labels 0 … 11.
TOPICS = (
    "animals", "computer", "food", "geography", "office", "people", "plants",
    "recreation", "shapes", "signs_and_symbols", "tools", "transportation",
)  # fmt: skip

#: The first title is that of the drawing, and the next one that of the library.
_TITLE = re.compile(rb"<dc:title\s*(?:/>|>([^<]*)<)")
_SUBJECT = re.compile(rb"<dc:subject>(.*?)</dc:subject>", re.DOTALL)
_KEYWORD = re.compile(rb"<rdf:li>([^<]*)<")
_LICENCE = re.compile(rb'<cc:license\s+rdf:resource="([^"]*)"')
_OUTLINE = re.compile(rb'\sd\s*=\s*"([^"]*)"')
#: Shorter titles name no series, and shorter outlines, in characters, are a box or a line.
_SHORTEST_TITLE, _SHORTEST_OUTLINE = 3, 60
_DIRECTIONS = frozenset(("", "left", "right", "up", "down"))


class ClipartCorpus(Corpus):
    """Drawings with their topic, their title and their keywords."""

    name = "clipart"
    modality = "image"
    task = "clipart_topic"
    archives: ClassVar[tuple[Archive, ...]] = (CLIPART,)
    raw_schema = pa.schema(
        [
            ("image", pa.binary()),
            ("title", pa.string()),
            ("keywords", pa.list_(pa.string())),
            ("label", pa.int32()),
        ]
    )
    columns = pa.schema(
        [
            tensor_field("pixels", pa.uint8(), (image.SIZE, image.SIZE, 3)),
            *(field for field in raw_schema if field.name != "image"),
        ]
    )
    omitted_columns: ClassVar = {"pretrain": frozenset({"label"})}
    shard_rows = 512

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield the drawings in the order of the package, which is read twice."""
        marks = {}
        for key, data in iter_archive(sources, "openclipart", FOLDER, ".svg"):
            marks[key] = list_marks(key, data)
        units = join_variants(marks)
        split = divide_units("clipart", units)
        full = _list_surplus(units)
        for key, data in iter_archive(sources, "openclipart", FOLDER, ".svg"):
            topic, home = key.partition("/")[0], split[units[key]]
            if b"GPL" in b" ".join(_LICENCE.findall(data)):
                yield RejectedRow(key, "its metadata state another licence than the package")
            elif key in full:
                yield RejectedRow(key, f"its series has more than {LARGEST_SERIES} drawings")
            elif topic not in TOPICS and home != "train":
                yield RejectedRow(key, "no label, and its series is evaluated")
            else:
                subject = _SUBJECT.search(data)
                words = map(_clean, _KEYWORD.findall(subject[1]) if subject else [])
                yield {
                    "split": home if topic in TOPICS else "pretrain",
                    "key": key,
                    "group": -1,
                    "unit": units[key],
                    "image": data,
                    "title": read_title(data),
                    "keywords": list(dict.fromkeys(word for word in words if word)),
                    "label": TOPICS.index(topic) if topic in TOPICS else None,
                }

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """Return pixels; a drawing that cannot be drawn is rejected."""
        pixels, rejected = draw_pictures(block)
        made = block.select(["title", "keywords", "label"])
        return made.append_column("pixels", pixels).append_column("rejected", rejected)

    def preprocessing(self) -> dict[str, Any]:
        """Return the sizes of the drawings and of the splits."""
        return {
            "size": image.SIZE,
            "svg_scale": image.SVG_SCALE,
            "margin": "cut off",
            "largest_series": LARGEST_SERIES,
            "split_by": "title, longest outline, or name without numbers and directions",
            **describe_units(),
        }

    def facts(self) -> dict[str, Any]:
        """Return the names of the topics."""
        return {"labels": list(TOPICS)}


def list_marks(key: str, data: bytes) -> list[str]:
    """Return what a drawing shares with its variants.

    Args:
        key: its path in the package.
        data: content of the file.
    """
    title, name = simplify_title(read_title(data)), _simplify_name(key.rpartition("/")[2])
    outline = b" ".join(max(_OUTLINE.findall(data), key=len, default=b"").split())
    return [
        *([f"name:{name}"] if name else []),
        *([f"title:{title}"] if title else []),
        # Copies with other metadata or colours have the same longest outline.
        *([sha256(outline).hexdigest()] if len(outline) >= _SHORTEST_OUTLINE else []),
    ]


def read_title(data: bytes) -> str:
    """Return the title in the metadata of an SVG, or "".

    Args:
        data: content of the file.
    """
    found = _TITLE.search(data)
    return _clean(found[1] or b"") if found else ""


def simplify_title(title: str) -> str:
    """Return the words of a title, or "" if it names no series.

    Numbers and text in brackets are left out: they number the drawings of a series, or date it.

    Args:
        title: as its artist wrote it.
    """
    words = re.sub(r"[\W\d_]+", " ", re.sub(r"\(.*?\)", " ", title.lower())).strip()
    return words if len(words) >= _SHORTEST_TITLE else ""


def _simplify_name(name: str) -> str:
    """Return the words of a name without numbers and directions: mirrored arrows share them."""
    return " ".join(word for word in re.split(r"[\W\d_]+", name.lower()) if word not in _DIRECTIONS)


def _clean(found: bytes) -> str:
    return " ".join(html.unescape(found.decode("utf-8", "replace")).split())


def _list_surplus(units: dict[str, str]) -> set[str]:
    """Return the drawings of large units beyond a random but fixed selection."""
    surplus, count = set(), Counter[str]()
    for key in sorted(units, key=lambda key: stable_hash("clipart", key)):
        count[units[key]] += 1
        if count[units[key]] > LARGEST_SERIES:
            surplus.add(key)
    return surplus
