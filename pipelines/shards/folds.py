"""Folds of a prepared corpus: its rows are assigned to splits by held-out unit when it is read.

The rows of the splits train, validation and test are one pool. A fold divides the units of the
pool among these splits again, and over all folds each row is tested once (decision 58). No corpus
is prepared again: :func:`open_fold` returns splits that select rows of the same shards. A row
without the name of a unit is a unit by itself, with its key as the name.

Rows of other splits stay where they are, unless the pool has their unit: then a row for pretraining
is read only if its unit is trained, and a row of another test split only if its unit is tested.
"""

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.config.folds import RESERVE_SPLIT, FoldConfig, is_reserve
from pipelines.shards.dataset import CorpusSplit, PreparedCorpus
from pipelines.shards.files import OpenShard
from pipelines.shards.id_columns import IdRange
from skillnet_platform.errors import UserError

#: Splits whose rows a fold assigns again.
POOL_SPLITS = ("train", "validation", "test")


class SelectedShard(NamedTuple):
    """Rows of a shard, copied out of its file."""

    table: pa.Table


@dataclass(frozen=True)
class FoldSplit(CorpusSplit):
    """Selected rows of the shards of a corpus.

    Args:
        selected: file of a shard -> (rows,) numbers of its selected rows, ascending.
        whole: file of a shard -> its entry in the manifest.
        columns: columns that all shards of the split have.
    """

    selected: Mapping[str, np.ndarray] = field(default_factory=dict)
    whole: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    columns: Sequence[str] = ()

    def open_shard(
        self, shard: Mapping[str, Any], ranges: Mapping[str, IdRange] | None = None
    ) -> OpenShard:
        """Open a shard and return its selected rows; see :meth:`CorpusSplit.open_shard`."""
        whole = self.whole[shard["file"]]
        opened = super().open_shard(whole, ranges)
        rows, table = self.selected[shard["file"]], opened.table.select(self.columns)
        # A copy, because columns are read in long runs of rows.
        return SelectedShard(table if len(rows) == whole["rows"] else table.take(rows))


def open_fold(
    corpus: PreparedCorpus, fold: FoldConfig, with_reserve: bool = False
) -> PreparedCorpus:
    """Return a corpus with the splits of a fold; without folds, with its own but the reserve.

    The columns of keys and units of all shards are read, also those in an object store.

    Args:
        corpus: opened. One that is divided already is returned as it is.
        fold: the fold.
        with_reserve: add the split ``reserve``. Only the final evaluation of a study does.

    Raises:
        UserError: the corpus has no units, a reserved unit is unknown, or a split has no rows.
    """
    if any(isinstance(split, FoldSplit) for split in corpus.splits.values()):
        return corpus
    if not fold.count:
        # A corpus may have a reserve of its own, which is not for a run without folds either.
        kept = {n: s for n, s in corpus.splits.items() if with_reserve or not is_reserve(n)}
        return replace(corpus, splits=kept)
    shards = [(split, shard) for split in corpus.splits.values() for shard in split.shards]
    tables = [split.open_shard(shard).table for split, shard in shards]
    units = [_read_units(table, corpus.name) for table in tables]
    pooled = {
        unit
        for (split, _), names in zip(shards, units, strict=True)
        if split.name in POOL_SPLITS
        for unit in names
    }
    split_of = {unit: fold.find_split(corpus.name, unit) for names in units for unit in names}
    _check_reserved(corpus.name, fold, split_of)
    chosen: dict[str, dict[int, list[int]]] = {name: {} for name in POOL_SPLITS}
    for number, ((split, _), names) in enumerate(zip(shards, units, strict=True)):
        for row, unit in enumerate(names):
            target = _place_row(fold, corpus.name, split.name, unit, split_of[unit], unit in pooled)
            if target is not None and (with_reserve or not is_reserve(target)):
                chosen.setdefault(target, {}).setdefault(number, []).append(row)
    splits: dict[str, CorpusSplit] = {}
    for name, rows in chosen.items():
        if not rows:
            raise UserError(
                f"fold.count: fold {fold.number} of {fold.count} has no rows in the split {name} "
                f"of {corpus.name}, whose splits hold {len(pooled)} units; use fewer folds, or a "
                "larger validation_share"
            )
        splits[name] = _select_rows(name, corpus, shards, tables, rows)
    return PreparedCorpus(corpus.path, corpus.manifest, splits)


def _place_row(
    fold: FoldConfig, corpus: str, split: str, unit: str, assigned: str, is_pooled: bool
) -> str | None:
    """Return the split that reads a row; None if no split of this fold does."""
    if split in POOL_SPLITS:
        return assigned
    is_test = split.startswith("test")
    if not is_pooled:
        # Only a name can reserve it: a part of the pool is reserved, not of all units.
        if not fold.is_reserved_by_name(corpus, unit):
            return split
        # A corpus may have a reserve of its own, such as a voice that no other split contains.
        if is_reserve(split):
            return split
        return RESERVE_SPLIT if is_test else None
    if assigned == RESERVE_SPLIT:
        return RESERVE_SPLIT if is_test else None
    return split if assigned == ("test" if is_test else "train") else None


def _check_reserved(corpus: str, fold: FoldConfig, units: Collection[str]) -> None:
    """Raise UserError if a name matches no unit: the reserve would be smaller than stated."""
    for name in fold.reserve_units.get(corpus, ()):
        if not fnmatch.filter(units, name):
            raise UserError(
                f"fold.reserve_units.{corpus}: no unit is named {name!r}; it has "
                f"{', '.join(sorted(units)[:5])}, …"
            )


def _read_units(table: pa.Table, corpus: str) -> list[str]:
    """Return the unit of each row; a row without one is a unit by itself."""
    for name in ("unit", "key"):
        if name not in table.column_names:
            raise UserError(f"{corpus}: no column {name!r}. Prepare the corpus again.")
    keys, names = table.column("key").to_pylist(), table.column("unit").to_pylist()
    return [name or f"key {key}" for name, key in zip(names, keys, strict=True)]


def _select_rows(
    name: str,
    corpus: PreparedCorpus,
    shards: Sequence[tuple[CorpusSplit, dict[str, Any]]],
    tables: Sequence[pa.Table],
    rows: Mapping[int, Sequence[int]],
) -> FoldSplit:
    entries = [shards[number][1] for number in rows]
    first = tables[next(iter(rows))].column_names
    return FoldSplit(
        name,
        shards[0][0].files,
        # The size of a file stays: a reader opens or downloads all of it.
        tuple(
            {**entry, "rows": len(own)} for entry, own in zip(entries, rows.values(), strict=True)
        ),
        shards[0][0].id_ranges,
        {
            entry["file"]: np.asarray(own, np.int64)
            for entry, own in zip(entries, rows.values(), strict=True)
        },
        {entry["file"]: entry for entry in entries},
        [c for c in first if all(c in tables[number].column_names for number in rows)],
    )
