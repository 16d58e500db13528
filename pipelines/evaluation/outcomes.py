"""What became of every test row: the file from which systems are compared row by row.

``outcomes.parquet`` holds one line per row of every evaluated split. A task's primary metric is
sum(amount) / sum(weight) over the rows of a split:

objective        amount                                   weight
classification   1 if the class is right                  1
ctc              edit distance to the right symbols       number of right symbols
retrieval        queries with a rank of at most 10        number of queries of the row

Rows are numbered as in the prepared split, so that two systems pair by (task, split, row).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from skillnet.metrics import ConfidenceInterval, bootstrap_interval, ratio_of_sums
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.storage import atomic_write

FILE = "outcomes.parquet"

#: A retrieved row counts as found up to this rank.
FOUND_AT = 10

SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("split", pa.string()),
        ("row", pa.int32()),
        ("amount", pa.float32()),
        ("weight", pa.float32()),
        ("rank", pa.float32()),
    ]
)


@dataclass(frozen=True)
class RowOutcomes:
    """Outcomes of one task's split, in the order of its rows.

    Args:
        amount: (N,) float64, see the head of this file.
        weight: (N,) float64.
        rank: (N,) float64, from 1; NaN where nothing is ranked.
    """

    amount: np.ndarray
    weight: np.ndarray
    rank: np.ndarray

    def __len__(self) -> int:
        return len(self.amount)

    @property
    def value(self) -> float:
        """The primary metric, a fraction."""
        total = float(self.weight.sum())
        return float(self.amount.sum()) / total if total else float("nan")


class OutcomeTable:
    """Collects outcomes while a model is evaluated; knows them by (task, split)."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, str], RowOutcomes] = {}

    def hits(self, task: str, split: str, right: ArrayLike) -> None:
        """Rows that are right or wrong, (N,) booleans."""
        amount = np.asarray(right, np.float64)
        self.add(task, split, amount, np.ones(len(amount)))

    def ranks(
        self, task: str, split: str, ranks: ArrayLike, owners: np.ndarray | None = None
    ) -> None:
        """Queries with the rank of their best right candidate, (Q,) from 1.

        A row has one query, or those whose ``owners``, in ascending order, name it; its rank is
        then their mean.
        """
        rank = np.asarray(ranks, np.float64)
        found: np.ndarray = (rank <= FOUND_AT).astype(np.float64)
        weight: np.ndarray = np.ones(len(rank))
        if owners is not None:
            weight = np.bincount(owners).astype(np.float64)
            found = np.bincount(owners, found)
            rank = np.bincount(owners, rank) / weight
        self.add(task, split, found, weight, rank)

    def add(
        self,
        task: str,
        split: str,
        amount: ArrayLike,
        weight: ArrayLike,
        rank: ArrayLike | None = None,
    ) -> None:
        """Amounts and weights of a split's rows, each (N,); a second call replaces the first."""
        amounts = np.asarray(amount, np.float64)
        ranks = np.full(len(amounts), np.nan) if rank is None else np.asarray(rank, np.float64)
        self._parts[task, split] = RowOutcomes(amounts, np.asarray(weight, np.float64), ranks)

    def __getitem__(self, key: tuple[str, str]) -> RowOutcomes:
        return self._parts[key]

    def __contains__(self, key: object) -> bool:
        return key in self._parts

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def table(self) -> pa.Table:
        """All of them, with the columns ``SCHEMA``."""
        tables = []
        for (task, split), part in self._parts.items():
            count = len(part)
            columns = [
                pa.array([task] * count, pa.string()),
                pa.array([split] * count, pa.string()),
                pa.array(np.arange(count, dtype=np.int32)),
                *(pa.array(x.astype(np.float32)) for x in (part.amount, part.weight, part.rank)),
            ]
            tables.append(pa.Table.from_arrays(columns, schema=SCHEMA))
        return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def write_outcomes(outcomes: OutcomeTable, path: str | Path) -> None:
    """Write a run's outcomes; readers see the whole file or none."""
    with atomic_write(path) as stream:
        pq.write_table(outcomes.table(), stream, compression="zstd")


def read_outcomes(path: str | Path) -> OutcomeTable:
    """Read what :func:`write_outcomes` wrote.

    Raises:
        UserError: no such file, another kind of file, missing columns or rows.
    """
    try:
        table = pq.read_table(path, schema=None)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; was the run evaluated?") from None
    except (pa.ArrowException, OSError) as problem:
        raise UserError(f"{path}: not a Parquet file ({first_line(problem)})") from None
    absent = [name for name in SCHEMA.names if name not in table.column_names]
    if absent:
        raise UserError(f"{path}: the column {absent[0]} is missing")
    try:
        table = table.select(SCHEMA.names).cast(SCHEMA)
        table.validate(full=True)
    except (pa.ArrowException, ValueError) as problem:
        raise UserError(f"{path}: not what a run wrote ({first_line(problem)})") from None
    found = OutcomeTable()
    tasks, splits = table["task"].to_numpy(), table["split"].to_numpy()
    row, amount, weight, rank = (
        table[name].to_numpy().astype(np.float64) for name in ("row", "amount", "weight", "rank")
    )
    for task, split in dict.fromkeys(zip(tasks.tolist(), splits.tolist(), strict=True)):
        place = np.flatnonzero((tasks == task) & (splits == split))
        place = place[np.argsort(row[place], kind="stable")]
        if not np.array_equal(row[place], np.arange(len(place))):
            raise UserError(f"{path}: {task} {split}: rows are missing or there twice")
        found.add(task, split, amount[place], weight[place], rank[place])
    return found


def paired_difference(
    one: RowOutcomes, other: RowOutcomes, seed: int = 0, samples: int = 1000
) -> ConfidenceInterval:
    """Primary metric of ``one`` less that of ``other`` on the same rows.

    The interval comes from drawing rows, both models' outcomes of a row together: what is hard
    for both does not count as a difference between them.

    Raises:
        ValueError: they are not of the same rows.
    """
    if len(one) != len(other) or not np.array_equal(one.weight, other.weight):
        raise ValueError(f"{len(one)} and {len(other)} outcomes are not of the same rows")
    rows_N2 = np.stack([one.amount - other.amount, one.weight], 1)
    return bootstrap_interval(rows_N2, ratio_of_sums, seed=seed, samples=samples)
