"""Texts to token ids."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

TEXT_TOKENS = 64
CAPTION_TOKENS = 48
CODE_TOKENS = 192


def encode(tokenizer: Any, texts: Sequence[str], limit: int) -> pa.ListArray:
    """Token ids of each text, cut after ``limit``: one list<int32> for each text."""
    ids = [row.ids[:limit] for row in tokenizer.encode_batch_fast(list(texts))]
    ends = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    flat = np.fromiter(chain.from_iterable(ids), np.int32, count=int(ends[-1]))
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(flat))


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
