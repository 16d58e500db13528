"""Base of corpora that give each video of ``strokes`` a class that the archives decide.

A class that follows from a prepared row needs no code: a rule labels it (``labels:CORPUS``). These
corpora read marks that no row has. Videos, units and splits are those of
``strokes``. A model trained on ``strokes`` therefore never saw an evaluated character with its
stroke names, nor another character of the same sequence. :class:`LabelledStrokesCorpus` is the
entry point; ``radicals`` derives from it.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pyarrow as pa

from pipelines.data.corpora.base import RejectedRow, Row, SourceArchives
from skillnet_corpora.demo.strokes import StrokesCorpus, render_clips

#: Returns the class of a row of ``strokes``, or why it has none.
ClipLabeller = Callable[[Row], int | str]


class LabelledStrokesCorpus(StrokesCorpus):
    """Videos of characters being written, with one class each."""

    #: Names of the classes.
    labels: ClassVar[tuple[str, ...]]
    raw_schema = pa.schema(
        [*(f for f in StrokesCorpus.raw_schema if f.name != "captions"), ("label", pa.int32())]
    )
    columns = pa.schema([StrokesCorpus.columns.field("frames"), pa.field("label", pa.int32())])
    omitted_columns: ClassVar = {}
    text_columns = ()
    terms = ()
    pretraining = ()

    @abstractmethod
    def build_labeller(self, sources: SourceArchives) -> ClipLabeller:
        """Return the function that labels a row.

        Args:
            sources: the verified archives.
        """

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield the characters of ``strokes`` that have a class, in its order and splits."""
        label_row = self.build_labeller(sources)
        for row in super().rows(sources):
            if isinstance(row, RejectedRow):
                yield row
                continue
            label = label_row(row)
            if isinstance(label, str):
                yield RejectedRow(row["key"], label)
            else:
                kept = {key: value for key, value in row.items() if key != "captions"}
                yield kept | {"label": label}

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """Return frames and labels."""
        frames, rejected = render_clips(block)
        return pa.table({"frames": frames, "label": block["label"], "rejected": rejected})

    def preprocessing(self) -> dict[str, Any]:
        """Return the numbers of ``strokes`` and its version."""
        kept = {k: v for k, v in super().preprocessing().items() if k != "caption_tokens"}
        return kept | {"strokes_version": StrokesCorpus.version}

    def facts(self) -> dict[str, Any]:
        """Return the names of the labels."""
        return {"labels": list(self.labels)}
