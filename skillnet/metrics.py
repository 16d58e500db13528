"""Intervals of metrics: values per row become a metric with its confidence interval.

Every metric has two steps. The first gives values per row (hits, distances, ranks) and belongs to
an objective of :mod:`skillnet.objectives`. The second is a statistic of rows: a mean, a ratio of
sums, macro-F1, a median. :class:`MetricIntervals` computes both kinds of intervals. Rates are
fractions in [0, 1], not percentages.

Shapes: N rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from skillnet_evidence.units import ScoreScale, bound_score, compute_unit_error, jackknife_units

Statistic = Callable[[NDArray[Any]], float]


class ConfidenceInterval(NamedTuple):
    """Value of a metric and the bounds of its bootstrap interval, in the unit of the metric."""

    value: float
    low: float
    high: float


#: Metric name -> value and interval.
TaskMetrics = dict[str, ConfidenceInterval]


@dataclass(frozen=True)
class MetricIntervals:
    """Metrics of the rows of a split, with intervals over held-out units.

    Units are the independent observations, such as speakers. Shares and error rates have the
    interval of :func:`skillnet_evidence.units.bound_score`. Other statistics have a bootstrap
    interval, which is omitted where all resamples agree.

    Args:
        seed: start of the random numbers of the bootstrap.
        samples: resamples of each bootstrap interval; 0 omits all intervals.
        units: (N,) number of the unit of each row; None counts each row as a unit.
    """

    seed: int = 0
    samples: int = 1000
    units: NDArray[Any] | None = None

    def mean(self, values: ArrayLike, scale: ScoreScale = "share") -> ConfidenceInterval:
        """Return the mean of values with its interval.

        Args:
            values: (N,) booleans or numbers.
            scale: kind of the values, see :func:`skillnet_evidence.units.bound_score`.
        """
        amounts = np.asarray(values, np.float64)
        return self.ratio(amounts, np.ones(len(amounts)), scale)

    def ratio(
        self, amounts: NDArray[Any], weights: NDArray[Any], scale: ScoreScale = "free"
    ) -> ConfidenceInterval:
        """Return the sum of amounts by the sum of weights, with its interval.

        Args:
            amounts: (N,) numerators.
            weights: (N,) denominators.
            scale: kind of the ratio, see :func:`skillnet_evidence.units.bound_score`.
        """
        nan = float("nan")
        # The references of a split can all be empty.
        if not weights.sum():
            return ConfidenceInterval(nan, nan, nan)
        effects = jackknife_units(amounts, weights, self.units)
        value, effects_K = float(effects.values_S[0]), effects.effects_SK[0]
        if not self.samples:
            return ConfidenceInterval(value, nan, nan)
        error = compute_unit_error(effects_K)
        return ConfidenceInterval(
            value, *bound_score(value, error, effects.dof, len(effects_K), scale)
        )

    def resample(self, values: NDArray[Any], statistic: Statistic) -> ConfidenceInterval:
        """Return a statistic of rows with its bootstrap interval.

        Args:
            values: one row per example, (N,) or (N, k).
            statistic: maps rows to a number.
        """
        nan = float("nan")
        interval = ConfidenceInterval(float(statistic(values)), nan, nan)
        # One unit has no variance to resample.
        if self.samples and (self.units is None or self.units.any()):
            interval = bootstrap_interval(
                values, statistic, self.seed, self.samples, clusters=self.units
            )
        # NaN bounds make tables omit the interval; equal bounds would claim certainty.
        is_point = interval.low == interval.high
        return ConfidenceInterval(interval.value, nan, nan) if is_point else interval


def cut_to_bounds(interval: ConfidenceInterval, bounds: tuple[float, float]) -> ConfidenceInterval:
    """Return an interval within the bounds of its metric; few rows give wide intervals.

    Args:
        interval: bounds of a metric.
        bounds: lowest and highest value of the metric.
    """
    value, low, high = interval
    # Comparisons with NaN are false, so an interval that was not computed stays as it is.
    low = min(bounds[0], value) if low < bounds[0] else low
    high = max(bounds[1], value) if high > bounds[1] else high
    return ConfidenceInterval(value, low, high)


def ratio_of_sums(rows_N2: NDArray) -> float:
    """Divide the sum of column 0 by that of column 1 (a micro average); NaN for an empty sum."""
    above, below = rows_N2.sum(0)
    return float(above / below) if below else float("nan")


def bootstrap_interval(
    values: ArrayLike | Tensor,
    statistic: Statistic = np.mean,
    seed: int = 0,
    samples: int = 1000,
    level: float = 0.95,
    clusters: ArrayLike | Tensor | None = None,
) -> ConfidenceInterval:
    """Compute a statistic of rows and its percentile bootstrap interval (source: Efron 1979).

    Args:
        values: one row per example, (N,) or (N, k).
        statistic: maps rows to a number: ``np.mean`` of hits, a median,
            :func:`ratio_of_sums` of counts, macro-F1 of predictions with their labels.
        seed: start of the random numbers of the resampling; the same seed gives the same interval.
        samples: number of resamples.
        level: share of resamples between the bounds.
        clusters: (N,) labels. Rows of one cluster (a speaker, a package) are drawn together, which
            widens the interval if they are similar.

    Raises:
        ValueError: no rows, or clusters of another length.
    """
    rows = to_array(values)
    if not len(rows):
        raise ValueError("an interval needs at least one row")
    generator = np.random.default_rng(seed)
    draw = _drawer(len(rows), clusters)
    figures = [statistic(rows[draw(generator)]) for _ in range(samples)]
    tail = (1 - level) / 2
    # A resample without any reference symbol gives NaN and is ignored.
    low, high = np.nanquantile(figures, [tail, 1 - tail])
    return ConfidenceInterval(float(statistic(rows)), float(low), float(high))


def _drawer(
    count: int, clusters: ArrayLike | Tensor | None
) -> Callable[[np.random.Generator], NDArray[np.int64]]:
    if clusters is None:
        return lambda generator: generator.integers(0, count, count)
    labels = to_array(clusters)
    if labels.shape != (count,):
        raise ValueError(f"{count} rows do not fit clusters of the shape {labels.shape}")
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    members = np.split(order, np.cumsum(sizes)[:-1])

    def draw(generator: np.random.Generator) -> NDArray[np.int64]:
        picks = generator.integers(0, len(members), len(members))  # clusters, with replacement
        return np.concatenate([members[pick] for pick in picks])

    return draw


def to_array(x: ArrayLike | Tensor) -> NDArray[Any]:
    """Return values as a numpy array in the host's memory.

    Args:
        x: array, list or tensor.
    """
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
