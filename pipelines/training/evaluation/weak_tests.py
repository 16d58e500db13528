"""Reasons why a figure of an evaluation proves little: rows of the training, or no possible error.

:func:`find_weak_tests` is the entry point. Training runs and ``skillnet evaluate`` print its
sentences. The registration refuses a model that has seen test rows, and notes the other reasons on
the page of the version.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.data.config.folds import FoldConfig
from pipelines.data.shards.dataset import PreparedCorpus
from pipelines.data.shards.row_checks import ROW_CHECKS, describe_shared, is_constant
from pipelines.training.evaluation.evaluator import (
    choose_splits,
    open_task_corpus,
    read_fixed_column,
)
from pipelines.training.evaluation.tables import metric_label
from pipelines.training.loading.task_columns import PRETRAINING
from pipelines.training.runs.model_source import TrainingRead
from skillnet.objectives.base import find_objective
from skillnet.objectives.retrieval import unique_group_ids
from skillnet.skills import Task, find_task

#: Ranks that the recalls of a retrieval count, the primary one last.
_RECALL_RANKS = (1, 5, 10)


class WeakTest(NamedTuple):
    """A reason why a figure proves little, and whether it comes from rows of the training."""

    sentence: str
    is_seen: bool


def find_weak_tests(
    data: str | Path,
    tasks: Mapping[str, Task],
    reads: Sequence[TrainingRead],
    *,
    corpora: Mapping[str, str] | None = None,
    splits: Sequence[str] | None = None,
    fold: FoldConfig | None = None,
) -> list[WeakTest]:
    """Return the weaknesses of an evaluation; none if its figures can be trusted.

    Args:
        data: directory of prepared corpora.
        tasks: name -> evaluated task.
        reads: splits that the model was trained on.
        corpora: task -> corpus; other tasks use the built-in corpus.
        splits: evaluated splits; None takes the test splits.
        fold: fold that the training reads. Its splits are not those that ``prepare`` compared.

    Raises:
        UserError: a corpus is missing or damaged.
    """
    weaknesses: list[WeakTest] = []
    for name in tasks:
        task = find_task(name, dict(tasks))
        if not find_objective(task.objective).has_labels:
            continue
        corpus = open_task_corpus(data, name, corpora, fold)
        for split in choose_splits(corpus, splits):
            is_fold = bool(fold and fold.count)
            seen = _find_seen_rows(corpus, split, reads, is_fold)
            certain = _find_certain_metrics(corpus, split, task)
            weaknesses += [WeakTest(f"{name}: {each}", True) for each in seen]
            weaknesses += [WeakTest(f"{name}: {each}", False) for each in certain]
    return weaknesses


def _find_seen_rows(
    corpus: PreparedCorpus,
    split: str,
    reads: Sequence[TrainingRead],
    is_fold: bool,
) -> Iterator[str]:
    """Yield which rows of a split were in the training, or have the input of a row of it."""
    shared = corpus.manifest.get(ROW_CHECKS, {}).get("shared", {}).get(split, {})
    stated: set[str] = set()
    for read in reads:
        # Rows of a corpus in two media come from others.
        if read.corpus not in (corpus.name, *corpus.source_names):
            continue
        pretrained = corpus.manifest.get("pretraining", ())
        for trained in pretrained if read.split == PRETRAINING else (read.split,):
            if trained in stated:
                continue
            stated.add(trained)
            if trained == split:
                yield (
                    f"the split {split} of {corpus.name} was the training data of the task "
                    f"{read.task}. Train on another split: --tasks.{read.task}.split train"
                )
            elif not is_fold and (count := shared.get(trained, 0)):
                yield (
                    f"{describe_shared(split, count, corpus.splits[split].rows, trained)} of "
                    f"{corpus.name}, which the task {read.task} was trained on. Remove these rows "
                    "from one of the splits, and prepare and train again"
                )


def _find_certain_metrics(corpus: PreparedCorpus, split: str, task: Task) -> Iterator[str]:
    """Yield which metrics of a split are perfect for every model, or for a constant answer."""
    table = corpus.splits[split].table()
    rows = f"{len(table)} {'row' if len(table) == 1 else 'rows'} of {split} of {corpus.name}"
    objective = find_objective(task.objective)
    if not objective.pairs_towers:
        for column in objective.target_columns:
            if column in table.column_names and is_constant(table, column):
                yield (
                    f"the {rows} have one {column}, so a constant answer is right for all of them. "
                    "Give the split rows with other answers"
                )
        return
    groups = unique_group_ids(read_fixed_column(table, "group", f"{corpus.name}/{split}"))
    sizes = np.unique(groups, return_counts=True)[1]
    if task.has_row_pairs:
        sizes = sizes[sizes > 1]  # a row alone in its group is no query
    if not len(sizes):
        return
    worst = len(table) - int(sizes.min()) + 1
    certain = [rank for rank in _RECALL_RANKS if worst <= rank]
    if certain:
        metrics = ", ".join(metric_label(f"recall_at_{rank}") for rank in certain)
        yield (
            f"{metrics} is 100 % for every model, because the {rows} are too few candidates. Give "
            f"the split more than {_RECALL_RANKS[-1]} different rows"
        )
