"""Columns of the shards that a task reads: splits, inputs, targets and ranges of their ids."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from pipelines.data.shards.columns import (
    PAIRED_PREFIX,
    Column,
    FixedColumn,
    RaggedColumn,
)
from pipelines.data.shards.id_columns import OUTPUT_COLUMNS, TOKEN_COLUMNS, IdRange
from pipelines.training.loading.shard_table import ShardTable
from skillnet.config import SkillNetConfig
from skillnet.modality import find_modality
from skillnet.objectives.base import find_objective
from skillnet.skills import Task
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from pipelines.data.shards.dataset import PreparedCorpus

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
