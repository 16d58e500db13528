"""Intervals and tests over seeds and test rows together, for few seeds and many rows.

A score of a study depends on two random choices: the seeds that were run and the rows that were
tested. Every seed answers every row, so the two factors are crossed. The model is the two-way
random-effects model y[s, n] = mean + seed[s] + row[n] + residual[s, n]. The variance of the mean is

    (MS_seed + max(MS_row - MS_residual, 0)) / (S N)

with Satterthwaite's degrees of freedom. This is the analysis of several readers and many cases
(source: Dorfman, Berbaum & Metz 1992; degrees of freedom: Hillis 2007).

Two or three seeds carry little information about the seed variance: they may agree by chance, and
a test would be overconfident. The seed variance is therefore pooled over the systems of a study
(:class:`SeedVariance`), as in any analysis of variance. A system's own variance is used where it
is larger. ``docs/comparison.md`` lists the measured coverage and false alarms of this method, of
each system's own variance, and of a crossed bootstrap.

A :class:`RunSample` is a number per run with the influence of each row. Means over tasks, ratios to
a baseline and differences are samples too, so one estimator serves all of them. Differences are
paired by row and seed.

Shapes: S seeds, N test rows of one split.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

#: Confidence level of intervals.
LEVEL = 0.95


class ScoreEstimate(NamedTuple):
    """A mean over seeds and rows with its uncertainty.

    Args:
        value: mean over seeds.
        low: lower bound of the interval.
        high: upper bound of the interval.
        std_error: standard error.
        dof: degrees of freedom of the standard error.
        seeds: number of seeds. With one seed and no pooled variance, the standard error and the
            interval cover test rows only.
    """

    value: float
    low: float
    high: float
    std_error: float
    dof: float
    seeds: int


class SeedVariance(NamedTuple):
    """Variance over seeds of one run's score, pooled over several systems.

    Args:
        variance: variance of one run's score.
        dof: degrees of freedom.
    """

    variance: float
    dof: float

    def for_difference(self) -> "SeedVariance":
        """Return the variance of the difference of two systems' runs."""
        # Seeds of different systems are treated as independent, so the variances add.
        return SeedVariance(2 * self.variance, self.dof)


@dataclass(frozen=True)
class RunSample:
    """A score of every run of one system, with the influence of each row.

    Args:
        seeds: seeds of the runs, ascending.
        values: (S,) score of each run.
        rows: split -> (S, N): effect of row n on the run's score, times N; the values of a run
            sum to 0 (an influence function). Splits are independent of each other.
    """

    seeds: tuple[int, ...]
    values: NDArray[np.float64]
    rows: Mapping[Hashable, NDArray[np.float64]]

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("a sample needs at least one run")
        for key, part in self.rows.items():
            if part.shape[0] != len(self.seeds) or part.ndim != 2 or part.shape[1] < 2:
                raise ValueError(
                    f"{key}: rows of {len(self.seeds)} runs must have the shape (seeds, at least "
                    f"2 rows), not {part.shape}"
                )

    def select(self, indices: Sequence[int]) -> "RunSample":
        """Return the runs at the given indices."""
        chosen = list(indices)
        rows = {key: part[chosen] for key, part in self.rows.items()}
        return RunSample(tuple(self.seeds[i] for i in chosen), self.values[chosen], rows)


def build_sample(amounts: Mapping[int, ArrayLike], weight: ArrayLike, key: Hashable) -> RunSample:
    """Return the ratio sum(amount) / sum(weight) of each run over the rows of a split.

    Args:
        amounts: seed -> (N,) numerators.
        weight: (N,) denominators, equal for all runs.
        key: name of the split; samples with the same key are paired by row.

    Raises:
        ValueError: the weights sum to 0.
    """
    seeds = tuple(sorted(amounts))
    amount_SN = np.stack([np.asarray(amounts[seed], np.float64) for seed in seeds])
    weight_N = np.asarray(weight, np.float64)
    if weight_N.sum() <= 0:
        raise ValueError(f"{key}: the weights of the rows must sum to more than 0")
    # A ratio of sums weights long rows more, as the token error rate is defined.
    values_S = amount_SN.sum(1) / weight_N.sum()
    # Influence function of the ratio: each run's values sum to 0.
    # Division by the mean weight gives the influences the unit of the score.
    rows_SN = (amount_SN - values_S[:, None] * weight_N) / weight_N.mean()
    return RunSample(seeds, values_S, {key: rows_SN})


# -- arithmetic of samples -----------------------------------------------------------------


def average_samples(parts: Sequence[RunSample]) -> RunSample:
    """Return the mean of several samples, seed by seed."""
    parts = _on_common_seeds(parts)
    values = np.mean([part.values for part in parts], axis=0)
    return RunSample(parts[0].seeds, values, _sum_rows([(part, 1 / len(parts)) for part in parts]))


def subtract_samples(left: RunSample, right: RunSample) -> RunSample:
    """Return ``left - right``, run by run.

    Args:
        left: scores of one system.
        right: scores of another system; both are restricted to their common seeds.
    """
    left, right = pair_samples(left, right)
    return RunSample(
        left.seeds, left.values - right.values, _sum_rows([(left, 1.0), (right, -1.0)])
    )


def divide_samples(above: RunSample, below: RunSample) -> RunSample:
    """Return ``above / below``, run by run; row influences follow by the delta method.

    Args:
        above: numerators.
        below: denominators; the ratio is NaN where one is 0.
    """
    above, below = pair_samples(above, below)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where(below.values == 0, np.nan, above.values / below.values)
        # A score of 0 has no relative score; NaN keeps it out of every verdict.
        scale = np.where(below.values == 0, np.nan, 1 / below.values)
    return RunSample(above.seeds, values, _sum_rows([(above, scale), (below, -values * scale)]))


def pair_samples(left: RunSample, right: RunSample) -> tuple[RunSample, RunSample]:
    """Return two samples restricted to their common seeds.

    Samples with fewer than two common seeds are paired in the order of their seeds. Seeds are
    exchangeable, so any fixed pairing gives a valid test.

    Args:
        left: scores of one system.
        right: scores of another system.
    """
    # The usual case of a study; the samples need no copy.
    if left.seeds == right.seeds:
        return left, right
    common = sorted(set(left.seeds) & set(right.seeds))
    if len(common) >= 2 or len(common) == min(len(left.seeds), len(right.seeds)):
        return (
            left.select([left.seeds.index(seed) for seed in common]),
            right.select([right.seeds.index(seed) for seed in common]),
        )
    # One common seed gives no variance, so pairing by order uses more of the runs.
    count = min(len(left.seeds), len(right.seeds))
    return left.select(range(count)), right.select(range(count))


def _on_common_seeds(parts: Sequence[RunSample]) -> list[RunSample]:
    if not parts:
        raise ValueError("a mean requires at least one sample")
    common = sorted(set.intersection(*(set(part.seeds) for part in parts)))
    return [part.select([part.seeds.index(seed) for seed in common]) for part in parts]


def _sum_rows(
    terms: Sequence[tuple[RunSample, float | NDArray]],
) -> dict[Hashable, NDArray[np.float64]]:
    rows: dict[Hashable, NDArray[np.float64]] = {}
    for part, factor in terms:
        for key, own in part.rows.items():
            scaled = own * np.reshape(factor, (-1, 1))
            if key in rows and rows[key].shape != scaled.shape:
                raise ValueError(
                    f"{key}: {rows[key].shape[1]} rows cannot be paired with {scaled.shape[1]}"
                )
            rows[key] = rows[key] + scaled if key in rows else scaled
    return rows


# -- estimates and tests -------------------------------------------------------------------


def pool_seed_variance(samples: Sequence[RunSample]) -> SeedVariance | None:
    """Return the pooled variance over seeds; None without repeated runs."""
    # Systems with more seeds have more weight: each counts with its degrees of freedom.
    parts = [(_variance(each.values), len(each.seeds) - 1) for each in samples]
    dof = sum(own for _, own in parts)
    if not dof:
        return None
    return SeedVariance(sum(variance * own for variance, own in parts if own) / dof, dof)


def estimate_mean(
    sample: RunSample,
    spread: SeedVariance | None = None,
    level: float = LEVEL,
    least: float = -np.inf,
    most: float = np.inf,
) -> ScoreEstimate:
    """Return the mean over seeds with its interval, clipped to ``least`` and ``most``.

    Args:
        sample: score of each run.
        spread: pooled variance over seeds; None takes the variance of the sample.
        level: confidence level.
        least: lower end of the score's range.
        most: upper end of the score's range.
    """
    value, error, dof = _mean_and_error(sample, spread)
    # With zero error the degrees of freedom are infinite, and 0.0 * error keeps NaN.
    half = float(stats.t.ppf((1 + level) / 2, dof)) * error if error else 0.0 * error
    low, high = (float(np.clip(x, least, most)) for x in (value - half, value + half))
    return ScoreEstimate(value, low, high, error, dof, len(sample.seeds))


def compute_p_value(
    sample: RunSample, spread: SeedVariance | None = None, null: float = 0.0
) -> float:
    """Return the two-sided p-value of "the mean is ``null``" (Student's t).

    Args:
        sample: score of each run.
        spread: pooled variance over seeds; None takes the variance of the sample.
        null: mean under the null hypothesis.
    """
    value, error, dof = _mean_and_error(sample, spread)
    if np.isnan(value) or np.isnan(error):
        return float("nan")
    # Without variance any difference from the null hypothesis is certain.
    if error == 0:
        return 1.0 if value == null else 0.0
    return float(2 * stats.t.sf(abs(value - null) / error, dof))


def _variance(values_S: NDArray[np.float64]) -> float:
    # Rounding errors are not variance: equal values must give exactly 0.
    if len(values_S) < 2 or np.ptp(values_S) == 0:
        return 0.0
    # With few seeds the divisor N would understate the variance clearly.
    return float(values_S.var(ddof=1))


def _mean_and_error(sample: RunSample, spread: SeedVariance | None) -> tuple[float, float, float]:
    """Return the mean, its standard error and the degrees of freedom."""
    count = len(sample.seeds)
    value = float(sample.values.mean())
    variances, squares = [], []
    if count > 1 or spread is not None:
        known = spread or SeedVariance(0.0, count - 1)
        # The larger of own and pooled variance, so that an unstable system is not understated.
        variances.append(max(_variance(sample.values), known.variance) / count)
        squares.append(variances[-1] ** 2 / known.dof)
    for part in sample.rows.values():
        rows = part.shape[1]
        mean_N = part.mean(0)
        variance = float(mean_N.var(ddof=1)) / rows
        if count > 1:
            # The row variance contains residual variance, which averages out over seeds.
            residual = float(((part - mean_N) ** 2).sum()) / ((count - 1) * (rows - 1))
            variance = max(variance - residual / (count * rows), 0.0)
        variances.append(variance)
        squares.append(variance**2 / (rows - 1))
    total = sum(variances)
    # Satterthwaite's approximation for a sum of independent variances.
    dof = total**2 / sum(squares) if sum(squares) > 0 else np.inf
    return value, float(np.sqrt(total)), float(dof)


def correct_p_values(p_values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's correction (source: Holm 1979).

    Rejecting corrected values of at most alpha keeps the probability of any false rejection below
    alpha, for any dependence between the tests. NaN stays NaN and does not count as a test.
    """
    p = np.asarray(p_values, np.float64)
    # A test without a p-value must not make the correction of the others stricter.
    order = [int(i) for i in np.argsort(p) if not np.isnan(p[i])]
    adjusted = np.full(len(p), np.nan)
    highest = 0.0
    for rank, index in enumerate(order):
        # The running maximum keeps the corrected values in the order of the p-values.
        highest = max(highest, min(1.0, (len(order) - rank) * p[index]))
        adjusted[index] = highest
    return [float(x) for x in adjusted]
