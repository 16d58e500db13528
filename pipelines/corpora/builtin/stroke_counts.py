"""Corpus ``stroke_counts``: videos of characters being written, labelled with their stroke count.

It serves the task that a trained model is extended by. Videos and splits are those of ``strokes``.
A model trained on ``strokes`` therefore never saw an evaluated character with its stroke names, nor
another character of the same sequence. Pen paths and stroke order must agree on a count. Chinese
dictionaries are ordered by stroke counts.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa

from pipelines.corpora.base import RejectedRow, Row, SourceArchives
from pipelines.corpora.builtin.strokes import StrokesCorpus, render_clips

#: Smaller and larger counts are rare, so they form one class at each end.
FEWEST, MOST = 3, 19

LABELS = (
    f"{FEWEST} strokes or fewer",
    *(f"{count} strokes" for count in range(FEWEST + 1, MOST)),
    f"{MOST} strokes or more",
)


class StrokeCountsCorpus(StrokesCorpus):
    """Videos labelled with the class of their stroke count."""

    name = "stroke_counts"
    task = "stroke_count"
    version = 1
    raw_schema = pa.schema(
        [*(f for f in StrokesCorpus.raw_schema if f.name != "captions"), ("label", pa.int32())]
    )
    columns = pa.schema([StrokesCorpus.columns.field("frames"), pa.field("label", pa.int32())])
    omitted_columns: ClassVar = {}
    text_columns = ()
    terms = ()
    pretraining = ()

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield the characters of ``strokes`` that have stroke names, in its order and splits."""
        for row in super().rows(sources):
            if isinstance(row, RejectedRow):
                yield row
            elif row["split"] == "pretrain":
                yield RejectedRow(row["key"], "no stroke order that confirms the count")
            else:
                kept = {key: value for key, value in row.items() if key != "captions"}
                yield kept | {"label": stroke_count_class(len(row["counts"]))}

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """Return frames and labels."""
        frames, rejected = render_clips(block)
        return pa.table({"frames": frames, "label": block["label"], "rejected": rejected})

    def preprocessing(self) -> dict[str, Any]:
        """Return the numbers of ``strokes``, its version, and the borders of the classes."""
        kept = {k: v for k, v in super().preprocessing().items() if k != "caption_tokens"}
        return kept | {"strokes_version": StrokesCorpus.version, "fewest": FEWEST, "most": MOST}

    def facts(self) -> dict[str, Any]:
        """Return the names of the labels."""
        return {"labels": list(LABELS)}


def stroke_count_class(strokes: int) -> int:
    """Return the label 0 … 16 of a stroke count."""
    return min(max(strokes, FEWEST), MOST) - FEWEST
