"""Intervals and tests over seeds and held-out units together, for few seeds and many units.

A score of a study depends on two random choices: the seeds that were run and the units that the
test split drew (modules, subtrees, speakers). Every seed answers every row, so the two factors are
crossed. The model is the two-way random-effects model of readers and cases,
y[s, k] = mean + seed[s] + unit[k] + residual[s, k], on jackknife pseudovalues of the units
(source: Dorfman, Berbaum & Metz 1992; degrees of freedom: Hillis 2007). The variance of the mean is

    (MS_seed + max(MS_unit - MS_residual, 0)) / (S K)

with Satterthwaite's degrees of freedom. Rows of a unit are summed first: they resemble each other,
and as independent rows they gave intervals that were three times too short (decision 51).

Few seeds carry little information about the seed variance: they may agree by chance, and a test
would be overconfident. Systems with so few seeds take the variance that is pooled over the systems
of a study (:class:`SeedVariance`), or their own if it is larger, each with its own degrees of
freedom. From ``MIN_OWN_SEEDS`` seeds on each system has its own variance, because systems differ in
it (source: Welch 1947).
``docs/comparison.md`` lists the measured coverage and false alarms.

With rotating folds each run has test rows of its own, and the corrected variance of Nadeau and
Bengio takes the place of this model: see :func:`_correct_error`.

A :class:`RunSample` is a number per run with the effect of each unit. Means over tasks and
logarithms are samples too. ``one - other`` is a :class:`Contrast`, paired by unit. It is not paired
by seed: runs of different systems with equal seeds have nothing in common that was measurable, and
so all runs of both systems count. A difference of contrasts is a contrast, too.

Shapes: S seeds, N test rows of one split, K units.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from skillnet_evidence.units import (
    CONFIDENCE_LEVEL,
    ScoreScale,
    bound_score,
    compute_least_error,
    jackknife_units,
)

#: Runs of a system from which on its own variance over seeds is used.
MIN_OWN_SEEDS = 10


class ScoreEstimate(NamedTuple):
    """A mean over seeds and units with its uncertainty.

    Args:
        value: mean over seeds.
        low: lower bound of the interval.
        high: upper bound of the interval.
        std_error: standard error.
        dof: degrees of freedom of the standard error.
        seeds: number of seeds, the smaller one of a difference. With one seed and no pooled
            variance, the standard error and the interval cover held-out units only. With one unit
            they are NaN.
    """

    value: float
    low: float
    high: float
    std_error: float
    dof: float
    seeds: int


@dataclass(frozen=True)
class ScoreRange:
    """A value with an interval over runs.

    Args:
        value: mean or ratio over runs.
        low: lower bound; NaN if it is unknown.
        high: upper bound.
    """

    value: float
    low: float
    high: float


class SeedVariance(NamedTuple):
    """Variance over seeds of one run's score, pooled over several systems.

    Args:
        variance: variance of one run's score.
        dof: degrees of freedom.
    """

    variance: float
    dof: float


class Contrast:
    """A signed sum of the scores of systems, which has a mean, a standard error and an interval.

    Args:
        terms: each sample with its sign; samples with the same split have the same units.
    """

    def __init__(self, terms: Sequence[tuple["RunSample", float]]) -> None:
        self._terms = tuple(terms)
        units: dict[Hashable, int] = {}
        for sample, _ in terms:
            for key, part in sample.effects.items():
                known = units.setdefault(key, part.shape[1])
                if known != part.shape[1]:
                    raise ValueError(f"{key}: {known} units cannot be paired with {part.shape[1]}")

    @property
    def terms(self) -> Sequence[tuple["RunSample", float]]:
        """Each sample with its sign."""
        return self._terms

    @property
    def value(self) -> float:
        """The signed sum of the means over seeds."""
        return sum(sign * float(sample.values.mean()) for sample, sign in self.terms)

    def __sub__(self, other: "Contrast") -> "Contrast":
        return Contrast([*self.terms, *((each, -sign) for each, sign in other.terms)])


@dataclass(frozen=True)
class RunSample(Contrast):
    """A score of every run of one system, with the effect of each held-out unit.

    Args:
        seeds: seeds of the runs, ascending; with folds, numbers of the replicates.
        values: (S,) score of each run.
        effects: split -> (S, K) jackknife effects of its units, see
            :func:`skillnet_evidence.units.jackknife_units`. Splits are independent of each other.
        dofs: split -> degrees of freedom of the variance over its units.
        test_to_train: test rows per training row, if each run tests a fold of its own. Such a
            sample has no effects of units, because its runs have no unit in common.
    """

    seeds: tuple[int, ...]
    values: NDArray[np.float64]
    effects: Mapping[Hashable, NDArray[np.float64]]
    dofs: Mapping[Hashable, float]
    test_to_train: float | None = None

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("a sample needs at least one run")
        for key, part in self.effects.items():
            if part.shape[0] != len(self.seeds) or part.ndim != 2:
                raise ValueError(
                    f"{key}: effects of {len(self.seeds)} runs must have the shape (seeds, "
                    f"units), not {part.shape}"
                )

    @property
    def terms(self) -> Sequence[tuple["RunSample", float]]:
        """The sample itself."""
        return [(self, 1.0)]

    @property
    def units(self) -> int:
        """The smallest number of units of its splits, or its replicates."""
        return min((part.shape[1] for part in self.effects.values()), default=len(self.seeds))

    def select(self, indices: Sequence[int]) -> "RunSample":
        """Return the runs at the given indices."""
        chosen = list(indices)
        effects = {key: part[chosen] for key, part in self.effects.items()}
        seeds = tuple(self.seeds[i] for i in chosen)
        return replace(self, seeds=seeds, values=self.values[chosen], effects=effects)


def build_sample(
    amounts: Mapping[int, ArrayLike],
    weight: ArrayLike,
    key: Hashable,
    units: ArrayLike | None = None,
) -> RunSample:
    """Return the ratio sum(amount) / sum(weight) of each run over the rows of a split.

    Args:
        amounts: seed -> (N,) numerators.
        weight: (N,) denominators, equal for all runs.
        key: name of the split; samples with the same key are paired by unit.
        units: (N,) number of each row's unit, from 0; None counts each row as a unit.

    Raises:
        ValueError: the weights sum to 0.
    """
    seeds = tuple(sorted(amounts))
    amount_SN = np.stack([np.asarray(amounts[seed], np.float64) for seed in seeds])
    try:
        found = jackknife_units(amount_SN, weight, units)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return RunSample(seeds, found.values_S, {key: found.effects_SK}, {key: found.dof})


def build_fold_sample(scores: Mapping[int, float], test_to_train: float) -> RunSample:
    """Return the score of each replicate, a run of one fold and seed.

    Args:
        scores: number of the replicate -> score on the test rows of its fold.
        test_to_train: test rows per training row.
    """
    replicates = tuple(sorted(scores))
    values = np.array([scores[each] for each in replicates], np.float64)
    return RunSample(replicates, values, {}, {}, test_to_train)


def clip_sample(sample: RunSample) -> RunSample:
    """Return a sample whose negative scores are 0: a token error above 1 is worth nothing."""
    kept = sample.values > 0
    effects = {key: part * kept[:, None] for key, part in sample.effects.items()}
    return replace(sample, values=sample.values * kept, effects=effects)


# -- arithmetic of samples -----------------------------------------------------------------


def average_samples(parts: Sequence[RunSample]) -> RunSample:
    """Return the mean of several samples, seed by seed."""
    parts = select_common_seeds(parts)
    values = np.mean([part.values for part in parts], axis=0)
    # Each split occurs once, because tasks are tested on rows of their own.
    effects = {key: x / len(parts) for part in parts for key, x in part.effects.items()}
    dofs = {key: dof for part in parts for key, dof in part.dofs.items()}
    return RunSample(parts[0].seeds, values, effects, dofs, parts[0].test_to_train)


def take_logarithm(sample: RunSample) -> RunSample:
    """Return the logarithm of the mean over seeds, with the part of each run (delta method).

    The difference of two such samples is the logarithm of the ratio of two means. A mean of ratios
    would be too high, because a low denominator raises it more than a high one lowers it.

    Args:
        sample: scores; all values are NaN if their mean is not above 0.
    """
    mean = float(sample.values.mean())
    # A score of 0 has no relative score; NaN keeps it out of every verdict.
    mean = mean if mean > 0 else float("nan")
    values = np.log(mean) + (sample.values - mean) / mean
    effects = {key: part / mean for key, part in sample.effects.items()}
    return replace(sample, values=values, effects=effects)


def select_common_seeds(parts: Sequence[RunSample]) -> list[RunSample]:
    """Return each sample with the seeds, or replicates, that all samples have."""
    if not parts:
        raise ValueError("a mean requires at least one sample")
    common = sorted(set.intersection(*(set(part.seeds) for part in parts)))
    return [part.select([part.seeds.index(seed) for seed in common]) for part in parts]


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
    sample: Contrast,
    spread: SeedVariance | None = None,
    level: float = CONFIDENCE_LEVEL,
    least: float = -np.inf,
    most: float = np.inf,
    scale: ScoreScale = "free",
) -> ScoreEstimate:
    """Return the mean over seeds with its interval, clipped to ``least`` and ``most``.

    Args:
        sample: score of each run, a difference, or the change of one.
        spread: variance over seeds of one system, pooled over systems; None takes the sample's own.
        level: confidence level.
        least: lower end of the score's range.
        most: upper end of the score's range.
        scale: how the variance depends on the score, see
            :func:`skillnet_evidence.units.bound_score`; "error_rate" is about 1 - score.
    """
    terms = _list_terms(sample)
    value, error, dof = _mean_and_error(terms, spread)
    units = min(each.units for each, _ in terms)
    if scale == "error_rate":
        high, low = (1 - x for x in bound_score(1 - value, error, dof, units, scale, level))
    else:
        low, high = bound_score(value, error, dof, units, scale, level)
    low, high = (float(np.clip(x, least, most)) for x in (low, high))
    return ScoreEstimate(value, low, high, error, dof, min(len(each.seeds) for each, _ in terms))


def compute_p_value(
    sample: Contrast, spread: SeedVariance | None = None, null: float = 0.0
) -> float:
    """Return the two-sided p-value of "the mean is ``null``" (Student's t).

    Args:
        sample: score of each run, or a difference.
        spread: variance over seeds of one system, pooled over systems; None takes the sample's own.
        null: mean under the null hypothesis.
    """
    value, error, dof = _mean_and_error(_list_terms(sample), spread)
    # NaN without an error: one unit, or no ratio.
    return float(2 * stats.t.sf(abs(value - null) / error, dof))


def estimate_unit_variance(sample: Contrast) -> tuple[float, float]:
    """Return the variance of the mean over units alone, which more seeds do not reduce.

    Args:
        sample: score of each run, or a difference.

    Returns:
        The variance, and its degrees of freedom; NaN with one unit.
    """
    terms = _list_terms(sample)
    if min(each.units for each, _ in terms) < 2:
        return float("nan"), float("nan")
    parts = _unit_variances(terms)
    return sum(variance for variance, _ in parts), _combine_dofs(parts)


def list_replicates(sample: Contrast) -> dict[int, float]:
    """Return the value of each replicate that all systems have; {} without folds."""
    terms = _list_terms(sample)
    if terms[0][0].test_to_train is None:
        return {}
    values = np.sum([sign * each.values for each, sign in terms], axis=0)
    return dict(zip(terms[0][0].seeds, values.tolist(), strict=True))


def _list_terms(sample: Contrast) -> Sequence[tuple[RunSample, float]]:
    terms = sample.terms
    if len(terms) > 1 and terms[0][0].test_to_train is not None:
        # All answer the rows of the same fold, and folds differ more than systems.
        common = select_common_seeds([each for each, _ in terms])
        return [(each, sign) for each, (_, sign) in zip(common, terms, strict=True)]
    return terms


def _variance(values_S: NDArray[np.float64]) -> float:
    # Rounding errors are not variance: equal values must give exactly 0.
    if len(values_S) < 2 or np.ptp(values_S) == 0:
        return 0.0
    # With few seeds the divisor N would understate the variance clearly.
    return float(values_S.var(ddof=1))


def _mean_and_error(
    terms: Sequence[tuple[RunSample, float]], spread: SeedVariance | None
) -> tuple[float, float, float]:
    """Return the mean of a sum of systems' scores, its standard error and degrees of freedom."""
    value = Contrast(terms).value
    if terms[0][0].test_to_train is not None:
        return value, *_correct_error(terms, terms[0][0].test_to_train)
    if min(sample.units for sample, _ in terms) < 2:
        return value, float("nan"), float("nan")
    parts = [term for sample, _ in terms if (term := _seed_variance(sample, spread)) is not None]
    parts += _unit_variances(terms)
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return value, *_least_error_and_dof(terms[0][0])
    return value, float(np.sqrt(total)), _combine_dofs(parts)


def _correct_error(
    terms: Sequence[tuple[RunSample, float]], test_to_train: float
) -> tuple[float, float]:
    """Return the standard error of a mean over replicates, and its degrees of freedom.

    Replicates share training rows, so their scores are not independent: the variance of their mean
    is (1/J + test/train) times the variance of one (source: Nadeau & Bengio 2003; for repeated
    folds Bouckaert & Frank 2004). It does not fall to 0 with more seeds per fold.
    """
    count = len(terms[0][0].seeds)
    if count < 2:
        return float("nan"), float("nan")
    variance = _variance(np.sum([sign * sample.values for sample, sign in terms], axis=0))
    if variance == 0:
        return compute_least_error(count, count - 1), float(count - 1)
    return float(np.sqrt((1 / count + test_to_train) * variance)), float(count - 1)


def _combine_dofs(parts: Sequence[tuple[float, float]]) -> float:
    """Return Satterthwaite's degrees of freedom of a sum of independent variances."""
    total = sum(variance for variance, _ in parts)
    squares = sum(variance**2 / dof for variance, dof in parts)
    return float(total**2 / squares) if squares > 0 else float("inf")


def _seed_variance(sample: RunSample, spread: SeedVariance | None) -> tuple[float, float] | None:
    """Return the variance of a system's mean over seeds, and its dof; None if unknown."""
    count, own = len(sample.seeds), _variance(sample.values)
    # The larger of own and pooled variance with its degrees of freedom: an unstable system is not
    # understated, and a variance that is small by chance does not count.
    if count < MIN_OWN_SEEDS and spread is not None and own <= spread.variance:
        return spread.variance / count, spread.dof
    return (own / count, count - 1) if count > 1 else None


def _unit_variances(terms: Sequence[tuple[RunSample, float]]) -> list[tuple[float, float]]:
    """Return the variance of the mean over the units of each split, and its dof."""
    found = []
    for key in dict.fromkeys(key for sample, _ in terms for key in sample.effects):
        having = [(sample.effects[key], sign) for sample, sign in terms if key in sample.effects]
        units = having[0][0].shape[1]
        mean_K = sum(sign * part.mean(0) for part, sign in having)
        variance = float((mean_K**2).sum()) / ((units - 1) * units)
        for part, _ in having:
            count = len(part)
            if count > 1:
                # The unit variance contains residual variance, which averages out over seeds.
                residual = float(((part - part.mean(0)) ** 2).sum()) / ((count - 1) * (units - 1))
                variance -= residual / (count * units)
        dof = next(sample.dofs[key] for sample, _ in terms if key in sample.effects)
        found.append((max(variance, 0.0), dof))
    return found


def _least_error_and_dof(sample: RunSample) -> tuple[float, float]:
    """Return the standard error of a mean over splits that shows no variance at all."""
    dof = min(sample.dofs.values())
    each = [compute_least_error(part.shape[1], dof) for part in sample.effects.values()]
    # A mean over splits weights them equally; their errors are independent.
    return float(np.sqrt(np.sum(np.square(each)))) / len(each), dof


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
