"""Columns of the shards that a task reads: splits, inputs, targets and ranges of their ids.

A split on disk is opened as a unit: it is memory-mapped and costs nothing. Of a split in an object
store, or one that is read in windows, only the shards of the current batches are open
(:class:`ShardTable`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines.data.shards.columns import (
    PAIRED_PREFIX,
    Column,
    FixedColumn,
    RaggedColumn,
    open_column,
)
from pipelines.data.shards.dataset import CorpusSplit
from pipelines.data.shards.files import OpenShard
from pipelines.data.shards.id_columns import OUTPUT_COLUMNS, TOKEN_COLUMNS, IdRange
from skillnet.config import SkillNetConfig
from skillnet.modality import find_modality
from skillnet.objectives.base import find_objective
from skillnet.skills import Task
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from pipelines.data.shards.dataset import PreparedCorpus

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


#: Name of a task's split that stands for the splits that a corpus allows for pretraining.
PRETRAINING = "pretraining"


def resolve_splits(corpus: "PreparedCorpus", split: str) -> tuple[str, ...]:
    """Return the splits that a task's ``split`` stands for.

    Args:
        corpus: shards of the task.
        split: name of a split, or ``pretraining``.

    Raises:
        UserError: the corpus has no such split, or allows none for pretraining.
    """
    if split == PRETRAINING:
        allowed = corpus.manifest.get("pretraining", ())
        splits = tuple(name for name in allowed if name in corpus.splits)
        if not splits:
            raise UserError(
                f"corpus {corpus.name} names no split for pretraining in its manifest; prepare it "
                f"again, or name one of {', '.join(corpus.splits)}"
            )
        return splits
    if split not in corpus.splits:
        raise UserError(
            f"corpus {corpus.name} has no split {split!r}; it has {', '.join(corpus.splits)}"
        )
    return (split,)


def tower_column(task: Task, tower: str) -> str:
    """Return the column that a tower reads.

    Args:
        task: task that the tower belongs to.
        tower: its name.
    """
    if tower == task.caption_tower:
        return "caption_tokens"
    column = find_modality(task.towers[tower].modality).column
    return PAIRED_PREFIX + column if tower == task.paired_tower else column


def is_row_tower(task: Task, tower: str) -> bool:
    """Return whether a tower reads the rows in the corpus' own modality.

    Args:
        task: task that the tower belongs to.
        tower: its name.
    """
    return tower not in (task.caption_tower, task.paired_tower)


def check_split_columns(
    name: str, task: Task, corpus: "PreparedCorpus", split: str, model: SkillNetConfig
) -> None:
    """Check that the evaluation of a task can read a split, before the training.

    Shards in an object store are not read: that would download them on the driver.

    Args:
        name: task name.
        task: its objective and towers.
        corpus: opened corpus of the task.
        split: name of the split.
        model: sizes of the model.

    Raises:
        UserError: a shard is damaged, a column is missing, or an id is outside of its range.
    """
    location = f"{corpus.name}/{split}"
    table = ShardTable([corpus.splits[split]], location, model_id_ranges(name, task, model))
    if not table.is_remote:
        table.open()
        inputs = [tower_column(task, tower) for tower in task.towers]
        for column in (*inputs, *find_objective(task.objective).target_columns):
            table.column(column)


def model_id_ranges(name: str, task: Task, model: SkillNetConfig) -> dict[str, IdRange]:
    """Return column -> range of the ids that a task reads, from the sizes of its model.

    Args:
        name: task name.
        task: its objective decides which targets it reads.
        model: sizes of the model.
    """
    tokens = IdRange(f"model.vocab_size is {model.vocab_size}", model.vocab_size)
    ranges = dict.fromkeys(TOKEN_COLUMNS, tokens)
    return ranges | target_id_ranges(task, f"model.tasks.{name}.outputs is {task.outputs}")


def target_id_ranges(task: Task, source: str) -> dict[str, IdRange]:
    """Return column -> range of the ids of its targets.

    Args:
        task: its objective decides which targets it reads.
        source: states where the number of outputs comes from, for messages.
    """
    objective = find_objective(task.objective)
    first = objective.unnamed_outputs
    columns = [each for each in OUTPUT_COLUMNS if each in objective.target_columns]
    return dict.fromkeys(columns, IdRange(source, task.outputs + first, first))


def take_targets(
    task: Task, open_target: Callable[[str], Column], rows: np.ndarray, where: str
) -> dict[str, np.ndarray]:
    """Return the targets of rows by name, with the rows as first axis.

    Args:
        task: its objective names the columns.
        open_target: opens a column.
        rows: (B,) row numbers.
        where: corpus and split, for messages.

    Raises:
        UserError: a column holds another kind of values.
    """
    targets = {}
    for target, name, kind in find_objective(task.objective).columns:
        column = open_target(name)
        if isinstance(column, FixedColumn) and kind == "value":
            targets[target] = column.take(rows)
        elif isinstance(column, RaggedColumn) and kind != "value":
            ids, lengths = column.take(rows)
            if kind == "set":
                targets[target] = _make_indicators(ids, lengths, task.outputs)
            else:
                targets |= {target: ids, f"{target}_lengths": lengths}
        else:
            expected = "one number" if kind == "value" else "a list of numbers"
            raise UserError(
                f"{where}: column {name!r} holds other values than {expected} per row, which a "
                f"{task.objective} task reads. Prepare the corpus again"
            )
    return targets


def _make_indicators(ids_BL: np.ndarray, lengths_B: np.ndarray, outputs: int) -> np.ndarray:
    """Return sets of classes as (B, C) float32: 1 for the classes of a row, else 0."""
    indicators = np.zeros((len(lengths_B), outputs), np.float32)
    rows, places = np.nonzero(np.arange(ids_BL.shape[1]) < lengths_B[:, None])
    indicators[rows, ids_BL[rows, places]] = 1
    return indicators
