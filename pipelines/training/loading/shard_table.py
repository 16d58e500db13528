"""Rows of a task's splits, with only the needed shards open.

A split on disk is opened as a unit: it is memory-mapped and costs nothing. Of a split in an object
store, or one that is read in windows, only the shards of the current batches are open.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.shards.columns import Column, open_column
from pipelines.data.shards.dataset import CorpusSplit
from pipelines.data.shards.files import OpenShard
from pipelines.data.shards.id_columns import IdRange

#: Rows examined per shard to find out which shards are needed first.
PREFETCH_ROWS_PER_SHARD = 64


class ShardTable:
    """Columns of several splits, with row numbers that run through all of them.

    Args:
        splits: in order; the table has the columns that all of them have.
        location: name of the splits in messages.
        id_ranges: column -> range of the ids that the model reads; checked when a shard opens, and
            in each copy of rows.
    """

    def __init__(
        self,
        splits: Sequence[CorpusSplit],
        location: str,
        id_ranges: Mapping[str, IdRange] | None = None,
    ) -> None:
        self.location = location
        self._id_ranges = id_ranges or {}
        self._splits = list(splits)
        #: Shards before each split, and of all.
        self._first_shards = np.cumsum([0, *(len(split.shards) for split in splits)])
        self._open: dict[int, OpenShard] = {}
        self._columns: dict[str, Column] = {}
        self._names: list[str] | None = None
        self._is_prefetched = False

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        # A loading process opens its own shards: a copy would hold all of their rows.
        state = {**self.__dict__, "_open": {}, "_columns": {}, "_is_prefetched": False}
        return {key: value for key, value in state.items() if key not in _COMPUTED}

    @cached_property
    def rows(self) -> np.ndarray:
        """(shards,) rows of each shard."""
        return _join([split.shards.rows for split in self._splits])

    @cached_property
    def bytes(self) -> np.ndarray:
        """(shards,) bytes of each shard."""
        return _join([split.shards.bytes for split in self._splits])

    @cached_property
    def _starts(self) -> np.ndarray:
        """(shards + 1,) rows before each shard, and of all."""
        if len(self._splits) == 1:
            return self._splits[0].shards.starts
        return np.concatenate([[0], np.cumsum(self.rows)])

    @property
    def is_remote(self) -> bool:
        """Whether opening a shard may download it."""
        return any(split.files.remote for split in self._splits)

    def open(self, shards: Iterable[int] | None = None, ahead: Iterable[int] = ()) -> None:
        """Open these shards and close all others; prefetch further ones.

        Args:
            shards: numbers, in the order in which they are needed; None for all.
            ahead: shards that are needed next.

        Raises:
            UserError: a shard is missing, corrupt or not an Arrow file, or has an id outside of
                its range.
            StoreUnavailableError: the store does not answer.
        """
        numbers = list(range(self._count) if shards is None else shards)
        # Downloads start in the background before the first shard is opened.
        self._prefetch(numbers)
        remaining = {number: self._open[number] for number in numbers if number in self._open}
        if len(remaining) != len(numbers) or len(remaining) != len(self._open):
            # Close first: the new shards may need the room of the old ones in the cache.
            self._columns.clear()
            self._open = remaining
            for number in numbers:
                if number not in remaining:
                    split, place = self._find_shard(number)
                    shard = split.shards[place]
                    remaining[number] = split.open_shard(shard, self._id_ranges)
            self._open = dict(sorted(remaining.items()))
        self._prefetch(ahead)

    def prefetch(self, rows: np.ndarray) -> None:
        """Prefetch all shards in the background, in the order in which these rows need them.

        Args:
            rows: (rows,) row numbers that are read soon, in their order.
        """
        if not self._is_prefetched:
            self._is_prefetched = True
            # This number of shuffled rows meets every shard but very small ones, which come last.
            shards, first = np.unique(
                self._shard_of(rows[: PREFETCH_ROWS_PER_SHARD * self._count]),
                return_index=True,
            )
            needed = shards[np.argsort(first)].tolist()
            self._prefetch(dict.fromkeys([*needed, *range(self._count)]))

    def ensure_open(self, rows: np.ndarray) -> None:
        """Open the shards of these rows in addition to the open ones."""
        if len(self._open) == self._count:
            return
        missing = [n for n in np.unique(self._shard_of(rows)).tolist() if n not in self._open]
        if missing:
            self.open([*self._open, *missing])

    def column(self, name: str) -> Column:
        """Return a numeric column of the open shards.

        Raises:
            UserError: there is no such column, it has empty cells, or it does not hold numbers.
        """
        if name not in self._columns:
            ids = self._id_ranges.get(name)
            self._columns[name] = open_column(self.table(), name, self.location, ids)
        return self._columns[name]

    def column_type(self, name: str) -> pa.DataType:
        """Return the Arrow type of a column."""
        return self.table().schema.field(name).type

    def to_local(self, rows: np.ndarray) -> np.ndarray:
        """Return the (B,) numbers of rows among those of the open shards, which must hold them."""
        # All shards are open, so global and local numbers are equal.
        if len(self._open) == self._count:
            return rows
        open_shards = np.fromiter(self._open, np.int64, len(self._open))
        sizes = self.rows[open_shards]
        offsets = np.cumsum(sizes) - sizes - self._starts[open_shards]
        shards = self._shard_of(rows)
        assert np.isin(shards, open_shards).all(), f"{self.location}: rows of closed shards"
        return rows + offsets[np.searchsorted(open_shards, shards)]

    def table(self) -> pa.Table:
        """Return the rows of the open shards; open all if none is open."""
        if not self._open:
            self.open()
        if self._names is None:
            # Splits of one corpus may differ in columns, for example where labels are missing.
            schemas = [split.schema for split in self._splits] if len(self._splits) > 1 else []
            first = schemas[0] if schemas else next(iter(self._open.values())).table.schema
            self._names = [n for n in first.names if all(n in schema.names for schema in schemas)]
        tables = [opened.table for opened in self._open.values()]
        return pa.concat_tables([table.select(self._names) for table in tables])

    def _shard_of(self, rows: np.ndarray) -> np.ndarray:
        """(rows,) numbers of the shards of these rows."""
        return np.searchsorted(self._starts, rows, side="right") - 1

    def _prefetch(self, numbers: Iterable[int]) -> None:
        closed = (self._find_shard(number) for number in numbers if number not in self._open)
        for split, group in groupby(closed, key=lambda pair: pair[0]):
            split.files.prefetch([split.shards[place] for _, place in group])

    @property
    def _count(self) -> int:
        """Number of all shards."""
        return int(self._first_shards[-1])

    def _find_shard(self, number: int) -> tuple[CorpusSplit, int]:
        """Return the split of a shard, and its place in the split."""
        split = int(np.searchsorted(self._first_shards, number, side="right")) - 1
        return self._splits[split], number - int(self._first_shards[split])


#: Attributes that another process computes from the columns of the shards.
_COMPUTED = ("rows", "bytes", "_starts")


def _join(columns: Sequence[np.ndarray]) -> np.ndarray:
    # The column of one split is mapped, a copy would not be.
    return columns[0] if len(columns) == 1 else np.concatenate(columns)
