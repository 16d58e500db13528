"""Metrics and outcomes of objectives whose heads score each row by itself.

:func:`score_predictions` is the entry point; :mod:`pipelines.training.evaluation.evaluator` calls
it for rows with several labels, for numbers, and for objectives of other packages, and
:mod:`pipelines.training.evaluation.label_baselines` for simple methods.

Shapes: N rows, C classes.
"""

import math
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.data.shards.columns import FixedColumn, RaggedColumn, open_column
from pipelines.data.shards.id_columns import IdRange, check_ids
from pipelines.training.evaluation.task_metrics import (
    TaskMetrics,
    mean_with_interval,
    ratio_with_interval,
)
from pipelines.training.loading.task_columns import make_indicators
from skillnet.heads import head_class
from skillnet.metrics import ConfidenceInterval
from skillnet.objectives import find_objective
from skillnet.skills import Task
from skillnet_platform.errors import UserError

#: A class is predicted from this probability on.
DECISION_THRESHOLD = 0.5


class ScoredRows(NamedTuple):
    """Metrics of a split, and the outcome of each row.

    Args:
        metrics: the primary metric first.
        numerator: (N,) see :mod:`pipelines.training.evaluation.outcomes`.
        denominator: (N,)
    """

    metrics: TaskMetrics
    numerator: np.ndarray
    denominator: np.ndarray


def read_targets(table: pa.Table, spec: Task, where: str) -> dict[str, np.ndarray]:
    """Return the targets of all rows by name; sets of classes as indicators (N, C).

    Args:
        table: rows of a split.
        spec: its objective names the columns.
        where: names the split in error messages.

    Raises:
        UserError: a column is missing, or holds another kind of values.
    """
    rows, targets = np.arange(len(table)), {}
    outputs = IdRange(f"the model has {spec.outputs} outputs", spec.outputs)
    for name, column in find_objective(spec.objective).columns:
        opened = open_column(table, column, where)
        if isinstance(opened, RaggedColumn):
            # A corpus without a list of classes is not checked when it is opened.
            check_ids(table, {column: outputs}, where, "Give the model as many outputs.")
            targets[name] = make_indicators(*opened.take(rows), spec.outputs, where)
        elif isinstance(opened, FixedColumn):
            targets[name] = opened.take(rows)
        else:
            raise UserError(f"{where}: column {column!r} holds no values per row")
    return targets


def score_predictions(
    spec: Task,
    predictions: np.ndarray,
    targets: dict[str, np.ndarray],
    bootstrap_samples: int = 1000,
    units: np.ndarray | None = None,
) -> ScoredRows:
    """Return the metrics of predictions, and the outcomes of their rows.

    Args:
        spec: the task.
        predictions: (N, outputs) of the head, values of a regression in their own unit.
        targets: of :func:`read_targets`.
        bootstrap_samples: 0 omits intervals.
        units: (N,) number of the unit of each row; None counts each row as a unit.
    """
    numerator, denominator = head_class(spec).score_rows(predictions, targets)
    objective = find_objective(spec.objective)
    ratio = ratio_with_interval(numerator, denominator, bootstrap_samples, units, objective.scale)
    metrics = {objective.metric: _cut_to_bounds(ratio, objective.bounds)}
    if spec.objective == "multi_label":
        chosen_NC, truth_NC = predictions >= DECISION_THRESHOLD, targets["label_sets"] > 0
        hits_N = 2 * (chosen_NC & truth_NC).sum(1)
        named_N = chosen_NC.sum(1) + truth_NC.sum(1)
        metrics["micro_f1"] = ratio_with_interval(
            hits_N, named_N, bootstrap_samples, units, "share"
        )
    if spec.objective == "regression":
        errors_N = np.abs(predictions[:, 0] - targets["numbers"])
        error = mean_with_interval(errors_N, bootstrap_samples, units, "free")
        metrics["mean_absolute_error"] = _cut_to_bounds(error, (0.0, math.inf))
    return ScoredRows(metrics, numerator, denominator)


def _cut_to_bounds(interval: ConfidenceInterval, bounds: tuple[float, float]) -> ConfidenceInterval:
    """Return an interval within the bounds of its metric; few rows give wide intervals."""
    value, low, high = interval
    # Comparisons with NaN are false, so an interval that was not computed stays as it is.
    low = min(bounds[0], value) if low < bounds[0] else low
    high = max(bounds[1], value) if high > bounds[1] else high
    return ConfidenceInterval(value, low, high)
