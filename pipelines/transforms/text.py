"""Texts to token ids."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

TEXT_TOKENS = 64
CAPTION_TOKENS = 48
CODE_TOKENS = 192


def encode_texts(tokenizer: Any, texts: Sequence[str], limit: int) -> pa.ListArray:
    """Token ids of each text, cut after ``limit``: one list<int32> for each text.

    What the tokenizer calls unknown is spelt in bytes, if it has tokens for them.
    """
    ids = [row.ids for row in tokenizer.encode_batch_fast(list(texts))]
    unknown, first = tokenizer.token_to_id("[UNK]"), tokenizer.token_to_id("<0x00>")
    if unknown is not None and first is not None:
        for place, row in enumerate(ids):
            if unknown in row:
                ids[place] = _in_bytes(tokenizer, texts[place], unknown, first)
    ids = [row[:limit] for row in ids]
    ends = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    flat = np.fromiter(chain.from_iterable(ids), np.int32, count=int(ends[-1]))
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(flat))


def encode_captions(
    tokenizer: Any, captions: Sequence[Sequence[str]], limit: int = CAPTION_TOKENS
) -> pa.ListArray:
    """Token ids of each caption of each row: list<list<int32>>."""
    flat = [caption for row in captions for caption in row]
    tokens = encode_texts(tokenizer, flat, limit)
    ends, end = [0], 0
    for row in captions:
        end += len(row)
        ends.append(end)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), tokens)


def append_keywords(text: str, keywords: Any) -> str:
    """A sentence with its keywords behind it, where it has any: as TNEWS may be read."""
    return f"{text} {keywords}".strip() if isinstance(keywords, str) else text


def _in_bytes(tokenizer: Any, text: str, unknown: int, first: int) -> list[int]:
    """Token ids of a text, those of its bytes in the place of each unknown token."""
    encoded = tokenizer.encode(text)
    ids: list[int] = []
    for number, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
        if number == unknown:
            ids += [first + byte for byte in text[start:end].encode("utf-8")]
        else:
            ids.append(number)
    return ids
