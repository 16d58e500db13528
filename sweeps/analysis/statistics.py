"""Intervals and tests over seeds and test rows together, for a few seeds and many rows.

A figure of a study hangs on two draws: the seeds that were run and the rows that were tested.
Every seed answers every row, so the two are crossed. The model is the two-way random-effects
model y[s, n] = mean + seed[s] + row[n] + rest[s, n], whose variance of the mean is

    (MS_seed + max(MS_row - MS_rest, 0)) / (S N)

with Satterthwaite's degrees of freedom: the analysis of several readers and many cases
(source: Dorfman, Berbaum & Metz 1992; degrees of freedom: Hillis 2007).

Two or three seeds say little of how much seeds matter: by chance they may agree, and a test would
be sure of itself for no reason. So the spread over seeds is pooled over the systems of a study
(:class:`SeedVariance`), as in any analysis of variance, and a system's own spread counts where it is
larger. ``docs/comparison.md`` has the measured coverage and false alarms of this, of each
system's own spread, and of a crossed bootstrap.

A :class:`RunSample` is any figure that every run has, together with what each row adds to it. Means
over tasks, ratios to a baseline and differences are again samples, so one estimator serves all.
Differences pair by row and seed.

Shapes: S seeds, N test rows of one split.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVEL = 0.95


class ScoreEstimate(NamedTuple):
    """A mean over seeds and rows and what is known of it.

    Args:
        value: the mean over seeds.
        low: lower bound of the interval.
        high: upper bound of the interval.
        error: standard error.
        freedom: degrees of freedom of the error.
        seeds: number of seeds. With one, and no spread known from other systems, error and
            interval are over test rows only.
    """

    value: float
    low: float
    high: float
    std_error: float
    dof: float
    seeds: int


class SeedVariance(NamedTuple):
    """How much one run's figure varies over seeds, from the runs of several systems.

    Args:
        variance: of one run's figure.
        freedom: degrees of freedom behind it.
    """

    variance: float
    dof: float

    def for_difference(self) -> "SeedVariance":
        """The spread of the difference of two systems' runs."""
        return SeedVariance(2 * self.variance, self.dof)


@dataclass(frozen=True)
class RunSample:
    """A figure of every run of one system, and the rows behind it.

    Args:
        seeds: of the runs, ascending.
        values: (S,) the figure of each run.
        rows: split -> (S, N): how much row n moves the run's figure, times N; each run's row
            sums to 0 (an influence function). Splits are independent of each other.
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
                    f"{key}: rows of {len(self.seeds)} runs have the shape (seeds, at least 2 "
                    f"rows), not {part.shape}"
                )

    def select(self, places: Sequence[int]) -> "RunSample":
        """The runs at some places."""
        chosen = list(places)
        rows = {key: part[chosen] for key, part in self.rows.items()}
        return RunSample(tuple(self.seeds[i] for i in chosen), self.values[chosen], rows)


def build_sample(amounts: Mapping[int, ArrayLike], weight: ArrayLike, key: Hashable) -> RunSample:
    """The ratio sum(amount) / sum(weight) of each run over a split's rows.

    Args:
        amounts: seed -> (N,).
        weight: (N,), the same for every run.
        key: names the split; samples with the same key pair by row.
    """
    seeds = tuple(sorted(amounts))
    amount_SN = np.stack([np.asarray(amounts[seed], np.float64) for seed in seeds])
    weight_N = np.asarray(weight, np.float64)
    if weight_N.sum() <= 0:
        raise ValueError(f"{key}: the weights of the rows sum to nothing")
    values_S = amount_SN.sum(1) / weight_N.sum()
    rows_SN = (amount_SN - values_S[:, None] * weight_N) / weight_N.mean()
    return RunSample(seeds, values_S, {key: rows_SN})


# -- samples of samples --------------------------------------------------------------------


def average_samples(parts: Sequence[RunSample]) -> RunSample:
    """Mean of several figures, seed by seed."""
    parts = _on_common_seeds(parts)
    values = np.mean([part.values for part in parts], axis=0)
    return RunSample(parts[0].seeds, values, _sum_rows([(part, 1 / len(parts)) for part in parts]))


def subtract_samples(left: RunSample, right: RunSample) -> RunSample:
    """``left - right``, run by run."""
    left, right = pair_samples(left, right)
    return RunSample(
        left.seeds, left.values - right.values, _sum_rows([(left, 1.0), (right, -1.0)])
    )


def divide_samples(above: RunSample, below: RunSample) -> RunSample:
    """``above / below``, run by run; rows by the delta method. NaN where ``below`` is 0."""
    above, below = pair_samples(above, below)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where(below.values == 0, np.nan, above.values / below.values)
        scale = np.where(below.values == 0, np.nan, 1 / below.values)
    return RunSample(above.seeds, values, _sum_rows([(above, scale), (below, -values * scale)]))


def pair_samples(left: RunSample, right: RunSample) -> tuple[RunSample, RunSample]:
    """Two samples on the seeds that both have.

    Runs without two common seeds pair in the order of their seeds: seeds are exchangeable, so
    any fixed pairing gives a valid test.
    """
    if left.seeds == right.seeds:
        return left, right
    common = sorted(set(left.seeds) & set(right.seeds))
    if len(common) >= 2 or len(common) == min(len(left.seeds), len(right.seeds)):
        return (
            left.select([left.seeds.index(seed) for seed in common]),
            right.select([right.seeds.index(seed) for seed in common]),
        )
    count = min(len(left.seeds), len(right.seeds))
    return left.select(range(count)), right.select(range(count))


def _on_common_seeds(parts: Sequence[RunSample]) -> list[RunSample]:
    if not parts:
        raise ValueError("a mean needs at least one figure")
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
                    f"{key}: {rows[key].shape[1]} rows do not pair with {scaled.shape[1]}"
                )
            rows[key] = rows[key] + scaled if key in rows else scaled
    return rows


# -- estimates and tests -------------------------------------------------------------------


def pool_seed_variance(samples: Sequence[RunSample]) -> SeedVariance | None:
    """The spread over seeds that systems have in common; none without repeated runs."""
    parts = [(_variance(each.values), len(each.seeds) - 1) for each in samples]
    freedom = sum(own for _, own in parts)
    if not freedom:
        return None
    return SeedVariance(sum(variance * own for variance, own in parts if own) / freedom, freedom)


def estimate_mean(
    of: RunSample,
    spread: SeedVariance | None = None,
    level: float = LEVEL,
    least: float = -np.inf,
    most: float = np.inf,
) -> ScoreEstimate:
    """Mean over seeds with its interval; bounds are cut at ``least`` and ``most``.

    Args:
        of: the figure of each run.
        spread: over seeds, pooled; none takes the sample's own.
        level: share of intervals that shall hold the truth.
        least, most: ends of the figure's scale.
    """
    value, error, freedom = _mean_and_error(of, spread)
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * error if error else 0.0 * error
    low, high = (float(np.clip(x, least, most)) for x in (value - half, value + half))
    return ScoreEstimate(value, low, high, error, freedom, len(of.seeds))


def compute_p_value(of: RunSample, spread: SeedVariance | None = None, null: float = 0.0) -> float:
    """Two-sided p-value of "the mean is ``null``" (Student's t); see :func:`estimate_mean`."""
    value, error, freedom = _mean_and_error(of, spread)
    if np.isnan(value) or np.isnan(error):
        return float("nan")
    if error == 0:
        return 1.0 if value == null else 0.0
    return float(2 * stats.t.sf(abs(value - null) / error, freedom))


def _variance(values_S: NDArray[np.float64]) -> float:
    # A float's rounding is no spread: equal seeds shall give exactly none.
    if len(values_S) < 2 or np.ptp(values_S) == 0:
        return 0.0
    return float(values_S.var(ddof=1))


def _mean_and_error(of: RunSample, spread: SeedVariance | None) -> tuple[float, float, float]:
    """Mean, standard error, degrees of freedom."""
    count = len(of.seeds)
    value = float(of.values.mean())
    variances, squares = [], []
    if count > 1 or spread is not None:
        known = spread or SeedVariance(0.0, count - 1)
        variances.append(max(_variance(of.values), known.variance) / count)
        squares.append(variances[-1] ** 2 / known.dof)
    for part in of.rows.values():
        rows = part.shape[1]
        mean_N = part.mean(0)
        variance = float(mean_N.var(ddof=1)) / rows
        if count > 1:
            rest = float(((part - mean_N) ** 2).sum()) / ((count - 1) * (rows - 1))
            variance = max(variance - rest / (count * rows), 0.0)
        variances.append(variance)
        squares.append(variance**2 / (rows - 1))
    total = sum(variances)
    freedom = total**2 / sum(squares) if sum(squares) > 0 else np.inf
    return value, float(np.sqrt(total)), float(freedom)


def correct_p_values(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (source: Holm 1979); NaN stays and does not count.

    Rejecting those that are at most alpha keeps the chance of any false rejection below alpha,
    however the tests depend on each other.
    """
    p = np.asarray(p_values, np.float64)
    order = [int(i) for i in np.argsort(p) if not np.isnan(p[i])]
    adjusted = np.full(len(p), np.nan)
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * p[index]))
        adjusted[index] = highest
    return [float(x) for x in adjusted]
