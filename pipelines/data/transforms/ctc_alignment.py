"""Length of CTC alignments: which transcripts fit into their audio.

An alignment has a token per symbol, and a blank between equal neighbours. A row without an
alignment has an infinite loss, which training replaces by zero: the row teaches nothing.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

#: Reasons of rejected rows.
TOO_SHORT = "the transcript has more symbols than the audio has frames"
NO_SYMBOL = "the transcript has a symbol that the corpus does not list"


def count_alignment_tokens(symbols: pa.ListArray) -> np.ndarray:
    """Return the least number of tokens that can hold each row's symbols, (B,).

    Args:
        symbols: list<int> per row; null counts as an empty list.
    """
    # Nulls and slices are resolved first, so that offsets and values belong together.
    flat = symbols.flatten().to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.list_value_length(symbols), 0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    # Equal neighbours before each position; pairs across two rows are left out below.
    equal = np.concatenate([[0], np.cumsum(flat[1:] == flat[:-1], dtype=np.int64), [0]])
    repeats = np.where(lengths > 0, equal[np.maximum(ends - 1, 0)] - equal[starts], 0)
    return lengths + repeats


def find_ctc_problems(symbols: pa.ListArray, frames: np.ndarray) -> list[str | None]:
    """Return the reason to reject each row, or None for a good row.

    A model joins several frames to a token, so more rows may not fit into it. A row with more
    symbols than frames fits into no model.

    Args:
        symbols: list<int> per row, from 1; 0 is the blank.
        frames: (B,) frames of each row.
    """
    reasons: list[str | None] = [None] * len(symbols)
    for row in np.flatnonzero(count_alignment_tokens(symbols) > frames):
        reasons[row] = TOO_SHORT
    invalid = np.flatnonzero(symbols.flatten().to_numpy(zero_copy_only=False) < 1)
    if len(invalid):
        for row in pc.list_parent_indices(symbols).take(pa.array(invalid)).to_pylist():
            reasons[row] = NO_SYMBOL
    return reasons
