"""Evaluation of a model on prepared corpora: tidy rows with intervals over held-out units.

The main entry point is :func:`evaluate_model`; ``skillnet evaluate``, training runs, sweeps and
growth reports call it. Every row of a split is used exactly once. In retrieval, the query of a row
is its first caption (a name; further captions are keywords). If the manifest of the corpus declares
``queries: all``, every caption is a query (the five captions of a photograph). All rows of the
split are candidates; rows of the same group are correct answers for one another.
"""

import datetime
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.config.folds import FoldConfig, is_reserve
from pipelines.data.shards.columns import FixedColumn, open_column
from pipelines.data.shards.dataset import CorpusSplit, PreparedCorpus, open_corpus
from pipelines.data.shards.folds import open_fold
from pipelines.data.shards.id_columns import check_ids
from pipelines.training.config.data import MaskConfig
from pipelines.training.config.run import default_masked_training, default_tasks_training
from pipelines.training.evaluation.inference import (
    EvaluationRanks,
    InferenceInputs,
    InferenceRunner,
    mean_row_lengths,
    measure_hidden,
    split_inputs,
)
from pipelines.training.evaluation.outcomes import OutcomeTable
from pipelines.training.evaluation.tables import COLUMNS, find_metric, mark_ranked_row, sort_rows
from pipelines.training.loading.task_columns import (
    is_row_tower,
    take_targets,
    target_id_ranges,
    tower_column,
)
from pipelines.training.runs.vocabulary_match import align_outputs
from skillnet.accounting import account_task
from skillnet.metrics import MetricIntervals, TaskMetrics, cut_to_bounds
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective
from skillnet.objectives.heads import head_class
from skillnet.skills import Task, find_task
from skillnet_evidence.units import number_units
from skillnet_platform.errors import UserError
from skillnet_platform.storage.location import Location, join_location, parse_location

UNIT_COLUMN = "unit"


def read_unit_numbers(table: pa.Table, where: str) -> np.ndarray:
    """Return the number of each row's unit, in the order of the units' first rows, (N,) int64.

    Args:
        table: rows of a split.
        where: names the split in error messages.

    Raises:
        UserError: the column is missing.
    """
    if UNIT_COLUMN not in table.column_names:
        raise UserError(f"{where}: no column {UNIT_COLUMN!r}. Prepare the corpus again.")
    codes = table.column(UNIT_COLUMN).combine_chunks().dictionary_encode().indices
    known = codes.fill_null(-1).to_numpy().astype(np.int64)
    # Negative numbers cannot be those of a name.
    return number_units(np.where(known < 0, -1 - np.arange(len(known)), known))


def evaluate_model(
    model: TaskModel,
    data: str | Path,
    tasks: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    *,
    seed: int = 0,
    corpora: Mapping[str, str] | None = None,
    limits: Mapping[str, int | None] | None = None,
    metrics: Mapping[str, str | None] | None = None,
    system: str | None = None,
    steps: int | None = None,
    precision: str = "auto",
    bootstrap_samples: int = 1000,
    on_split: Callable[[str, str, int, int], None] | None = None,
    outcomes: OutcomeTable | None = None,
    masks: MaskConfig | None = None,
    ranks: EvaluationRanks | None = None,
    fold: FoldConfig | None = None,
    with_reserve: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate a model on the splits of its tasks' corpora.

    Args:
        model: on the device to run on; its training mode is restored afterwards. Its outputs get
            the order of the corpus' names.
        data: directory of prepared corpora.
        tasks: names; None selects all tasks of the model.
        splits: names; None selects every split whose name starts with ``test``, and
            ``validation`` for masked tasks. A corpus without a named split skips it.
        seed: seed of the run, copied into the rows, and seed of the bootstrap.
        corpora: task -> corpus; other tasks use the built-in corpus.
        limits: task -> maximum length of the corpus' own modality, as in training.
        metrics: task -> name of the metric that ranks its models, whose rows get a ``score``; None
            for the primary one, as for a name that is not measured.
        system: name of the system in the rows; None uses the model's name.
        steps: training steps, copied into the rows.
        precision: see :class:`pipelines.training.evaluation.inference.InferenceRunner`.
        bootstrap_samples: resamples of the intervals of macro-F1 and median rank; 0 omits all
            intervals.
        on_split: called before each split, on each rank, with the task, the split, its rows, and
            all rows that are left, its own included.
        outcomes: receives the outcome of every row, on the first rank.
        masks: mask settings of masked tasks, as in training.
        ranks: that share the rows, each with an equal model; None is this process alone.
        fold: fold that the training reads; None takes the splits of the corpora.
        with_reserve: allow the split ``reserve`` of the fold.

    Returns:
        One dictionary per metric with the keys ``COLUMNS``. Rates are in [0, 1]. Ranks other than
        the first return none.

    Raises:
        UserError: a task is unknown, a corpus is missing or has another vocabulary, or no corpus
            has a requested split.
    """
    names = sort_rows(model.config.tasks) if tasks is None else list(tasks)
    specs = {name: find_task(name, model.config.tasks) for name in names}
    # All corpora are opened first, because progress needs the number of all rows.
    opened = {name: open_task_corpus(data, name, corpora, fold, with_reserve) for name in names}
    parts = {
        name: choose_splits(opened[name], splits, with_reserve, spec)
        for name, spec in specs.items()
    }
    rows_left = sum(opened[name].splits[each].rows for name in names for each in parts[name])
    rows: list[dict[str, Any]] = []
    evaluated: set[str] = set()
    for name, spec in specs.items():
        model.require_weights(name)
        runner = InferenceRunner(model, precision, ranks=ranks)
        corpus = opened[name]
        align_outputs(model, name, corpus)
        for split_name in parts[name]:
            split = corpus.splits[split_name]
            evaluated.add(split_name)
            if on_split is not None:
                on_split(name, split_name, split.rows, rows_left)
            rows_left -= split.rows
            limit, chosen = (limits or {}).get(name), (metrics or {}).get(name)
            if find_objective(spec.objective).hides_inputs:
                values, lengths = measure_hidden(runner, name, corpus, split_name, masks, limit)
                found = {}
                if runner.ranks.is_first:
                    units = read_unit_numbers(split.table(), f"{corpus.name}/{split_name}")
                    intervals = MetricIntervals(seed, bootstrap_samples, units)
                    found = {
                        metric: intervals.mean(values_N, find_metric(metric).scale)
                        for metric, values_N in values.items()
                    }
            else:
                found, lengths = measure_split(
                    runner,
                    name,
                    split,
                    f"{corpus.name}/{split_name}",
                    limit=limit,
                    seed=seed,
                    bootstrap_samples=bootstrap_samples,
                    outcomes=outcomes,
                    chosen=chosen,
                    all_captions=uses_all_captions(corpus),
                )
            # Splits differ in the length of their rows, so the cost is computed for each of them.
            cost = account_task(model, name, lengths)
            split_rows = tidy_rows(
                found,
                system=system or model.system,
                task=name,
                seed=seed,
                **describe_rows(corpus, fold),
                split=split_name,
                activated_params=cost.activated,
                flops_per_example=cost.flops_per_example,
                steps=steps,
            )
            mark_ranked_row(split_rows, spec.objective, chosen)
            rows += split_rows
    # A corpus may lack a split that others have, but a name that no corpus has is an error.
    missing = sorted(set(splits or ()) - evaluated)
    if missing or not evaluated:
        raise UserError(
            f"no corpus of the tasks {', '.join(names)} below {data} has "
            + (f"the split {missing[0]!r}" if missing else "a test split")
        )
    return rows


def measure_split(
    runner: InferenceRunner,
    task: str,
    split: CorpusSplit,
    where: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    bootstrap_samples: int = 1000,
    outcomes: OutcomeTable | None = None,
    chosen: str | None = None,
    all_captions: bool = False,
) -> tuple[TaskMetrics, dict[str, int]]:
    """Measure one task on one split.

    Args:
        runner: inference on all ranks. Only the first one computes metrics and outcomes.
        task: a task that is not masked.
        split: opened split of the task's corpus.
        where: names the split in error messages.
        limit: maximum length of the corpus' own modality; None uses the model's limit.
        seed: start of the bootstrap's random numbers.
        bootstrap_samples: resamples of the intervals of macro-F1 and median rank; 0 omits all
            intervals.
        outcomes: receives the outcome of every row.
        chosen: name of the metric that ranks models of the task; None for the primary one.
        all_captions: make every caption of a row a query; otherwise only the first.

    Returns:
        The metrics, none of them on other ranks, and tower -> mean length of its rows.
    """
    config = runner.model.config
    spec = find_task(task, config.tasks)
    table = split.table()
    inputs: dict[str, InferenceInputs] = {
        tower: split_inputs(
            table,
            plan,
            config,
            where,
            column=tower_column(spec, tower),
            # As candidates, the first captions rank; they are as many as the rows.
            all_captions=all_captions and tower == "query",
            # The limit is about the corpus' own modality.
            limit=limit if is_row_tower(spec, tower) else None,
        )
        for tower, plan in spec.towers.items()
    }
    lengths = mean_row_lengths(inputs)
    predictions = head_class(spec).infer(runner, task, inputs)
    if not runner.ranks.is_first:
        return {}, lengths
    units = read_unit_numbers(table, where)
    intervals = MetricIntervals(seed, bootstrap_samples, units)
    targets = read_targets(table, spec, where)
    found = head_class(spec).evaluate(spec, predictions, targets, intervals)
    objective = find_objective(spec.objective)
    compared, shares = objective.compared_metric(chosen), (found.numerator, found.denominator)
    for further in objective.further:
        numerator, denominator = further.load()(predictions, targets)
        if further.metric == compared:
            shares = numerator, denominator
        ratio = intervals.ratio(numerator, denominator, further.metric.scale)
        found = found.add(**{further.metric.name: cut_to_bounds(ratio, further.metric.bounds)})
    if outcomes is not None:
        outcomes.add(task, split.name, *shares, found.rank, units)
    return found.metrics, lengths


def read_targets(table: pa.Table, spec: Task, where: str) -> dict[str, np.ndarray]:
    """Return the targets of all rows by name.

    Args:
        table: rows of a split.
        spec: its objective names the columns.
        where: names the split in error messages.

    Raises:
        UserError: a column is missing, holds another kind of values, or an id outside of its range.
    """
    ranges = target_id_ranges(spec, f"the model has {spec.outputs} outputs")
    # A corpus without a list of classes is not checked when it is opened.
    check_ids(table, ranges, where, "Give the model as many outputs.")
    rows = np.arange(len(table))
    return take_targets(spec, lambda name: open_column(table, name, where), rows, where)


def uses_all_captions(corpus: PreparedCorpus) -> bool:
    """Return whether every caption of a row is a query; otherwise only the first one is.

    Args:
        corpus: its manifest declares ``queries``.
    """
    return corpus.manifest.get("queries") == "all"


def describe_rows(corpus: PreparedCorpus, fold: FoldConfig | None) -> dict[str, str]:
    """Return the columns of evaluation rows that name the measured rows, beside their split.

    Args:
        corpus: that the rows are from.
        fold: that divides it, or None.
    """
    name = f"{fold.number} of {fold.count}" if fold is not None and fold.count else ""
    return {"corpus": corpus.name, "corpus_digest": corpus.digest, "fold": name}


def tidy_rows(metrics: TaskMetrics, **common: Any) -> list[dict[str, Any]]:
    """Return one row per metric, with the keys ``COLUMNS`` in their order.

    Args:
        metrics: name -> value and interval.
        **common: columns that all rows share.
    """
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": machine_name(),
    }
    return [
        {
            column: (common | stamp | {"metric": metric} | interval._asdict()).get(column)
            for column in COLUMNS
        }
        for metric, interval in metrics.items()
    ]


def machine_name() -> str:
    """Return the name of this machine: processor, usable cores, accelerator."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    # Containers restrict a process to some cores; the affinity mask counts these.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [model or os.uname().machine, f"{cores} cores"]
    import torch

    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def locate_task_corpus(
    data: str | Path, task: str, corpora: Mapping[str, str] | None = None
) -> Location:
    """Return the location of a task's corpus.

    Args:
        data: directory of prepared corpora.
        task: name of the task.
        corpora: task -> corpus; other tasks use the built-in corpus.

    Raises:
        UserError: the task has no built-in corpus and ``corpora`` does not name one.
    """
    defaults = default_tasks_training() | default_masked_training()
    names = {name: entry.corpus for name, entry in defaults.items()} | dict(corpora or {})
    if task not in names:
        raise UserError(f"no corpus is known for the task {task!r}; give --corpora.{task} NAME")
    return join_location(parse_location(data, Path()), names[task])


def open_task_corpus(
    data: str | Path,
    task: str,
    corpora: Mapping[str, str] | None = None,
    fold: FoldConfig | None = None,
    with_reserve: bool = False,
) -> PreparedCorpus:
    """Open a task's corpus with the splits of a fold.

    Args:
        data: directory of prepared corpora.
        task: name of the task.
        corpora: task -> corpus; other tasks use the built-in corpus.
        fold: fold that the training reads; None takes the splits of the corpus.
        with_reserve: add the split ``reserve``.

    Raises:
        UserError: the corpus is missing or damaged, or cannot be divided so.
    """
    corpus = open_corpus(locate_task_corpus(data, task, corpora))
    return open_fold(corpus, fold or FoldConfig(), with_reserve)


def choose_splits(
    corpus: PreparedCorpus,
    splits: Sequence[str] | None,
    with_reserve: bool = False,
    task: Task | None = None,
) -> list[str]:
    """Return those of the named splits that a corpus has.

    Args:
        corpus: to search.
        splits: names; None or none selects all test splits.
        with_reserve: allow splits of the reserve.
        task: without names, one without labels selects the split ``validation``.

    Raises:
        UserError: the reserve of a study is named.
    """
    if not splits and task is not None and not find_objective(task.objective).has_labels:
        splits = ["validation"]
    if not splits:
        return [name for name in corpus.splits if name.startswith("test")]
    reserved = [name for name in splits if is_reserve(name)]
    if reserved and not with_reserve:
        raise UserError(
            f"{corpus.name}: the split {reserved[0]} is read by the final evaluation of a study "
            "only. Name another split"
        )
    # Corpora have different splits; the caller reports names that no corpus has.
    return [name for name in splits if name in corpus.splits]


def read_fixed_column(table: pa.Table, name: str, where: str) -> np.ndarray:
    """Return all values of a column with one number or array per row.

    Args:
        table: rows of a split.
        name: column of the shards.
        where: names the split in error messages.

    Raises:
        UserError: the column is missing or holds lists.
    """
    column = open_column(table, name, where)
    if not isinstance(column, FixedColumn):
        raise UserError(f"{where}: column {name!r} holds lists, expected one number per row")
    return column.take(np.arange(len(table)))
