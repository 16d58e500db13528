"""Corpus ``stamps``: captioned photographs and drawings of Tux Paint, with their topics.

A stamp is a picture with a text file of captions in up to 78 languages, and spoken captions in some
of them. The pictures are cut out, and their folders name 16 topics. All corpora of stamps hold out
the same units. Stamps are variants of a unit if a caption is equal in one of twelve languages, or
if their names start with the same word in one folder: ``frog``, ``frog-1``. A number is no word, so
coins and digits of a folder form one unit. A mirrored copy is no row.

:class:`StampsCorpus` is the entry point; ``stamps_spoken`` and ``stamps_texts`` use
:func:`read_stamps`.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, ClassVar

import pyarrow as pa

from pipelines.data.corpora.base import Archive, Corpus, RejectedRow, Row, SourceArchives
from pipelines.data.shards.format import tensor_field
from pipelines.data.transforms import image, text
from skillnet_corpora.archives import iter_members
from skillnet_corpora.demo import IdAllocator
from skillnet_corpora.demo.drawings import draw_pictures
from skillnet_corpora.study.variant_units import describe_units, divide_units, join_variants

STAMPS = Archive(
    "tuxpaint-stamps-default_2025.03.31-1_all.deb",
    80_872_956,
    "6312d03a37d0220b10fc91a7467bf2a2a2336e08c2f416de04311d25fd7aeacb",
    "debian",
    "tuxpaint-stamps-default=2025.03.31-1",
    "GPL-2 or later (Tux Paint stamps, Bill Kendrick and contributors)",
    source="tuxpaint-stamps",
)
FOLDER = "./usr/share/tuxpaint/stamps/"
#: Folders of the package: names of the labels 0 … 15.
TOPICS = (
    "animals", "clothes", "food", "hobbies", "household", "medical", "military", "naturalforces",
    "people", "plants", "seasonal", "space", "sports", "symbols", "town", "vehicles",
)  # fmt: skip
CHINESE, ENGLISH = "zh_CN", "en"
#: Languages with at least 300 spoken captions: Belarusian, Bulgarian, Catalan, Danish, Greek,
#: Spanish, French, Norwegian (Nynorsk), Romanian, Russian.
LANGUAGES = ("be", "bg", "ca", "da", "el", "es", "fr", "nn", "ro", "ru")
WRITTEN = (CHINESE, ENGLISH, *LANGUAGES)
SPLIT_BY = "stamps with an equal caption, or an equal first word in a folder"
NO_CHINESE = "no caption in Chinese"
#: Name of a spoken caption: stamp, and language unless it is English.
SPOKEN_FILE = re.compile(r"(.+)_desc(?:_([A-Za-z_]+))?\.(?:ogg|wav)")
#: Bytes of the header of an Ogg page after its mark (RFC 3533).
_HEADER_BYTES = 23
#: Letters that are mirrored copies of each other.
_MIRRORED = frozenset("bdpq")
#: Folders with one drawing in several colours or with several expressions.
_VARIANTS = frozenset({"symbols/faces", "town/flags"})


@dataclass(frozen=True)
class Stamp:
    """Captions and place of a stamp.

    Args:
        key: path in the package without extension: "animals/birds/crow".
        captions: language -> caption; the first line of a text file is English.
        unit: key of the first variant.
        split: split of the unit.
        group: number of the Chinese caption, or -1.
    """

    key: str
    captions: dict[str, str]
    unit: str
    split: str
    group: int

    @property
    def label(self) -> int:
        """Position of its topic in ``TOPICS``."""
        return TOPICS.index(self.key.partition("/")[0])

    def start_row(self, key: str) -> Row:
        """Return the columns of a row that all corpora of stamps have.

        Args:
            key: key of the row.
        """
        return {
            "split": self.split,
            "key": key,
            "unit": self.unit,
            "english": self.captions[ENGLISH],
        }


class StampsCorpus(Corpus):
    """Cut-out pictures with a Chinese and an English caption, and with their topic."""

    name = "stamps"
    modality = "image"
    task = "text_to_image"
    archives: ClassVar[tuple[Archive, ...]] = (STAMPS,)
    raw_schema = pa.schema(
        [
            ("image", pa.binary()),
            ("captions", pa.list_(pa.string())),
            ("english", pa.string()),
            ("label", pa.int32()),
        ]
    )
    columns = pa.schema(
        [
            tensor_field("pixels", pa.uint8(), (image.SIZE, image.SIZE, 3)),
            pa.field("captions", pa.list_(pa.string())),
            pa.field("caption_tokens", pa.list_(pa.list_(pa.int32()))),
            pa.field("english", pa.string()),
            pa.field("label", pa.int32()),
        ]
    )
    text_columns = ("captions",)
    shard_rows = 512

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield the pictures in the order of the package."""
        stamps = read_stamps(sources)
        files = iter_members(sources.path("tuxpaint"), _is_picture)
        for path, data in files:
            file = path.removeprefix(FOLDER)
            stamp = stamps.get(file[:-4])
            if stamp is None and file[:-4].endswith("_mirror"):
                yield RejectedRow(file, "a mirrored copy of a picture")
            elif file.endswith(".svg"):
                yield RejectedRow(file, "an SVG of a picture that is read as PNG")
            elif stamp is None or CHINESE not in stamp.captions:
                yield RejectedRow(file, NO_CHINESE)
            else:
                yield stamp.start_row(stamp.key) | {
                    "group": stamp.group,
                    "image": data,
                    "captions": [stamp.captions[CHINESE]],
                    "label": stamp.label,
                }

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """Return pixels and tokens; a picture that cannot be decoded is rejected."""
        pixels, rejected = draw_pictures(block)
        captions = block["captions"].to_pylist()
        return pa.table(
            {
                "pixels": pixels,
                "captions": block["captions"],
                "caption_tokens": text.encode_captions(tokenizer, captions),
                "english": block["english"],
                "label": block["label"],
                "rejected": rejected,
            }
        )

    def preprocessing(self) -> dict[str, Any]:
        """Return the sizes of the pictures and of the splits."""
        return {
            "size": image.SIZE,
            "margin": "cut off",
            "caption_tokens": text.CAPTION_TOKENS,
            "split_by": SPLIT_BY,
            **describe_units(),
        }

    def facts(self) -> dict[str, Any]:
        """Return the names of the topics."""
        return {"labels": list(TOPICS)}


def read_stamps(sources: SourceArchives) -> dict[str, Stamp]:
    """Return key -> stamp, in the order of the package.

    Args:
        sources: the verified package.
    """
    captions: dict[str, dict[str, str]] = {}
    files = defaultdict(list)
    for path, data in iter_members(sources.path("tuxpaint"), lambda p: p.startswith(FOLDER)):
        file = path.removeprefix(FOLDER)
        if file.endswith(".txt"):
            captions[file[:-4]] = parse_captions(data)
        elif spoken := SPOKEN_FILE.fullmatch(file):
            files[spoken[1]].append(_hash_pages(data))
    # One recording may serve two stamps: "letter a" is also said of its sign.
    marks = {key: [*_list_marks(key, each), *files[key]] for key, each in captions.items()}
    units = join_variants(marks)
    split = divide_units("stamps", units)
    number = IdAllocator()
    return {
        key: Stamp(
            key,
            each,
            units[key],
            split[units[key]],
            number(each[CHINESE]) if CHINESE in each else -1,
        )
        for key, each in captions.items()
    }


def parse_captions(data: bytes) -> dict[str, str]:
    """Return language -> caption of a text file.

    Args:
        data: a line in English, then lines such as ``fr.utf8=Un corbeau.``
    """
    first, _, rest = data.decode("utf-8", "replace").partition("\n")
    found = {ENGLISH: first.strip()}
    for line in rest.split("\n"):
        language, marker, caption = line.partition(".utf8=")
        if marker and caption.strip():
            found[language.strip()] = caption.strip()
    return found


def _list_marks(key: str, captions: dict[str, str]) -> list[str]:
    folder, _, name = key.rpartition("/")
    found = re.match("[a-z]*", "" if folder in _VARIANTS else name.lower())
    word = found[0] if found else ""
    spoken = (captions[language] for language in WRITTEN if language in captions)
    said = {re.sub(r"\W+", " ", each.casefold()).strip() for each in spoken}
    letters = ["letters b, d, p, q"] if word in _MIRRORED else []
    return [f"{folder}/{word}", *letters, *(f"caption:{each}" for each in sorted(said))]


def _hash_pages(data: bytes) -> str:
    """Return a digest of an Ogg file without the headers of its pages, which differ in copies."""
    start, *pages = data.split(b"OggS")
    return sha256(start + b"".join(page[_HEADER_BYTES:] for page in pages)).hexdigest()


def _is_picture(path: str) -> bool:
    return path.startswith(FOLDER) and path.endswith((".png", ".svg"))
