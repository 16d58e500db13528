"""Splits that select rows of prepared shards when they are read; no corpus is prepared again.

Folds (:mod:`pipelines.data.shards.folds`) and label fractions build
them. With :func:`select_label_fraction` a task trains on a part of its rows, chosen by held-out
unit: a seed and the names of the units put them in
an order, and the first of them that hold the fraction of the rows are read. A fraction of a seed is
therefore a part of every larger one. Other tasks on the corpus, such as its masked task, read all
rows, as do evaluations.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.data.config.folds import draw_unit
from pipelines.data.shards.dataset import CorpusSplit, PreparedCorpus
from pipelines.data.shards.files import OpenShard
from pipelines.data.shards.id_columns import IdRange
from skillnet_platform.errors import UserError


class SelectedShard(NamedTuple):
    """Rows of a shard, copied out of its file."""

    table: pa.Table


@dataclass(frozen=True)
class SelectedSplit(CorpusSplit):
    """Selected rows of the shards of a corpus.

    Args:
        base: split that opens the shards.
        selected: file of a shard -> (rows,) numbers of its selected rows, ascending.
        whole: file of a shard -> its entry in ``base``.
        columns: columns that all shards of the split have.
    """

    base: CorpusSplit | None = None
    selected: Mapping[str, np.ndarray] = field(default_factory=dict)
    whole: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    columns: Sequence[str] = ()

    def open_shard(
        self, shard: Mapping[str, Any], ranges: Mapping[str, IdRange] | None = None
    ) -> OpenShard:
        """Open a shard and return its selected rows; see :meth:`CorpusSplit.open_shard`."""
        assert self.base is not None
        whole = self.whole[shard["file"]]
        opened = self.base.open_shard(whole, ranges)
        rows, table = self.selected[shard["file"]], opened.table.select(self.columns)
        # A copy, because columns are read in long runs of rows.
        return SelectedShard(table if len(rows) == whole["rows"] else table.take(rows))


def select_rows(
    name: str,
    base: CorpusSplit,
    rows: Sequence[tuple[dict[str, Any], pa.Table, Sequence[int] | np.ndarray]],
) -> SelectedSplit:
    """Return a split with some rows of some shards.

    Args:
        name: split, such as ``test``.
        base: split that opens the shards.
        rows: entry of each shard in ``base``, its table, and the numbers of its rows, ascending.
    """
    first = rows[0][1].column_names
    return SelectedSplit(
        name,
        base.files,
        # The size of a file stays: a reader opens or downloads all of it.
        tuple({**entry, "rows": len(own)} for entry, _, own in rows),
        base.id_ranges,
        base,
        {entry["file"]: np.asarray(own, np.int64) for entry, _, own in rows},
        {entry["file"]: entry for entry, _, _ in rows},
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
            (shard, table, [row for row, unit in enumerate(each) if unit in chosen])
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
