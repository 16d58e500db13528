"""Splits that select rows of prepared shards when they are read; no corpus is prepared again.

Folds (:mod:`pipelines.data.shards.folds`) and label fractions
(:mod:`pipelines.data.shards.label_fractions`) build them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.data.shards.dataset import CorpusSplit
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
