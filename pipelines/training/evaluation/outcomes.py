"""Outcomes of every test row, for row-by-row comparisons of systems.

``outcomes.parquet`` has one line per row of every evaluated split. The metric of a task is
sum(numerator) / sum(denominator) over the rows of a split. It is the primary one, or the one of
another package that the task chooses:

objective        numerator                                denominator
classification   1 if the class is correct                1
ctc              edit distance to the reference           number of reference symbols
retrieval        queries with a rank of at most 10        number of queries of the row

Rows are numbered as in the prepared split. Two systems are paired by (task, split, row). ``unit``
numbers the units that the split holds out (modules, speakers), in the order of their first rows;
the column ``unit`` of the shard has their names.
:func:`pipelines.training.evaluation.evaluator.evaluate_model` fills an :class:`OutcomeTable`;
comparisons and growth reports read the file.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from skillnet.metrics import ConfidenceInterval
from skillnet_evidence.units import (
    RowOutcomes,
    bound_score,
    compute_unit_error,
    has_equal_rows,
    jackknife_units,
)
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.storage import atomic_write

OUTCOMES_FILE = "outcomes.parquet"
#: The same columns with a line per unit; see :func:`skillnet_evidence.units.sum_outcomes`.
UNIT_SUMS_FILE = "unit_sums.parquet"

# float32 holds integers up to 2**24 exactly, so only mean ranks are rounded in the file.
SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("split", pa.string()),
        ("row", pa.int32()),
        ("numerator", pa.float32()),
        ("denominator", pa.float32()),
        ("rank", pa.float32()),
        ("unit", pa.int32()),
    ]
)


class OutcomeTable(dict[tuple[str, str], RowOutcomes]):
    """Outcomes by (task, split), filled while a model is evaluated."""

    def add(
        self,
        task: str,
        split: str,
        numerator: ArrayLike,
        denominator: ArrayLike,
        rank: ArrayLike | None = None,
        unit: ArrayLike | None = None,
    ) -> None:
        """Add the rows of a split; a second call for the same split replaces the first.

        Args:
            task: name of the task.
            split: name of the split.
            numerator: (N,) see the module docstring.
            denominator: (N,)
            rank: (N,) or None for tasks without a ranking.
            unit: (N,) number of the unit of each row; None counts each row as a unit.
        """
        numerators = np.asarray(numerator, np.float64)
        ranks = np.full(len(numerators), np.nan) if rank is None else np.asarray(rank, np.float64)
        self[task, split] = RowOutcomes(
            numerators,
            np.asarray(denominator, np.float64),
            ranks,
            np.arange(len(numerators)) if unit is None else np.asarray(unit, np.int64),
        )

    def to_table(self) -> pa.Table:
        """Return all outcomes as one table with the columns ``SCHEMA``."""
        tables = []
        for (task, split), part in self.items():
            count = len(part)
            values = (part.numerator, part.denominator, part.rank)
            columns = [
                pa.array([task] * count, pa.string()),
                pa.array([split] * count, pa.string()),
                pa.array(np.arange(count, dtype=np.int32)),
                *(pa.array(x.astype(np.float32)) for x in values),
                pa.array(part.unit.astype(np.int32)),
            ]
            tables.append(pa.Table.from_arrays(columns, schema=SCHEMA))
        return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def write_outcomes(outcomes: OutcomeTable, path: str | Path) -> None:
    """Write the outcomes of a run atomically as Parquet.

    Args:
        outcomes: to write.
        path: file to write.
    """
    with atomic_write(path) as stream:
        pq.write_table(outcomes.to_table(), stream, compression="zstd")


def read_outcomes(path: str | Path) -> OutcomeTable:
    """Read a file that :func:`write_outcomes` wrote.

    Args:
        path: file to read.

    Raises:
        UserError: the file is missing, is not Parquet, or lacks columns or rows.
    """
    try:
        table = pq.read_table(path, schema=None)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; was the run evaluated?") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({first_line(error)})") from None
    absent = [name for name in SCHEMA.names if name not in table.column_names]
    if absent:
        raise UserError(f"{path}: the column {absent[0]} is missing")
    try:
        # The cast checks: a row number that does not fit raises an error and does not wrap.
        table = table.select(SCHEMA.names).cast(SCHEMA)
        table.validate(full=True)
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{path}: invalid outcomes ({first_line(error)})") from None
    outcomes = OutcomeTable()
    tasks, splits = table["task"].to_numpy(), table["split"].to_numpy()
    row, numerator, denominator, rank = (
        table[name].to_numpy().astype(np.float64)
        for name in ("row", "numerator", "denominator", "rank")
    )
    units = table["unit"].to_numpy().astype(np.int64)
    for task, split in dict.fromkeys(zip(tasks.tolist(), splits.tolist(), strict=True)):
        lines = np.flatnonzero((tasks == task) & (splits == split))
        # Systems are paired by position, so rows must be in order and complete.
        lines = lines[np.argsort(row[lines], kind="stable")]
        if not np.array_equal(row[lines], np.arange(len(lines))):
            raise UserError(f"{path}: {task} {split}: rows are missing or duplicated")
        unit = units[lines]
        if unit.min(initial=0) < 0 or unit.max(initial=0) >= max(len(lines), 1):
            raise UserError(f"{path}: {task} {split}: a unit has no number of a row")
        outcomes.add(task, split, numerator[lines], denominator[lines], rank[lines], unit)
    return outcomes


def paired_difference(one: RowOutcomes, other: RowOutcomes) -> ConfidenceInterval:
    """Return the primary metric of ``one`` minus that of ``other``, with its interval.

    The difference is formed row by row. Rows that are difficult for both models therefore do not
    widen the interval.

    Args:
        one: outcomes of the first model.
        other: outcomes of the second model on the same rows.

    Raises:
        ValueError: the outcomes belong to different rows.
    """
    # Row counts can agree by accident; lengths, query counts and units are a second check.
    if not has_equal_rows(one, other):
        raise ValueError(f"{len(one)} and {len(other)} outcomes are not of the same rows")
    effects = jackknife_units(one.numerator - other.numerator, one.denominator, one.unit)
    value, effects_K = float(effects.values_S[0]), effects.effects_SK[0]
    bounds = bound_score(value, compute_unit_error(effects_K), effects.dof, len(effects_K))
    return ConfidenceInterval(value, *bounds)
