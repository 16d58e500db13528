"""Shards of a corpus as columns: files, rows, bytes and digests.

A corpus may have a million shards, and each process that trains or loads has a list of them. The
columns are therefore mapped from one Arrow file beside the manifest, which the processes of a node
share. An entry becomes a Python object when it is used. A pickled list names the file.
"""

import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.shards.format import SHARD_SCHEMA
from skillnet_platform.errors import UserError
from skillnet_platform.storage.location import join_location

if TYPE_CHECKING:
    from pipelines.data.shards.files import OpenShard, ShardEntry, ShardStore

#: Entries that iterating makes at a time.
BATCH_ENTRIES = 4096
#: A file in the folder of the corpus, or below it: no part of its path is empty or has only dots.
_OUTSIDE = r"^/|/$|//|^$|(^|/)\.{1,2}(/|$)|[\\\x00]"


class ShardList(Sequence[dict[str, Any]]):
    """Entries of shards that stand together in the table of a corpus.

    An entry has the keys ``file``, ``rows``, ``bytes`` and ``sha256`` of the shard, its ``number``
    among all shards of the corpus, and its ``place`` in this list.

    Args:
        files: shards of the corpus.
        table: entry of the file with the columns.
        start: first shard.
        stop: shard after the last one; None for all.
    """

    def __init__(
        self, files: "ShardStore", table: "ShardEntry", start: int = 0, stop: int | None = None
    ) -> None:
        self._files, self._entry = files, dict(table)
        self._start, self._stop = start, int(table["rows"]) if stop is None else stop

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardList, (self._files, self._entry, self._start, self._stop)

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, place: Any) -> Any:
        """Return an entry, or the entries of a slice."""
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        place = range(len(self))[place]
        return next(self._entries(place, place + 1))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._entries(0, len(self))

    def _entries(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        for first in range(start, stop, BATCH_ENTRIES):
            part = self._table.slice(first, min(BATCH_ENTRIES, stop - first))
            for place, entry in enumerate(part.to_pylist(), first):
                entry["sha256"] = entry["sha256"].hex()
                yield entry | {"number": self._start + place, "place": place}

    def select(self, start: int = 0, stop: int | None = None) -> "ShardList":
        """Return the shards of the corpus from number ``start`` to ``stop``; all by default."""
        return ShardList(self._files, self._entry, start, stop)

    def iter_sizes(self) -> Iterator[tuple[str, int]]:
        """Yield file and bytes of each shard."""
        for first in range(0, len(self), BATCH_ENTRIES):
            part = self._table.slice(first, BATCH_ENTRIES)
            yield from zip(
                part.column("file").to_pylist(), part.column("bytes").to_pylist(), strict=True
            )

    @cached_property
    def rows(self) -> np.ndarray:
        """(shards,) rows of each shard."""
        return self._numbers("rows")

    @cached_property
    def bytes(self) -> np.ndarray:
        """(shards,) bytes of each shard."""
        return self._numbers("bytes")

    @cached_property
    def starts(self) -> np.ndarray:
        """(shards + 1,) rows before each shard, and of all."""
        return np.concatenate([[0], np.cumsum(self.rows)])

    def check(self) -> None:
        """Open the file and check its columns.

        Raises:
            UserError: the file is missing, was altered or has other columns, a size is negative,
                or a shard lies outside of the folder of the corpus.
            StoreUnavailableError: the store does not answer.
        """
        files = self._table.column("file")
        outside = pc.match_substring_regex(files, _OUTSIDE)
        if pc.any(outside).as_py():
            name = files.filter(outside)[0].as_py()
            self._reject(f"names {name!r}, which is no file of this folder")
        if min(self.rows.min(initial=0), self.bytes.min(initial=0)) < 0:
            self._reject("has a negative size")

    @cached_property
    def _opened(self) -> "OpenShard":
        # The handle keeps the file in the cache of the node.
        return self._files.open(self._entry)

    @cached_property
    def _table(self) -> pa.Table:
        columns = self._opened.table
        if not columns.schema.equals(SHARD_SCHEMA) or any(c.null_count for c in columns.columns):
            self._reject("has other columns than a list of shards")
        return columns.slice(self._start, len(self))

    def _numbers(self, name: str) -> np.ndarray:
        chunks = self._table.column(name).chunks
        numbers = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)
        # No copy: the values stay in the mapped file.
        return np.asarray(numbers.to_numpy())

    def _reject(self, what: str) -> None:
        named = join_location(self._files.location, str(self._entry["file"]))
        raise UserError(f"{named}: {what}. {self._files.repair_hint}")


class SharedArray:
    """Numbers that the processes of a node share: a pickle names a file that each of them maps.

    The file is written when the first pickle is made, and removed with this object.

    Args:
        values: any array; afterwards the mapped one.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.values, self._path = values, ""

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._path:
            handle, self._path = tempfile.mkstemp(".npy", "skillnet-")
            weakref.finalize(self, _remove, self._path)
            with os.fdopen(handle, "wb") as stream:
                np.save(stream, self.values)
            self.values = np.load(self._path, mmap_mode="r")
        return _map_shared, (self._path,)


def _map_shared(path: str) -> SharedArray:
    array = SharedArray(np.load(path, mmap_mode="r"))
    # The process that wrote the file removes it.
    array._path = path
    return array


def _remove(path: str) -> None:
    with suppress(OSError):
        Path(path).unlink()


class SelectedShards(Sequence[dict[str, Any]]):
    """Entries of shards of which only some rows are read.

    Args:
        base: entries of the whole shards.
        places: (shards,) places in ``base``.
        rows: numbers of the rows of each of these shards, ascending.
    """

    def __init__(
        self,
        base: "ShardList | SelectedShards",
        places: Sequence[int],
        rows: Sequence[np.ndarray],
    ) -> None:
        self._base, self._places = base, SharedArray(np.asarray(places, np.int64))
        counts = np.fromiter((len(each) for each in rows), np.int64, len(rows))
        self._starts = SharedArray(np.concatenate([[0], np.cumsum(counts)]))
        self._selected = SharedArray(np.concatenate(rows) if len(rows) else np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self._places.values)

    def __getitem__(self, place: Any) -> Any:
        """Return an entry, or the entries of a slice."""
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        place = range(len(self))[place]
        rows = len(self.selected_rows(place))
        return self._base[int(self._places.values[place])] | {"rows": rows, "place": place}

    def find_whole(self, place: int) -> dict[str, Any]:
        """Return the entry of the whole shard."""
        whole: dict[str, Any] = self._base[int(self._places.values[place])]
        return whole

    def selected_rows(self, place: int) -> np.ndarray:
        """Return the (rows,) numbers of the selected rows of a shard."""
        start, stop = self.starts[place : place + 2]
        return self._selected.values[start:stop]

    @property
    def starts(self) -> np.ndarray:
        """(shards + 1,) selected rows before each shard, and of all."""
        return self._starts.values

    @property
    def rows(self) -> np.ndarray:
        """(shards,) selected rows of each shard."""
        return np.diff(self.starts)

    @property
    def bytes(self) -> np.ndarray:
        """(shards,) bytes of each file, because a reader opens or downloads all of it."""
        return self._base.bytes[self._places.values]
