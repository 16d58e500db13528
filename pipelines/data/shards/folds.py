"""Folds of a prepared corpus: its rows are assigned to splits by held-out unit when it is read.

The rows of the splits train, validation and test are one pool. A fold divides the units of the
pool among these splits again, and over all folds each row is tested once (decision 58). No corpus
is prepared again: :func:`open_fold` returns splits that select rows of the same shards. A row
without the name of a unit is a unit by itself, with its key as the name. A corpus that labels the
rows of another holds out the same units as that one.

Rows of other splits stay where they are, unless the pool has their unit: then a row for pretraining
is read only if its unit is trained, and a row of another test split only if its unit is tested.

With :func:`select_label_fraction` a task trains on a part of its rows, chosen by held-out unit: a
seed and the names of the units put them in an order, and the first of them that hold the fraction
of the rows are read. A fraction of a seed is therefore a part of every larger one. Other tasks on
the corpus, such as its masked task, read all rows, as do evaluations.
"""

import fnmatch
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.config.folds import RESERVE_SPLIT, FoldConfig, draw_unit, is_reserve
from pipelines.data.shards.dataset import CorpusSplit, PreparedCorpus
from pipelines.data.shards.files import OpenShard
from pipelines.data.shards.id_columns import IdRange
from pipelines.data.shards.shard_list import SelectedShards, ShardList
from skillnet_platform.config import digest_config
from skillnet_platform.errors import UserError


@dataclass(frozen=True)
class SelectedSplit(CorpusSplit):
    """Selected rows of the shards of a corpus.

    Args:
        base: split that opens the shards.
        columns: columns that all shards of the split have.
    """

    base: CorpusSplit | None = None
    columns: Sequence[str] = ()

    def open_shard(
        self, shard: Mapping[str, Any], ranges: Mapping[str, IdRange] | None = None
    ) -> OpenShard:
        """Open a shard and return its selected rows; see :meth:`CorpusSplit.open_shard`."""
        assert self.base is not None
        assert isinstance(self.shards, SelectedShards)
        whole = self.shards.find_whole(shard["place"])
        opened = self.base.open_shard(whole, ranges)
        rows = self.shards.selected_rows(shard["place"])
        table = opened.table.select(self.columns)
        # A copy, because columns are read in long runs of rows.
        return OpenShard(table if len(rows) == whole["rows"] else table.take(rows))


def select_rows(
    name: str,
    base: CorpusSplit,
    rows: Sequence[tuple[int, pa.Table, Sequence[int] | np.ndarray]],
) -> SelectedSplit:
    """Return a split with some rows of some shards.

    Args:
        name: split, such as ``test``.
        base: split that opens the shards.
        rows: place of each shard in ``base``, its table, and the numbers of its rows, ascending.
    """
    first = rows[0][1].column_names
    return SelectedSplit(
        name,
        base.files,
        SelectedShards(
            base.shards,
            [place for place, _, _ in rows],
            [np.asarray(own, np.int64) for _, _, own in rows],
        ),
        base.id_ranges,
        base,
        [c for c in first if all(c in table.column_names for _, table, _ in rows)],
    )


def list_row_units(table: pa.Table, corpus: str) -> list[str]:
    """Return the held-out unit of each row; a row without one is a unit by itself.

    Args:
        table: rows of a shard.
        corpus: name of the corpus, for messages.

    Raises:
        UserError: the rows have no units.
    """
    for name in ("unit", "key"):
        if name not in table.column_names:
            raise UserError(f"{corpus}: no column {name!r}. Prepare the corpus again.")
    keys, names = table.column("key").to_pylist(), table.column("unit").to_pylist()
    return [name or f"key {key}" for name, key in zip(names, keys, strict=True)]


def select_label_fraction(
    corpus: PreparedCorpus, splits: Sequence[str], fraction: float, seed: int = 0
) -> PreparedCorpus:
    """Return a corpus whose splits have a fraction of their rows, at least one unit in all.

    The columns of keys and units of the splits are read, also those in an object store.

    Args:
        corpus: opened, with the splits of its fold.
        splits: names of the splits that the task trains on.
        fraction: share of their rows, in (0, 1]; 1 returns the corpus as it is.
        seed: start of the random numbers of the choice.

    Raises:
        UserError: the rows have no units.
    """
    if fraction == 1:
        return corpus
    tables = {
        name: [
            (shard, corpus.splits[name].open_shard(shard).table)
            for shard in corpus.splits[name].shards
        ]
        for name in splits
    }
    units = {
        name: [list_row_units(table, corpus.name) for _, table in own]
        for name, own in tables.items()
    }
    counts = Counter(unit for own in units.values() for each in own for unit in each)
    chosen = _choose_units(counts, ceil(fraction * counts.total()), corpus.name, seed)
    selected: dict[str, CorpusSplit] = dict(corpus.splits)
    for name, own in tables.items():
        rows = [
            (shard["place"], table, [row for row, unit in enumerate(each) if unit in chosen])
            for (shard, table), each in zip(own, units[name], strict=True)
        ]
        kept = [entry for entry in rows if entry[2]]
        del selected[name]
        if kept:
            selected[name] = select_rows(name, corpus.splits[name], kept)
    return replace(corpus, splits=selected)


def _choose_units(counts: Counter[str], rows: int, corpus: str, seed: int) -> set[str]:
    """Return the first units, in the order of the seed, that have a number of rows together."""
    purpose = f"labels of seed {seed}"
    order = sorted(counts, key=lambda unit: (draw_unit(purpose, corpus, unit), unit))
    chosen: set[str] = set()
    for unit in order:
        if rows <= 0:
            break
        chosen.add(unit)
        rows -= counts[unit]
    return chosen


#: Splits whose rows a fold assigns again.
POOL_SPLITS = ("train", "validation", "test")
#: Split -> number of a shard -> (rows,) its rows.
Chosen = dict[str, dict[int, np.ndarray]]
#: Folds whose rows are kept in memory: 5 corpora of 20 folds, about half a megabyte each.
KNOWN_FOLDS = 100
#: Digest, splits, fold and reserve -> rows. A study opens the same folds for hundreds of runs.
_chosen: dict[tuple[str, ...], Chosen] = {}


def open_fold(
    corpus: PreparedCorpus, fold: FoldConfig, with_reserve: bool = False
) -> PreparedCorpus:
    """Return a corpus with the splits of a fold; without folds, with its own but the reserve.

    The columns of keys and units of all shards are read, also those in an object store.

    Args:
        corpus: opened. One that is divided already is returned as it is.
        fold: number of folds, and the one that is tested.
        with_reserve: add the split ``reserve``. Only the final evaluation of a study does.

    Raises:
        UserError: the corpus has no units, a reserved unit is unknown, or a split has no rows.
    """
    if any(isinstance(split, SelectedSplit) for split in corpus.splits.values()):
        return corpus
    if not fold.count:
        # A corpus may have a reserve of its own, which is not for a run without folds either.
        kept = {n: s for n, s in corpus.splits.items() if with_reserve or not is_reserve(n)}
        return replace(corpus, splits=kept)
    shards = [(split, shard) for split in corpus.splits.values() for shard in split.shards]
    tables = [split.open_shard(shard).table for split, shard in shards]
    names = [split.name for split, _ in shards]
    key = (corpus.digest, *names, digest_config(fold), str(with_reserve))
    if key not in _chosen:
        while len(_chosen) >= KNOWN_FOLDS:
            del _chosen[next(iter(_chosen))]
        _chosen[key] = _choose_rows(
            corpus.name, find_unit_source(corpus), fold, names, tables, with_reserve
        )
    splits: dict[str, CorpusSplit] = {}
    first = shards[0][0]
    assert isinstance(first.shards, ShardList)
    whole = replace(first, shards=first.shards.select())
    for name, rows in _chosen[key].items():
        own = [(shards[place][1]["number"], tables[place], each) for place, each in rows.items()]
        splits[name] = select_rows(name, whole, own)
    return PreparedCorpus(corpus.path, corpus.manifest, splits)


def find_unit_source(corpus: PreparedCorpus) -> str:
    """Return the corpus that the units of a corpus are from: itself, or the one that it labels.

    Both hold out the same units, so a model of one has seen no test row of the other.

    Args:
        corpus: opened.
    """
    return corpus.source_names[0] if len(corpus.source_names) == 1 else corpus.name


def _choose_rows(
    corpus: str,
    source: str,
    fold: FoldConfig,
    names: Sequence[str],
    tables: Sequence[pa.Table],
    with_reserve: bool,
) -> Chosen:
    """Return the rows of each split of a fold.

    Args:
        corpus: name of the corpus.
        source: corpus that its units are from.
        fold: number of folds, and the one that is tested.
        names: split of each shard, as prepared.
        tables: rows of each shard.
        with_reserve: add the split ``reserve``.

    Raises:
        UserError: see :func:`open_fold`.
    """
    units = [list_row_units(table, corpus) for table in tables]
    pooled = {
        unit
        for name, of_rows in zip(names, units, strict=True)
        if name in POOL_SPLITS
        for unit in of_rows
    }
    split_of = {unit: fold.find_split(source, unit) for unit in set().union(*units)}
    # A rule may leave out all rows of a unit.
    if source == corpus:
        _check_reserved(corpus, fold, split_of)
    chosen: dict[str, dict[int, list[int]]] = {name: {} for name in POOL_SPLITS}
    for number, (name, of_rows) in enumerate(zip(names, units, strict=True)):
        for row, unit in enumerate(of_rows):
            target = _place_row(fold, source, name, unit, split_of[unit], unit in pooled)
            if target is not None and (with_reserve or not is_reserve(target)):
                chosen.setdefault(target, {}).setdefault(number, []).append(row)
    for name, rows in chosen.items():
        if not rows:
            raise UserError(
                f"fold.count: fold {fold.number} of {fold.count} has no rows in the split {name} "
                f"of {corpus}, whose splits hold {len(pooled)} units; use fewer folds, or a "
                "larger validation_share"
            )
    return {
        name: {number: np.asarray(each, np.int64) for number, each in rows.items()}
        for name, rows in chosen.items()
    }


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
