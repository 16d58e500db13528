"""Corpus ``stroke_counts``: videos of characters being written, labelled with their stroke count.

Pen paths and stroke order must agree on a count. Chinese dictionaries are ordered by stroke counts.
"""

from typing import Any

from pipelines.data.corpora.base import Row, SourceArchives
from skillnet_corpora.study.labelled_strokes import ClipLabeller, LabelledStrokesCorpus

#: Smaller and larger counts are rare, so they form one class at each end.
FEWEST, MOST = 3, 19

LABELS = (
    f"{FEWEST} strokes or fewer",
    *(f"{count} strokes" for count in range(FEWEST + 1, MOST)),
    f"{MOST} strokes or more",
)


class StrokeCountsCorpus(LabelledStrokesCorpus):
    """Videos labelled with the class of their stroke count."""

    name = "stroke_counts"
    task = "stroke_count"
    version = 1
    labels = LABELS

    def build_labeller(self, sources: SourceArchives) -> ClipLabeller:
        """Return the function that counts the strokes of a row; it needs no archive."""
        return _label_count

    def preprocessing(self) -> dict[str, Any]:
        """Return the numbers of ``strokes``, its version, and the borders of the classes."""
        return super().preprocessing() | {"fewest": FEWEST, "most": MOST}


def _label_count(row: Row) -> int | str:
    if row["split"] == "pretrain":
        return "no stroke order that confirms the count"
    return stroke_count_class(len(row["counts"]))


def stroke_count_class(strokes: int) -> int:
    """Return the label 0 … 16 of a stroke count."""
    return min(max(strokes, FEWEST), MOST) - FEWEST
