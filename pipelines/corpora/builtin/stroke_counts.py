"""Clips of characters being written, with the number of their strokes: a further task's corpus.

The clips and the split are those of ``strokes``: a character that is evaluated here was never
seen with its stroke names by a model trained on the other corpus, nor was any other character of
the same sequence. Counts are those on which the pen paths and the stroke order agree; Chinese
dictionaries are ordered by them.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa

from pipelines.corpora.base import RejectedRow, Row, SourceArchives
from pipelines.corpora.builtin.strokes import StrokesCorpus, render_clips

#: Rarer counts are one class at either end.
FEWEST, MOST = 3, 19

LABELS = (
    f"{FEWEST} strokes or fewer",
    *(f"{count} strokes" for count in range(FEWEST + 1, MOST)),
    f"{MOST} strokes or more",
)


class StrokeCountsCorpus(StrokesCorpus):
    """Clips, each labelled with the class of its number of strokes."""

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
        """The characters of ``strokes`` that have stroke names, in its order and split."""
        for row in super().rows(sources):
            if isinstance(row, RejectedRow):
                yield row
            elif row["split"] == "pretrain":
                yield RejectedRow(row["key"], "no stroke order that confirms the count")
            else:
                kept = {key: value for key, value in row.items() if key != "captions"}
                yield kept | {"label": stroke_count_class(len(row["counts"]))}

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """Frames and labels."""
        frames, rejected = render_clips(block)
        return pa.table({"frames": frames, "label": block["label"], "rejected": rejected})

    def preprocessing(self) -> dict[str, Any]:
        """Those of ``strokes``, its version, and the borders of the classes."""
        kept = {k: v for k, v in super().preprocessing().items() if k != "caption_tokens"}
        return kept | {"strokes_version": StrokesCorpus.version, "fewest": FEWEST, "most": MOST}

    def facts(self) -> dict[str, Any]:
        """Names of the labels."""
        return {"labels": list(LABELS)}


def stroke_count_class(strokes: int) -> int:
    """The class of a number of strokes, 0 … 16."""
    return min(max(strokes, FEWEST), MOST) - FEWEST
