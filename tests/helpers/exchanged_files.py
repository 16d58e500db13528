"""Change a column of a shard in its file, as any program that shares the disk can."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa


class BufferPlace(NamedTuple):
    """Place of a buffer of a column in its file, in bytes, and the type of its numbers."""

    start: int
    count: int
    kind: np.dtype
    is_offsets: bool


def overwrite_values(shard: Path, column: str, value: int) -> None:
    """Overwrite the innermost values of a column."""
    (place,) = (place for place in find_buffers(shard, column) if not place.is_offsets)
    _write(shard, place.start, np.full(place.count, value, np.int64).astype(place.kind))


def overwrite_offsets(shard: Path, column: str, value: int) -> None:
    """Overwrite the last offset of each level of the lists of a column."""
    for place in find_buffers(shard, column):
        if place.is_offsets:
            start = place.start + (place.count - 1) * place.kind.itemsize
            _write(shard, start, np.array([value]).astype(place.kind))


def find_buffers(shard: Path, column: str) -> Iterator[BufferPlace]:
    """Yield the places of the offsets of a column, outermost first, and that of its values."""
    with pa.memory_map(str(shard)) as mapped:
        base = mapped.read_buffer(mapped.size()).address
        array = pa.ipc.open_file(mapped).read_all().column(column).chunk(0)
        while True:
            kind, buffers = array.type, array.buffers()
            if pa.types.is_fixed_size_list(kind):
                array = array.values
                continue
            start = buffers[1].address - base
            if not (pa.types.is_list(kind) or pa.types.is_string(kind)):
                yield BufferPlace(start, len(array), np.dtype(kind.to_pandas_dtype()), False)
                return
            yield BufferPlace(start, len(array) + 1, np.dtype(np.int32), True)
            if pa.types.is_string(kind):
                values = buffers[2]
                yield BufferPlace(values.address - base, values.size, np.dtype(np.uint8), False)
                return
            array = array.values


def _write(shard: Path, start: int, numbers: np.ndarray) -> None:
    with shard.open("r+b") as stream:
        stream.seek(start)
        stream.write(numbers.tobytes())
