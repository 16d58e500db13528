"""Texts to token ids."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

TEXT_TOKENS = 64
CAPTION_TOKENS = 48
CODE_TOKENS = 192


def encode(tokenizer: Any, texts: Sequence[str], limit: int) -> pa.ListArray:
    """Token ids of each text, cut after ``limit``: one list<int32> for each text."""
    ids = [row.ids[:limit] for row in tokenizer.encode_batch_fast(list(texts))]
    return pa.array(ids, pa.list_(pa.int32()))


def encode_captions(
    tokenizer: Any, captions: Sequence[Sequence[str]], limit: int = CAPTION_TOKENS
) -> pa.ListArray:
    """Token ids of each caption of each row: list<list<int32>>."""
    flat = [caption for row in captions for caption in row]
    tokens = encode(tokenizer, flat, limit)
    ends, end = [0], 0
    for row in captions:
        end += len(row)
        ends.append(end)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), tokens)
