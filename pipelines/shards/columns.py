"""Columns of Arrow shards as numpy views, and rows of them as padded arrays.

Shards are memory-mapped: a column is a view of the file, and taking rows copies only those.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.shards.jpeg import ENCODING, JPEG, decode_jpegs
from skillnet_platform.errors import UserError


class FixedColumn:
    """A column whose rows have one shape: numbers, or fixed-size lists of them.

    Args:
        column: the Arrow column.
        shape: shape of a row, from the field's metadata; () for plain numbers.
    """

    def __init__(self, column: pa.ChunkedArray, shape: Sequence[int] = ()) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._chunks = [_numbers(chunk).reshape(len(chunk), *shape) for chunk in chunks]
        self._starts = _starts(chunks)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows), *shape) copies of the named rows."""
        if len(self._chunks) == 1:
            return self._chunks[0][rows]
        first = self._chunks[0]
        out = np.empty((len(rows), *first.shape[1:]), dtype=first.dtype)
        for index, mine, local in _by_chunk(rows, self._starts):
            out[mine] = self._chunks[index][local]
        return out


class JpegColumn(FixedColumn):
    """A column of pictures or clips kept as JPEG; taking rows decodes them.

    Args:
        column: the Arrow column, of binary.
        shape: shape of a row, from the field's metadata.
        where: names it in messages.
    """

    def __init__(self, column: pa.ChunkedArray, shape: Sequence[int], where: str) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._starts = _starts(chunks)
        self._bytes = [_binary(chunk) for chunk in chunks]
        self._shape, self._where = tuple(shape), where

    def take(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows), *shape) decoded pixels of the named rows."""
        cells: list[Any] = [None] * len(rows)
        for index, mine, local in _by_chunk(rows, self._starts):
            places = range(len(rows)) if isinstance(mine, slice) else mine.tolist()
            values, offsets = self._bytes[index]
            begins, ends = offsets[local].tolist(), offsets[local + 1].tolist()
            for place, begin, end in zip(places, begins, ends, strict=True):
                cells[place] = values[begin:end]
        return decode_jpegs(cells, self._shape, self._where)


class RaggedColumn:
    """A column of lists of numbers, or of lists of fixed-size lists (frames of mel bins).

    Args:
        column: the Arrow column.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._values = [_items(chunk.values) for chunk in chunks]
        self._offsets = [_offsets(chunk) for chunk in chunks]
        self._starts = _starts(chunks)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def lengths(self, rows: np.ndarray | None = None) -> np.ndarray:
        """(rows,) number of items of the named rows, or of all."""
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
        """Padded copies of the named rows.

        Args:
            rows: (B,) row numbers.
            limit: most items kept of a row.
            crop: (B,) in [0, 1): where the kept part starts, as a share of what is left out;
                none keeps the beginning.
            multiple: the padded length is rounded up to a multiple of this.

        Returns:
            (B, T, ...) items, zero where a row has ended, and (B,) lengths.
        """
        parts = list(_by_chunk(rows, self._starts))
        full = np.zeros(len(rows), dtype=np.int64)
        begin = np.zeros(len(rows), dtype=np.int64)
        for index, mine, local in parts:
            begin[mine] = self._offsets[index][local]
            full[mine] = self._offsets[index][local + 1] - begin[mine]
        lengths = full if limit is None else np.minimum(full, limit)
        if crop is not None:
            begin = begin + np.floor(crop * (full - lengths + 1)).astype(np.int64)
        longest = max(int(lengths.max(initial=0)), 1)
        longest = -(-longest // multiple) * multiple
        if limit is not None:
            longest = min(longest, max(limit, 1))
        place = np.arange(longest)
        real = place < lengths[:, None]
        sample = self._values[0]
        out = np.zeros((len(rows), longest, *sample.shape[1:]), dtype=sample.dtype)
        for index, mine, _ in parts:
            where = real[mine]
            items = (begin[mine][:, None] + place)[where]
            block = np.zeros((len(where), longest, *sample.shape[1:]), dtype=sample.dtype)
            block[where] = self._values[index][items]
            out[mine] = block
        return out, lengths


class NestedRaggedColumn:
    """A column of lists of lists of numbers: several token sequences a row.

    Args:
        column: the Arrow column.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._outer = [_offsets(chunk) for chunk in chunks]
        self._starts = _starts(chunks)
        inner = [chunk.values for chunk in chunks]
        self.inner = RaggedColumn(pa.chunked_array(inner, type=column.type.value_type))
        self._inner_starts = np.concatenate([[0], np.cumsum([len(part) for part in inner])])

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """(B,) number of sequences of each row."""
        return self._span(rows)[1]

    def first(self, rows: np.ndarray) -> np.ndarray:
        """(B,) number, in ``inner``, of each row's first sequence; the others follow it."""
        return self._span(rows)[0]

    def _span(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        begin = np.zeros(len(rows), dtype=np.int64)
        count = np.zeros(len(rows), dtype=np.int64)
        for index, mine, local in _by_chunk(rows, self._starts):
            outer = self._outer[index]
            begin[mine] = outer[local] + self._inner_starts[index]
            count[mine] = outer[local + 1] - outer[local]
        return begin, count


Column = FixedColumn | RaggedColumn | NestedRaggedColumn


def open_column(table: pa.Table, name: str, where: str) -> Column:
    """The numeric column ``name`` of a table.

    Args:
        table: memory-mapped rows of a split.
        name: column.
        where: the corpus and split, for messages.

    Raises:
        UserError: there is no such column, it has empty cells, or it does not hold numbers.
    """
    if name not in table.column_names:
        raise UserError(
            f"{where} has no column {name!r} (it has {', '.join(table.column_names)}); "
            "is the corpus one of this task's kind?"
        )
    column, field = table.column(name), table.schema.field(name)
    if column.null_count:
        raise UserError(f"{where}: column {name!r} has {column.null_count} empty cells")
    kind = field.type
    if (field.metadata or {}).get(ENCODING) == JPEG:
        return JpegColumn(column, _shape(field), f"{where}: column {name!r}")
    if _is_list(kind):
        return NestedRaggedColumn(column) if _is_list(kind.value_type) else RaggedColumn(column)
    if pa.types.is_fixed_size_list(kind):
        return FixedColumn(column, _shape(field))
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return FixedColumn(column)
    raise UserError(f"{where}: column {name!r} holds {kind}, expected numbers or lists of them")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _shape(field: pa.Field) -> tuple[int, ...]:
    import json

    stored = (field.metadata or {}).get(b"shape")
    return tuple(json.loads(stored)) if stored else (field.type.list_size,)


def _numbers(array: pa.Array) -> np.ndarray:
    """(items,) view of the numbers of a flat or fixed-size list array."""
    while pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=True)


def _items(array: pa.Array) -> np.ndarray:
    """Items of a list's values: (n,), or (n, width) for fixed-size lists."""
    if pa.types.is_fixed_size_list(array.type):
        return _numbers(array).reshape(len(array), array.type.list_size)
    if _is_list(array.type):
        raise UserError("lists nested deeper than two levels are not read")
    return _numbers(array)


def _offsets(array: pa.Array) -> np.ndarray:
    return array.offsets.to_numpy(zero_copy_only=True).astype(np.int64)


def _binary(array: pa.Array) -> tuple[memoryview, np.ndarray]:
    """The bytes of all cells of a binary array, one after the other, and where each begins."""
    _, ends, values = array.buffers()
    offsets = np.frombuffer(ends, np.int32)[array.offset : array.offset + len(array) + 1]
    return memoryview(values if values is not None else b""), offsets


def _starts(chunks: Sequence[pa.Array]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)])


def _by_chunk(rows: np.ndarray, starts: np.ndarray):
    """(chunk, which of ``rows`` lie in it, their numbers inside it) for each chunk touched."""
    if len(starts) <= 2:
        yield 0, slice(None), rows
        return
    chunk = np.searchsorted(starts, rows, side="right") - 1
    for index in np.unique(chunk):
        mine = np.flatnonzero(chunk == index)
        yield int(index), mine, rows[mine] - starts[index]
