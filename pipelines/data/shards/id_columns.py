"""Columns of a prepared corpus that hold ids, and the check that each id is in its range.

An id is an index of a table of the model: a row of an embedding, an output of a head, a symbol of
CTC. Kernels do not check all of them: ``ctc_loss`` reads and writes outside of its tensors. So ids
are checked where shards are opened, against the sizes in the manifest, and where a task reads them,
against the sizes of its model. A shard is a mapped file, which other programs can still change:
:meth:`IdRange.check_copy` checks the ids of a batch again, after they were copied out of the file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from skillnet_platform.errors import UserError
from skillnet_platform.storage.location import Location

#: Columns with tokens of texts, of code, of captions, and of code as a second medium.
TOKEN_COLUMNS = ("tokens", "caption_tokens", "paired_tokens")

#: Columns whose ids are outputs of a head.
OUTPUT_COLUMNS = ("label", "label_set", "symbols")


@dataclass(frozen=True)
class IdRange:
    """Range of the ids of a column.

    Args:
        source: states where the size of the table comes from, for messages.
        stop: end of the range, exclusive; None if the size is unknown.
        first: start of the range.
    """

    source: str
    stop: int | None
    first: int = 0

    def check_copy(self, ids: np.ndarray, column: str) -> None:
        """Check ids in memory, whose rows were checked when their shard was opened.

        It costs about 10 microseconds a batch, because the copy is in the processor's cache.

        Args:
            ids: integers in an array of any shape.
            column: location and name, for messages.

        Raises:
            UserError: an id is outside of the range.
        """
        if ids.size and (
            ids.min() < self.first or (self.stop is not None and ids.max() >= self.stop)
        ):
            is_bad = ids < self.first
            if self.stop is not None:
                is_bad |= ids >= self.stop
            raise UserError(
                f"{column}: {self.describe_outside(ids[is_bad].flat[0])}. Another program changed "
                "the file after it was checked. Prepare the corpus again."
            )

    def describe_outside(self, value: Any) -> str:
        """Return a statement that an id is outside of the range."""
        allowed = f"{self.first} to {self.stop - 1}" if self.stop else f"{self.first} and above"
        return f"the id {value} is outside {allowed} ({self.source})"


def manifest_id_ranges(manifest: Mapping[str, Any]) -> dict[str, IdRange]:
    """Return column -> range of its ids, from the sizes that a manifest declares.

    Args:
        manifest: parsed ``manifest.json`` of a corpus; its types are checked.
    """
    size = (manifest.get("tokenizer") or {}).get("vocab_size")
    tokens = IdRange(f"the tokenizer of its manifest has {size} tokens", size)
    labels, symbols = (len(manifest.get(key) or ()) or None for key in ("labels", "symbols"))
    classes = IdRange(f"its manifest lists {labels} labels", labels)
    return dict.fromkeys(TOKEN_COLUMNS, tokens) | {
        "label": classes,
        "label_set": classes,
        # 0 is the blank of CTC, so symbols are counted from 1.
        "symbols": IdRange(
            f"its manifest lists {symbols} symbols", symbols and symbols + 1, first=1
        ),
    }


def check_ids(
    table: pa.Table, ranges: Mapping[str, IdRange], location: Location, remedy: str
) -> None:
    """Check all ids of a table.

    Args:
        table: rows of a shard or of a split.
        ranges: column -> range of its ids; columns that the table lacks are skipped.
        location: folder or store prefix of the rows, for messages.
        remedy: last sentence of messages.

    Raises:
        UserError: names the location, the column, the row (from 0) and the id.
    """
    for name, ids in ranges.items():
        if name in table.column_names:
            row = 0
            for chunk in table.column(name).chunks:
                problem = _find_problem(chunk, ids, row)
                if problem:
                    raise UserError(f"{location}: column {name!r}{problem}. {remedy}")
                row += len(chunk)


def _find_problem(chunk: pa.Array, ids: IdRange, first_row: int) -> str:
    """Return what is wrong with the ids of a column's chunk, or "" if all are in range."""
    flat = chunk
    while _is_list(flat.type):
        flat = flat.flatten()
    if not pa.types.is_integer(flat.type):
        return f": holds {flat.type}, expected integers"
    if flat.null_count:
        row = first_row + _find_row(chunk, int(np.argmax(flat.is_null())))
        return f", row {row}: an id is empty"
    limits = pc.min_max(flat)
    least, most = limits["min"].as_py(), limits["max"].as_py()
    if least is None or (least >= ids.first and (ids.stop is None or most < ids.stop)):
        return ""
    values = flat.to_numpy()
    is_bad = values < ids.first
    if ids.stop is not None:
        is_bad |= values >= ids.stop
    position = int(np.argmax(is_bad))
    row = first_row + _find_row(chunk, position)
    return f", row {row}: {ids.describe_outside(values[position])}"


def _find_row(chunk: pa.Array, position: int) -> int:
    """Return the row of a chunk that holds the flattened value at a position."""
    levels = []
    while _is_list(chunk.type):
        levels.append(pc.list_parent_indices(chunk))
        chunk = chunk.flatten()
    for parents in reversed(levels):
        position = parents[position].as_py()
    return position


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
