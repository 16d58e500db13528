"""Rows of a task's splits, of which only the shards in hand are open.

A split on disk is opened whole: it is memory-mapped and costs nothing. Of one in a store, or one
that is read in windows, those shards are open that the batches at hand need.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
import pyarrow as pa

from pipelines.shards.columns import Column, open_column
from pipelines.shards.dataset import CorpusSplit
from pipelines.shards.files import OpenShard

#: Rows looked at for each shard, to find out which shards are needed first.
AHEAD = 64


class HeldRows:
    """Columns of several splits, row numbers running through all of them.

    Args:
        splits: in order; of their columns those count that all have.
        where: names them in messages.
    """

    def __init__(self, splits: Sequence[CorpusSplit], where: str) -> None:
        self.where = where
        self._splits = list(splits)
        self._shards = [(split, shard) for split in splits for shard in split.shards]
        self.rows = [int(shard["rows"]) for _, shard in self._shards]
        self.bytes = [int(shard["bytes"]) for _, shard in self._shards]
        self._starts = np.concatenate([[0], np.cumsum(self.rows, dtype=np.int64)])
        self._open: dict[int, OpenShard] = {}
        self._columns: dict[str, Column] = {}
        self._names: list[str] | None = None
        self._fetched = False

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def remote(self) -> bool:
        """Whether opening shards may mean to download them."""
        return any(split.files.remote for split in self._splits)

    def hold(self, shards: Iterable[int] | None = None, ahead: Iterable[int] = ()) -> None:
        """Have these shards open, and no others; have more of them fetched.

        Args:
            shards: numbers, in the order in which they are needed; none for all.
            ahead: shards that will be wanted next.

        Raises:
            UserError: a shard is missing, altered or not an Arrow file.
            StoreUnavailable: the store does not answer.
        """
        wanted = list(range(len(self._shards)) if shards is None else shards)
        self._prefetch(wanted)
        kept = {number: self._open[number] for number in wanted if number in self._open}
        changed = len(kept) != len(wanted) or len(kept) != len(self._open)
        if changed:
            # What is let go of may be what the new ones need room for.
            self._columns.clear()
            self._open = kept
            for number in wanted:
                if number not in kept:
                    split, shard = self._shards[number]
                    kept[number] = split.files.open(shard)
            self._open = dict(sorted(kept.items()))
        self._prefetch(ahead)

    def fetch(self, rows: np.ndarray) -> None:
        """Have all shards fetched in the background, in the order in which these rows need them.

        Args:
            rows: (rows,) row numbers that are read soon, in their order.
        """
        if not self._fetched:
            self._fetched = True
            # So many shuffled rows meet every shard but very small ones, which come last.
            touched, first = np.unique(
                self._shard_of(rows[: AHEAD * len(self._shards)]), return_index=True
            )
            needed = touched[np.argsort(first)].tolist()
            self._prefetch(dict.fromkeys([*needed, *range(len(self._shards))]))

    def add(self, rows: np.ndarray) -> None:
        """Have the shards of these rows open too."""
        if len(self._open) == len(self._shards):
            return
        touched = np.unique(self._shard_of(rows))
        if not all(int(number) in self._open for number in touched):
            self.hold([*self._open, *(int(n) for n in touched if int(n) not in self._open)])

    def column(self, name: str) -> Column:
        """A numeric column of the open shards.

        Raises:
            UserError: there is no such column, it has empty cells, or it does not hold numbers.
        """
        if name not in self._columns:
            self._columns[name] = open_column(self.table(), name, self.where)
        return self._columns[name]

    def kind(self, name: str) -> pa.DataType:
        """What a column holds."""
        return self.table().schema.field(name).type

    def local(self, rows: np.ndarray) -> np.ndarray:
        """(B,) numbers of these rows among those of the open shards, which must hold them."""
        if len(self._open) == len(self._shards):
            return rows
        held = np.fromiter(self._open, np.int64, len(self._open))
        offsets = np.full(len(self._shards), -1, np.int64)
        sizes = np.array(self.rows, np.int64)[held]
        offsets[held] = np.cumsum(sizes) - sizes - self._starts[held]
        shard = self._shard_of(rows)
        assert np.isin(shard, held).all(), f"{self.where}: rows of shards that are not open"
        return rows + offsets[shard]

    def _shard_of(self, rows: np.ndarray) -> np.ndarray:
        """(rows,) numbers of the shards that rows lie in."""
        return np.searchsorted(self._starts, rows, side="right") - 1

    def _prefetch(self, numbers: Iterable[int]) -> None:
        waiting = (self._shards[number] for number in numbers if number not in self._open)
        for split, wanted in groupby(waiting, key=lambda pair: pair[0]):
            split.files.prefetch([shard for _, shard in wanted])

    def table(self) -> pa.Table:
        """The rows of the open shards; of all, if none is open yet."""
        if not self._open:
            self.hold()
        if self._names is None:
            schemas = [split.schema for split in self._splits] if len(self._splits) > 1 else []
            first = schemas[0] if schemas else next(iter(self._open.values())).table.schema
            self._names = [n for n in first.names if all(n in schema.names for schema in schemas)]
        tables = [opened.table for opened in self._open.values()]
        return pa.concat_tables([table.select(self._names) for table in tables])
