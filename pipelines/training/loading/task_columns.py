"""Columns of the shards that a task reads: splits, inputs, targets and ranges of their ids."""

from typing import TYPE_CHECKING

import numpy as np

from pipelines.data.shards.columns import INPUT_COLUMNS, PAIRED_PREFIX
from pipelines.data.shards.id_columns import TOKEN_COLUMNS, IdRange
from pipelines.training.loading.shard_table import ShardTable
from skillnet.config import SkillNetConfig
from skillnet.objectives import find_objective
from skillnet.skills import Task
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from pipelines.data.shards.dataset import PreparedCorpus

#: Name of a task's split that stands for the splits that a corpus allows for pretraining.
PRETRAINING = "pretraining"


def resolve_splits(corpus: "PreparedCorpus", split: str) -> tuple[str, ...]:
    """Return the splits that a task's ``split`` stands for.

    Args:
        corpus: of the task.
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
        task: of the tower.
        tower: its name.
    """
    if tower == task.caption_tower:
        return "caption_tokens"
    column = INPUT_COLUMNS[task.towers[tower].modality]
    return PAIRED_PREFIX + column if tower == task.paired_tower else column


def is_row_tower(task: Task, tower: str) -> bool:
    """Return whether a tower reads the rows in the corpus' own modality.

    Args:
        task: of the tower.
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
        paired = [tower_column(task, task.paired_tower)] if task.paired_tower else []
        for column in (INPUT_COLUMNS[corpus.modality], *paired, *list_target_columns(task)):
            table.column(column)


def list_target_columns(task: Task) -> tuple[str, ...]:
    """Return the columns with the targets of a task.

    Args:
        task: its objective names them; a retrieval task without a text tower pairs groups.
    """
    is_pair = task.objective == "retrieval" and task.caption_tower is None
    return ("group",) if is_pair else find_objective(task.objective).target_columns


def model_id_ranges(name: str, task: Task, model: SkillNetConfig) -> dict[str, IdRange]:
    """Return column -> range of the ids that a task reads, from the sizes of its model.

    Args:
        name: task name.
        task: its objective decides which targets it reads.
        model: sizes of the model.
    """
    tokens = IdRange(f"model.vocab_size is {model.vocab_size}", model.vocab_size)
    ranges = dict.fromkeys(TOKEN_COLUMNS, tokens)
    source = f"model.tasks.{name}.outputs is {task.outputs}"
    for column in {"label", "label_set"} & set(find_objective(task.objective).target_columns):
        ranges[column] = IdRange(source, task.outputs)
    if task.objective == "ctc":
        ranges["symbols"] = IdRange(source, task.outputs + 1, first=1)
    return ranges


def make_indicators(ids: np.ndarray, lengths: np.ndarray, outputs: int, where: str) -> np.ndarray:
    """Return sets of classes as (B, C) float32: 1 for the classes of a row, else 0.

    Args:
        ids: (B, L) class numbers, padded with zeros.
        lengths: (B,) classes of each row.
        outputs: number of classes C.
        where: corpus and split, for messages.

    Raises:
        UserError: a class number is outside of the outputs.
    """
    IdRange(f"the model has {outputs} outputs", outputs).check_copy(ids, f"{where}: set of classes")
    indicators = np.zeros((len(lengths), outputs), np.float32)
    rows, places = np.nonzero(np.arange(ids.shape[1]) < lengths[:, None])
    indicators[rows, ids[rows, places]] = 1
    return indicators
