"""Texts, and the base of rows that are strings."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.config.bounds import BoundedOptions
from pipelines.data.modalities.base import ColumnArrays, InputContext, ModalityFiles
from pipelines.data.transforms import text
from skillnet_platform.config.bounds import PositiveCount


@dataclass
class TextOptions(BoundedOptions):
    """Texts.

    Args:
        max_tokens: tokens kept of a text; BERT-like models read TNEWS with 128.
        max_characters: characters kept of a text before it is tokenized.
    """

    max_tokens: PositiveCount = 128
    max_characters: PositiveCount = 10_000


class StringFiles(ModalityFiles):
    """Base of rows that are strings: raw and finished rows hold them, beside their tokens."""

    #: Keys of the preprocessing settings that limit the tokens.
    limit_keys: tuple[str, ...] = ()

    def raw_fields(self) -> list[tuple[str, pa.DataType]]:
        """Return the column of the string."""
        return [(self.modality.content_column, pa.string())]

    def shard_fields(self, options: Any) -> list[Any]:
        """Return the columns of the string and its tokens."""
        return [*self.raw_fields(), (self.modality.column, pa.list_(pa.int32()))]

    def make_input(self, value: str, name: str) -> dict[str, Any]:
        """Return a string of Python code as fields of a ``PredictionItem``.

        Args:
            value: the row.
            name: name of the input in messages.
        """
        raise NotImplementedError


class TextFiles(StringFiles):
    """File half of texts."""

    Options = TextOptions
    noun = "a text"
    text_fields = ("text", "sentence", "txt", "content")
    limit_keys = ("max_tokens", "tokens")

    def build_columns(
        self, block: pa.Table, tokenizer: Any, options: TextOptions, max_bytes: int
    ) -> ColumnArrays:
        texts = [(t or "")[: options.max_characters] for t in block["text"].to_pylist()]
        return {
            "text": pa.array(texts, pa.string()),
            "tokens": text.encode_texts(tokenizer, texts, options.max_tokens),
        }

    def make_input(self, value: str, name: str) -> dict[str, Any]:
        return {"name": value, "text": value, "where": name}

    def read_inputs(self, item: Any, context: InputContext) -> list[tuple[str, np.ndarray]]:
        content = (item.text if item.text is not None else decode_text(item.data or b"")).strip()
        if not content and not item.may_be_empty:
            raise ValueError("the text is empty")
        if context.settings.get("keywords") and not context.is_caption:
            content = text.append_keywords(content, item.keywords)
        (row,) = context.tokenize([content], context.limit_tokens(self.limit_keys))
        return [(item.name, row)]


def decode_text(data: bytes) -> str:
    """Return the text of a file in UTF-8, without a byte order mark and outer white space.

    Raises:
        ValueError: the bytes are not UTF-8.
    """
    try:
        # utf-8-sig also removes the byte order mark that editors on Windows write.
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError("the text is not UTF-8") from None
