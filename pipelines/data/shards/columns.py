"""Columns of Arrow shards as numpy views, and selected rows of them as padded arrays.

Shards are memory-mapped: a column is a view of the file, and ``take`` copies only its rows. Ids are
checked in the copy, because another program can change the file at any time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.data.shards.id_columns import IdRange
from pipelines.data.shards.jpeg import ENCODING, JPEG, decode_jpegs
from skillnet_platform.errors import UserError

#: Prefix of the columns with the second medium of rows in two media.
PAIRED_PREFIX = "paired_"


class IdCheck(NamedTuple):
    """Range of the ids of a column, and the name of the column in messages."""

    ids: IdRange
    column: str


class FixedColumn:
    """Column whose rows have one shape: numbers, or fixed-size lists of numbers.

    Args:
        column: Arrow column.
        shape: shape of a row, from the field's metadata; () for plain numbers.
        check: range of the copied values, if they are ids.
    """

    def __init__(
        self, column: pa.ChunkedArray, shape: Sequence[int] = (), check: IdCheck | None = None
    ) -> None:
        self._check = check
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._chunks = [view_numbers(chunk).reshape(len(chunk), *shape) for chunk in chunks]
        self._starts = _chunk_starts(chunks)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return copies of rows, (len(rows), *shape)."""
        out = self._copy(rows)
        if self._check is not None:
            self._check.ids.check_copy(out, self._check.column)
        return out

    def _copy(self, rows: np.ndarray) -> np.ndarray:
        if len(self._chunks) == 1:  # the usual case needs no second copy
            return self._chunks[0][rows]
        first = self._chunks[0]
        out = np.empty((len(rows), *first.shape[1:]), dtype=first.dtype)
        for index, selected, local in _split_by_chunk(rows, self._starts):
            out[selected] = self._chunks[index][local]
        return out


class JpegColumn(FixedColumn):
    """Column of images or videos that are stored as JPEG; ``take`` decodes them.

    Args:
        column: Arrow column of type binary.
        shape: shape of a row, from the field's metadata.
        where: name of the column in messages.
    """

    def __init__(self, column: pa.ChunkedArray, shape: Sequence[int], where: str) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._starts = _chunk_starts(chunks)
        self._bytes = [_view_binary(chunk) for chunk in chunks]
        self._shape, self._where = tuple(shape), where

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return decoded pixels of rows, uint8 (len(rows), *shape)."""
        cells: list[Any] = [None] * len(rows)
        for index, selected, local in _split_by_chunk(rows, self._starts):
            targets = range(len(rows)) if isinstance(selected, slice) else selected.tolist()
            values, offsets = self._bytes[index]
            begins, ends = offsets[local].tolist(), offsets[local + 1].tolist()
            for target, begin, end in zip(targets, begins, ends, strict=True):
                cells[target] = values[begin:end]
        return decode_jpegs(cells, self._shape, self._where)


class RaggedColumn:
    """Column of lists of numbers, or of lists of fixed-size lists (frames of mel bins).

    Args:
        column: Arrow column.
        check: range of the copied values, if they are ids.
    """

    def __init__(self, column: pa.ChunkedArray, check: IdCheck | None = None) -> None:
        self._check = check
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._values = [_view_items(chunk.values) for chunk in chunks]
        self._offsets = [_view_offsets(chunk) for chunk in chunks]
        self._starts = _chunk_starts(chunks)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def lengths(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the number of items of each row, (rows,); of all rows by default."""
        sizes = [np.diff(offsets) for offsets in self._offsets]
        every = np.concatenate(sizes) if sizes else np.zeros(0, dtype=np.int64)
        return every if rows is None else every[rows]

    def take(
        self,
        rows: np.ndarray,
        limit: int | None = None,
        crop: np.ndarray | None = None,
        multiple: int = 1,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return padded copies of rows.

        Args:
            rows: (B,) row indices.
            limit: maximum number of items of a row.
            crop: (B,) in [0, 1): start of the kept items, as a fraction of the number of dropped
                items; ``None`` keeps the first items.
            multiple: the padded length is rounded up to a multiple of this.

        Returns:
            (B, T, ...) items, zero after the end of a row, and (B,) lengths.
        """
        parts = list(_split_by_chunk(rows, self._starts))
        full = np.zeros(len(rows), dtype=np.int64)
        begin = np.zeros(len(rows), dtype=np.int64)
        for index, selected, local in parts:
            begin[selected] = self._offsets[index][local]
            full[selected] = self._offsets[index][local + 1] - begin[selected]
        lengths = full if limit is None else np.minimum(full, limit)
        if crop is not None:
            begin = begin + np.floor(crop * (full - lengths + 1)).astype(np.int64)
        longest = max(int(lengths.max(initial=0)), 1)
        longest = -(-longest // multiple) * multiple
        # Rounding up must not exceed the limit: positions of the model end there.
        if limit is not None:
            longest = min(longest, max(limit, 1))
        positions = np.arange(longest)
        real = positions < lengths[:, None]
        sample = self._values[0]
        out = np.zeros((len(rows), longest, *sample.shape[1:]), dtype=sample.dtype)
        for index, selected, _ in parts:
            is_real = real[selected]
            items = (begin[selected][:, None] + positions)[is_real]
            block = np.zeros((len(is_real), longest, *sample.shape[1:]), dtype=sample.dtype)
            copied = self._values[index][items]
            if self._check is not None:
                self._check.ids.check_copy(copied, self._check.column)
            block[is_real] = copied
            out[selected] = block
        return out, lengths


class NestedRaggedColumn:
    """Column of lists of lists of numbers: several token sequences per row.

    Args:
        column: Arrow column.
        check: range of the copied values, if they are ids.
    """

    def __init__(self, column: pa.ChunkedArray, check: IdCheck | None = None) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._outer = [_view_offsets(chunk) for chunk in chunks]
        self._starts = _chunk_starts(chunks)
        inner = [chunk.values for chunk in chunks]
        self.inner = RaggedColumn(pa.chunked_array(inner, type=column.type.value_type), check)
        self._inner_starts = np.concatenate([[0], np.cumsum([len(part) for part in inner])])

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of sequences of each row, (B,)."""
        return self._locate(rows)[1]

    def first(self, rows: np.ndarray) -> np.ndarray:
        """Return the index in ``inner`` of each row's first sequence, (B,)."""
        return self._locate(rows)[0]

    def _locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        begin = np.zeros(len(rows), dtype=np.int64)
        count = np.zeros(len(rows), dtype=np.int64)
        for index, selected, local in _split_by_chunk(rows, self._starts):
            outer = self._outer[index]
            begin[selected] = outer[local] + self._inner_starts[index]
            count[selected] = outer[local + 1] - outer[local]
        return begin, count


Column = FixedColumn | RaggedColumn | NestedRaggedColumn


def open_column(table: pa.Table, name: str, where: str, ids: IdRange | None = None) -> Column:
    """Open a numeric column of a table.

    Args:
        table: memory-mapped rows of a split.
        name: name of the column.
        where: corpus and split, for messages.
        ids: range of its values, if they are ids; checked in each copy of rows.

    Raises:
        UserError: there is no such column, it has empty cells, or it does not hold numbers.
    """
    if name not in table.column_names:
        raise UserError(
            f"{where} has no column {name!r} (it has {', '.join(table.column_names)}); "
            "does the corpus belong to this task?"
        )
    column, field = table.column(name), table.schema.field(name)
    if column.null_count:
        raise UserError(f"{where}: column {name!r} has {column.null_count} empty cells")
    kind = field.type
    check = IdCheck(ids, f"{where}: column {name!r}") if ids else None
    if (field.metadata or {}).get(ENCODING) == JPEG:
        return JpegColumn(column, _read_shape(field), f"{where}: column {name!r}")
    if _is_list(kind):
        is_nested = _is_list(kind.value_type)
        return NestedRaggedColumn(column, check) if is_nested else RaggedColumn(column, check)
    if pa.types.is_fixed_size_list(kind):
        return FixedColumn(column, _read_shape(field))
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return FixedColumn(column, check=check)
    raise UserError(f"{where}: column {name!r} holds {kind}, expected numbers or lists of them")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _read_shape(field: pa.Field) -> tuple[int, ...]:
    import json

    stored = (field.metadata or {}).get(b"shape")
    return tuple(json.loads(stored)) if stored else (field.type.list_size,)


#: Names of Arrow's types -> those of NumPy; integers have equal names.
_FLOATS = {"halffloat": "float16", "float": "float32", "double": "float64"}


def view_numbers(array: pa.Array) -> np.ndarray:
    """Return a read-only view (items,) of the numbers of a flat or fixed-size list array.

    Args:
        array: numbers without nulls.

    Raises:
        pyarrow.ArrowInvalid: the array has nulls.
    """
    # A view needs the flat values: nested fixed-size lists are unwrapped without a copy.
    while pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    kind = _FLOATS.get(str(array.type), str(array.type))
    if array.null_count or not len(array) or kind == "bool":
        return array.to_numpy(zero_copy_only=True)
    # Arrow's to_numpy imports pandas, which takes longer than a search.
    numbers = np.frombuffer(array.buffers()[1], kind)
    return numbers[array.offset : array.offset + len(array)]


def _view_items(array: pa.Array) -> np.ndarray:
    """Return the items of a list array: (n,), or (n, width) for fixed-size lists."""
    if pa.types.is_fixed_size_list(array.type):
        return view_numbers(array).reshape(len(array), array.type.list_size)
    if _is_list(array.type):
        raise UserError("lists with more than two levels are not supported")
    return view_numbers(array)


def _view_offsets(array: pa.Array) -> np.ndarray:
    return view_numbers(array.offsets).astype(np.int64)


def _view_binary(array: pa.Array) -> tuple[memoryview, np.ndarray]:
    """Return the concatenated bytes of a binary array, and the offset of each cell."""
    # The buffers are read directly, because ``to_pylist`` would copy all cells.
    _, ends, values = array.buffers()
    offsets = np.frombuffer(ends, np.int32)[array.offset : array.offset + len(array) + 1]
    return memoryview(values if values is not None else b""), offsets


def _chunk_starts(chunks: Sequence[pa.Array]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)])


def _split_by_chunk(rows: np.ndarray, starts: np.ndarray):
    """Yield for each chunk: its index, which of ``rows`` lie in it, and their indices inside it."""
    if len(starts) <= 2:  # one chunk: no search, and no copy of the indices
        yield 0, slice(None), rows
        return
    chunk = np.searchsorted(starts, rows, side="right") - 1
    for index in np.unique(chunk):
        selected = np.flatnonzero(chunk == index)
        yield int(index), selected, rows[selected] - starts[index]
