"""Metrics of each objective with bootstrap intervals, from predictions and correct answers.

:mod:`pipelines.evaluation.evaluator` applies them to models, and
:mod:`pipelines.evaluation.simple_baselines` to simple methods.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from skillnet.metrics import (
    ConfidenceInterval,
    bootstrap_interval,
    error_counts,
    macro_f1_of_rows,
    median_rank,
    ratio_of_sums,
    retrieval_ranks,
)

#: Metric name -> value and interval.
TaskMetrics = dict[str, ConfidenceInterval]


def classification_metrics(
    predicted: np.ndarray, labels: np.ndarray, seed: int = 0, bootstrap_samples: int = 1000
) -> TaskMetrics:
    """Return accuracy and macro-F1 of predicted classes.

    Args:
        predicted: (N,) class indices.
        labels: (N,) correct class indices.
        seed: of the bootstrap.
        bootstrap_samples: resamples of each interval; 0 omits intervals.
    """
    # Macro-F1 is not a mean over rows: the bootstrap must resample predictions with their labels.
    pairs = np.stack([np.asarray(predicted), np.asarray(labels)], 1).astype(np.int64)
    return {
        "accuracy": mean_with_interval(pairs[:, 0] == pairs[:, 1], seed, bootstrap_samples),
        "macro_f1": _interval(pairs, macro_f1_of_rows, seed, bootstrap_samples),
    }


def transcription_metrics(
    hypotheses: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    seed: int = 0,
    bootstrap_samples: int = 1000,
) -> TaskMetrics:
    """Return the token error rate and the share of rows without errors.

    Args:
        hypotheses: N predicted symbol sequences.
        references: N correct symbol sequences.
        seed: of the bootstrap.
        bootstrap_samples: resamples of each interval; 0 omits intervals.
    """
    return error_rate_metrics(error_counts(hypotheses, references), seed, bootstrap_samples)


def error_rate_metrics(
    counts: np.ndarray, seed: int = 0, bootstrap_samples: int = 1000
) -> TaskMetrics:
    """Return the token error rate and the share of rows without errors, from counts.

    Args:
        counts: (N, 2) edit distance and number of reference symbols of each row.
        seed: of the bootstrap.
        bootstrap_samples: resamples of each interval; 0 omits intervals.
    """
    return {
        # A ratio of sums: a mean of rates would give short transcripts too much weight.
        "token_error_rate": _interval(counts, ratio_of_sums, seed, bootstrap_samples),
        "exact_rate": mean_with_interval(counts[:, 0] == 0, seed, bootstrap_samples),
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
    """
    metrics: TaskMetrics = {}
    for prefix in directions:
        if prefix:
            ranks = retrieval_ranks(candidate, query, candidate_ids, query_ids)
        else:
            ranks = retrieval_ranks(query, candidate, query_ids, candidate_ids)
        # In the reverse direction a row is one query, so nothing is resampled together.
        clusters = None if prefix else owners
        metrics |= rank_metrics(ranks, prefix, seed, bootstrap_samples, clusters)
    return metrics


def rank_metrics(
    ranks: np.ndarray,
    prefix: str = "",
    seed: int = 0,
    bootstrap_samples: int = 1000,
    clusters: np.ndarray | None = None,
) -> TaskMetrics:
    """Return recall at 1, 5 and 10 and the median of ranks.

    Args:
        ranks: (Q,) from 1.
        prefix: of the metric names.
        seed: of the bootstrap.
        bootstrap_samples: resamples of each interval; 0 omits intervals.
        clusters: (Q,) queries of one cluster (captions of one image) are resampled together.
    """
    metrics = {
        f"{prefix}recall_at_{k}": mean_with_interval(ranks <= k, seed, bootstrap_samples, clusters)
        for k in (1, 5, 10)
    }
    metrics[f"{prefix}median_rank"] = _interval(
        ranks, median_rank, seed, bootstrap_samples, clusters
    )
    return metrics


def mean_with_interval(
    values: np.ndarray, seed: int, bootstrap_samples: int, clusters: np.ndarray | None = None
) -> ConfidenceInterval:
    """Return the mean of values with its bootstrap interval.

    Args:
        values: (N,) booleans or numbers.
        seed: of the bootstrap.
        bootstrap_samples: resamples; 0 omits the interval.
        clusters: (N,) values of one cluster are resampled together.
    """
    as_float = np.asarray(values, dtype=np.float64)
    return _interval(as_float, np.mean, seed, bootstrap_samples, clusters)


def _interval(
    values: np.ndarray,
    statistic: Callable[..., float],
    seed: int,
    bootstrap_samples: int,
    clusters: np.ndarray | None = None,
) -> ConfidenceInterval:
    # NaN bounds make tables omit the interval; equal bounds would claim certainty.
    if not bootstrap_samples:
        return ConfidenceInterval(float(statistic(values)), float("nan"), float("nan"))
    return bootstrap_interval(
        values, statistic, seed=seed, samples=bootstrap_samples, clusters=clusters
    )
