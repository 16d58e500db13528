"""Corpus ``stamps_texts``: captions of ``stamps`` in twelve languages, labelled with their topic.

A key is ``LANGUAGE/STAMP``, such as ``fr/animals/birds/crow``, so a rule on keys makes a task of
each language. All languages have the same stamps in the same splits.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa

from pipelines.data.corpora.base import Archive, Corpus, RejectedRow, Row, SourceArchives
from pipelines.data.transforms import text
from skillnet_corpora.study.stamps import SPLIT_BY, STAMPS, TOPICS, WRITTEN, read_stamps
from skillnet_corpora.study.variant_units import describe_units


class StampTextsCorpus(Corpus):
    """Captions with the topic of their stamp."""

    name = "stamps_texts"
    modality = "text"
    task = "caption_topic"
    archives: ClassVar[tuple[Archive, ...]] = (STAMPS,)
    raw_schema = pa.schema(
        [("text", pa.string()), ("language", pa.string()), ("label", pa.int32())]
    )
    columns = pa.schema([*raw_schema, ("tokens", pa.list_(pa.int32()))])
    text_columns = ("text",)
    shard_rows = 8192

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield the captions in the order of the package, those of a stamp one after the other."""
        for stamp in read_stamps(sources).values():
            for language in WRITTEN:
                key = f"{language}/{stamp.key}"
                if language not in stamp.captions:
                    yield RejectedRow(key, "no caption in this language")
                    continue
                row = {"split": stamp.split, "key": key, "group": -1, "unit": stamp.unit}
                caption = {"text": stamp.captions[language], "language": language}
                yield {**row, **caption, "label": stamp.label}

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """Return the tokens of each caption."""
        tokens = text.encode_texts(tokenizer, block["text"].to_pylist(), text.TEXT_TOKENS)
        return block.select(["text", "language", "label"]).append_column("tokens", tokens)

    def preprocessing(self) -> dict[str, Any]:
        """Return the limit of tokens and the numbers of the split."""
        return {
            "tokens": text.TEXT_TOKENS,
            "split_by": SPLIT_BY,
            **describe_units(),
        }

    def facts(self) -> dict[str, Any]:
        """Return the names of the topics."""
        return {"labels": list(TOPICS)}
