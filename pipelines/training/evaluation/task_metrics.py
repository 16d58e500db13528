"""Metrics of each objective with their intervals, from predictions and correct answers.

Units (see :mod:`pipelines.training.evaluation.held_out_units`) are the independent observations.
Shares and error rates have the interval of :func:`skillnet.unit_statistics.bound_score`. Macro-F1
and the median rank have a bootstrap interval; it is omitted where all resamples agree.

:mod:`pipelines.training.evaluation.evaluator` applies them to models, and
:mod:`pipelines.training.evaluation.simple_baselines` to simple methods.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from skillnet.metrics import (
    ConfidenceInterval,
    bootstrap_interval,
    error_counts,
    macro_f1_of_rows,
    median_rank,
    pair_ranks,
    retrieval_ranks,
)
from skillnet.unit_statistics import ScoreScale, bound_score, compute_unit_error, jackknife_units

#: Metric name -> value and interval.
TaskMetrics = dict[str, ConfidenceInterval]


def classification_metrics(
    predicted: np.ndarray,
    labels: np.ndarray,
    seed: int = 0,
    bootstrap_samples: int = 1000,
    units: np.ndarray | None = None,
) -> TaskMetrics:
    """Return accuracy and macro-F1 of predicted classes.

    Args:
        predicted: (N,) class indices.
        labels: (N,) correct class indices.
        seed: of the bootstrap.
        bootstrap_samples: resamples of each interval; 0 omits intervals.
        units: (N,) number of the unit of each row; None counts each row as a unit.
    """
    # Macro-F1 is not a mean over rows: the bootstrap must resample predictions with their labels.
    pairs = np.stack([np.asarray(predicted), np.asarray(labels)], 1).astype(np.int64)
    return {
        "accuracy": mean_with_interval(pairs[:, 0] == pairs[:, 1], bootstrap_samples, units),
        "macro_f1": _resample(pairs, macro_f1_of_rows, seed, bootstrap_samples, units),
    }


def transcription_metrics(
    hypotheses: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    bootstrap_samples: int = 1000,
    units: np.ndarray | None = None,
) -> TaskMetrics:
    """Return the token error rate and the share of rows without errors.

    Args:
        hypotheses: N predicted symbol sequences.
        references: N correct symbol sequences.
        bootstrap_samples: 0 omits intervals.
        units: (N,) number of the unit of each row; None counts each row as a unit.
    """
    return error_rate_metrics(error_counts(hypotheses, references), bootstrap_samples, units)


def error_rate_metrics(
    counts: np.ndarray, bootstrap_samples: int = 1000, units: np.ndarray | None = None
) -> TaskMetrics:
    """Return the token error rate and the share of rows without errors, from counts.

    Args:
        counts: (N, 2) edit distance and number of reference symbols of each row.
        bootstrap_samples: 0 omits intervals.
        units: (N,) number of the unit of each row; None counts each row as a unit.
    """
    return {
        # A ratio of sums: a mean of rates would give short transcripts too much weight.
        "token_error_rate": ratio_with_interval(
            counts[:, 0], counts[:, 1], bootstrap_samples, units, "error_rate"
        ),
        "exact_rate": mean_with_interval(counts[:, 0] == 0, bootstrap_samples, units),
    }


def retrieval_metrics(
    query: np.ndarray,
    candidate: np.ndarray,
    query_ids: np.ndarray,
    candidate_ids: np.ndarray,
    seed: int = 0,
    bootstrap_samples: int = 1000,
    directions: Iterable[str] = ("", "reverse_"),
    owners: np.ndarray | None = None,
    units: np.ndarray | None = None,
) -> TaskMetrics:
    """Return recall at 1, 5 and 10 and the median rank, for each direction of retrieval.

    Args:
        query: (Q, E) unit vectors of the texts.
        candidate: (N, E) unit vectors of the other modality.
        query_ids: (Q,) group of each query.
        candidate_ids: (N,) group of each candidate; equal groups are correct answers.
        seed: of the bootstrap.
        bootstrap_samples: resamples of each interval; 0 omits intervals.
        directions: metric prefixes: "" is text -> X, ``reverse_`` is X -> text.
        owners: (Q,) row of each query; None if each row has one query.
        units: (N,) number of the unit of each candidate; None counts each row as a unit.
    """
    metrics: TaskMetrics = {}
    for prefix in directions:
        if prefix:
            ranks = retrieval_ranks(candidate, query, candidate_ids, query_ids)
        else:
            ranks = retrieval_ranks(query, candidate, query_ids, candidate_ids)
        # In the reverse direction each row is one query.
        query_units = units if prefix else find_query_units(units, owners)
        metrics |= rank_metrics(ranks, prefix, seed, bootstrap_samples, query_units)
    return metrics


def measure_pairs(
    query: np.ndarray,
    candidate: np.ndarray,
    groups: np.ndarray,
    seed: int = 0,
    bootstrap_samples: int = 1000,
    units: np.ndarray | None = None,
) -> tuple[TaskMetrics, np.ndarray]:
    """Return the metrics of finding other rows of one group, in both directions.

    Args:
        query: (N, E) unit vectors of the rows as queries.
        candidate: (N, E) unit vectors of the same rows as candidates.
        groups: (N,) group of each row. Rows that are alone in theirs are no queries.
        seed: of the bootstrap.
        bootstrap_samples: resamples of each interval; 0 omits intervals.
        units: (N,) number of the unit of each row; None counts each row as a unit.

    Returns:
        The metrics, and the rank of each row, (N,), NaN for rows that are no queries.
    """
    metrics: TaskMetrics = {}
    forward = pair_ranks(query, candidate, groups)
    for prefix, ranks in (("", forward), ("reverse_", pair_ranks(candidate, query, groups))):
        is_query = ~np.isnan(ranks)
        own = None if units is None else units[is_query]
        metrics |= rank_metrics(ranks[is_query], prefix, seed, bootstrap_samples, own)
    return metrics, forward


def find_query_units(units: np.ndarray | None, owners: np.ndarray | None) -> np.ndarray | None:
    """Return the number of the unit of each query, (Q,); None if each query is a unit.

    Args:
        units: (N,) number of the unit of each row; None counts each row as a unit.
        owners: (Q,) row of each query; None if each row has one query.
    """
    # Captions of one row are never independent.
    return owners if units is None else units if owners is None else units[owners]


def rank_metrics(
    ranks: np.ndarray,
    prefix: str = "",
    seed: int = 0,
    bootstrap_samples: int = 1000,
    units: np.ndarray | None = None,
) -> TaskMetrics:
    """Return recall at 1, 5 and 10 and the median of ranks.

    Args:
        ranks: (Q,) from 1.
        prefix: of the metric names.
        seed: of the bootstrap.
        bootstrap_samples: resamples of each interval; 0 omits intervals.
        units: (Q,) number of the unit of each query; None counts each query as a unit.
    """
    metrics = {
        f"{prefix}recall_at_{k}": mean_with_interval(ranks <= k, bootstrap_samples, units)
        for k in (1, 5, 10)
    }
    metrics[f"{prefix}median_rank"] = _resample(ranks, median_rank, seed, bootstrap_samples, units)
    return metrics


def mean_with_interval(
    values: np.ndarray,
    bootstrap_samples: int = 1000,
    units: np.ndarray | None = None,
    scale: ScoreScale = "share",
) -> ConfidenceInterval:
    """Return the mean of values with its interval.

    Args:
        values: (N,) booleans or numbers.
        bootstrap_samples: 0 omits the interval.
        units: (N,) number of the unit of each value; None counts each value as a unit.
        scale: of the values, see :func:`skillnet.unit_statistics.bound_score`.
    """
    amounts = np.asarray(values, np.float64)
    return ratio_with_interval(amounts, np.ones(len(amounts)), bootstrap_samples, units, scale)


def ratio_with_interval(
    amounts: np.ndarray,
    weights: np.ndarray,
    bootstrap_samples: int = 1000,
    units: np.ndarray | None = None,
    scale: ScoreScale = "free",
) -> ConfidenceInterval:
    """Return the sum of amounts by the sum of weights, with its interval.

    Args:
        amounts: (N,) numerators.
        weights: (N,) denominators.
        bootstrap_samples: 0 omits the interval.
        units: (N,) number of the unit of each value; None counts each value as a unit.
        scale: of the ratio, see :func:`skillnet.unit_statistics.bound_score`.
    """
    nan = float("nan")
    # The references of a split can all be empty.
    if not weights.sum():
        return ConfidenceInterval(nan, nan, nan)
    effects = jackknife_units(amounts, weights, units)
    value, effects_K = float(effects.values_S[0]), effects.effects_SK[0]
    if not bootstrap_samples:
        return ConfidenceInterval(value, nan, nan)
    error = compute_unit_error(effects_K)
    bounds = bound_score(value, error, effects.dof, len(effects_K), scale)
    return ConfidenceInterval(value, *bounds)


def _resample(
    values: np.ndarray,
    statistic: Callable[..., float],
    seed: int,
    bootstrap_samples: int,
    units: np.ndarray | None,
) -> ConfidenceInterval:
    nan = float("nan")
    interval = ConfidenceInterval(float(statistic(values)), nan, nan)
    # One unit has no variance to resample.
    if bootstrap_samples and (units is None or units.any()):
        interval = bootstrap_interval(
            values, statistic, seed=seed, samples=bootstrap_samples, clusters=units
        )
    # NaN bounds make tables omit the interval; equal bounds would claim certainty.
    is_point = interval.low == interval.high
    return ConfidenceInterval(interval.value, nan, nan) if is_point else interval
