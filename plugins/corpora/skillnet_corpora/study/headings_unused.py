"""Corpus ``headings_unused``: the task of ``headings``, with the headings that it rejects for room.

The classification has 16,950 headings of full classes and 5,331 of one or two characters. They need
no download. A heading of a subtree that ``headings`` evaluates joins the evaluation of that split,
with its label. All others are unlabelled text for pretraining. So no subtree is in two splits, and
training never reads a subtree that either corpus evaluates.
"""

import json
from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa

from pipelines.data.corpora.base import RejectedRow, Row, SourceArchives
from pipelines.data.transforms import text
from skillnet_corpora.archives import read_archive
from skillnet_corpora.demo.headings import (
    CLASS_FULL,
    CLASSIFICATION,
    LABEL_OF,
    TOO_SHORT,
    TREE,
    HeadingsCorpus,
    find_ancestor,
    find_subtree,
    select_headings,
)
from skillnet_corpora.study.further_splits import MORE


class UnusedHeadingsCorpus(HeadingsCorpus):
    """Headings of ``headings`` in their splits, and the unused ones for pretraining and testing."""

    name = "headings_unused"
    archives = (CLASSIFICATION,)
    version = 1
    raw_schema = pa.schema([f for f in HeadingsCorpus.raw_schema if f.name != "captions"])
    columns = pa.schema([f for f in HeadingsCorpus.columns if not f.name.startswith("caption")])
    omitted_columns: ClassVar = {"pretrain": frozenset({"label"})}
    text_columns = ("text",)

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield headings in the order of the tree."""
        tree = json.loads(read_archive(sources, "chinese_library", TREE))
        found = list(select_headings(tree))
        # Subtree -> its split in ``headings``.
        split = {row["unit"]: row["split"] for row in found if not isinstance(row, RejectedRow)}
        seen: set[str] = set()
        for item in found:
            if not isinstance(item, RejectedRow):
                yield {key: value for key, value in item.items() if key != "captions"}
            elif item.reason == TOO_SHORT or item.reason.startswith(CLASS_FULL):
                code = item.key.removeprefix("heading/")
                yield _place(item, tree, code, split, seen)
            else:
                yield item

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """Return the tokens of each heading."""
        tokens = text.encode_texts(tokenizer, block["text"].to_pylist(), text.TEXT_TOKENS)
        return pa.table({"text": block["text"], "tokens": tokens, "label": block["label"]})

    def preprocessing(self) -> dict[str, Any]:
        """Return the numbers of ``headings`` and its version."""
        return super().preprocessing() | {"headings_version": HeadingsCorpus.version}


def _place(
    item: RejectedRow, tree: dict[str, Any], code: str, split: dict[str, str], seen: set[str]
) -> Row | RejectedRow:
    """Return the row of a heading that ``headings`` rejects for room, or why it stays rejected."""
    subtree = find_subtree(tree, code)
    home = split.get(subtree, "train")
    name = tree[code]["name"]
    if item.reason == TOO_SHORT:
        # One or two characters name no class reliably, so they are no test.
        if home != "train":
            return RejectedRow(item.key, "short heading of a subtree that is evaluated")
        if name in seen:
            return RejectedRow(item.key, "short heading repeated")
        seen.add(name)
    is_evaluated = home != "train"
    return {
        "split": home + MORE if is_evaluated else "pretrain",
        "key": item.key,
        "group": -1,
        "unit": subtree,
        "text": name,
        "label": LABEL_OF[find_ancestor(tree, code, 1)] if is_evaluated else None,
    }
