"""Scores of rows that a split holds out in units, with the effect of each unit and intervals.

A split draws units: a module of functions, a subtree of headings, a speaker. Rows of one unit
resemble each other, so units and not rows are the independent observations of a test split.
:func:`jackknife_units` returns a score and the effect of each unit on it; :func:`bound_score`
turns a standard error into an interval. Evaluations and comparisons use both.
:class:`RowOutcomes` has the rows of one task; :func:`sum_outcomes` sums them by unit.

Shapes: S runs, N rows, K units.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: How the variance of a score depends on its value: a share of successes in [0, 1], a rate of
#: errors that can exceed 1, or not at all.
ScoreScale = Literal["share", "error_rate", "free"]

#: Confidence level of intervals.
CONFIDENCE_LEVEL = 0.95


@dataclass(frozen=True)
class RowOutcomes:
    """Outcomes of one task on one split, in the order of its rows.

    The metric of the task is sum(numerator) / sum(denominator): hits and rows of an accuracy,
    edits and symbols of an error rate.

    Args:
        numerator: (N,) float64.
        denominator: (N,) float64.
        rank: (N,) float64, from 1; NaN for tasks without a ranking.
        unit: (N,) int64, number of the unit of each row, from 0.
    """

    numerator: np.ndarray
    denominator: np.ndarray
    rank: np.ndarray
    unit: np.ndarray

    def __len__(self) -> int:
        return len(self.numerator)

    @property
    def value(self) -> float:
        """Primary metric of the split, a fraction; NaN if the denominators sum to 0."""
        # The sum is 0 if all references of a split are empty.
        total = float(self.denominator.sum())
        return float(self.numerator.sum()) / total if total else float("nan")


def sum_outcomes(rows: RowOutcomes) -> RowOutcomes:
    """Return a line per unit with the sums of its rows: all that intervals and tests need.

    Sums of sums are the same sums, so outcomes and their sums give equal results.

    Args:
        rows: outcomes of a split.
    """
    count = int(rows.unit.max(initial=-1)) + 1
    return RowOutcomes(
        np.bincount(rows.unit, rows.numerator),
        np.bincount(rows.unit, rows.denominator),
        np.full(count, np.nan),
        np.arange(count),
    )


def has_equal_rows(one: RowOutcomes, other: RowOutcomes) -> bool:
    """Return whether two models were evaluated on rows of equal weights and units."""
    return np.array_equal(one.denominator, other.denominator) and np.array_equal(
        one.unit, other.unit
    )


class UnitEffects(NamedTuple):
    """A score of some runs on one split, with the effect of each unit.

    Args:
        values_S: score of each run.
        effects_SK: K - 1 times the change of the score if unit k is added to the others. The
            variance of a score is sum(effects**2) / (K (K - 1)).
        dof: degrees of freedom of that variance; 0 with one unit.
    """

    values_S: NDArray[np.float64]
    effects_SK: NDArray[np.float64]
    dof: float


def number_units(names: ArrayLike) -> NDArray[np.int64]:
    """Return the number of each row's unit, in the order of the units' first rows, (N,).

    Args:
        names: (N,) labels; rows with equal labels are of one unit.
    """
    _, first, inverse = np.unique(np.asarray(names), return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def jackknife_units(
    amounts_SN: ArrayLike, weight_N: ArrayLike, unit_N: ArrayLike | None = None
) -> UnitEffects:
    """Return the ratio sum(amount) / sum(weight) of each run, with the effect of each unit.

    The variance is that of the jackknife over units (CR3). The degrees of freedom are the
    effective number of units minus 1: units of very different sizes count as fewer. Decision 51
    has the measured coverage.

    Args:
        amounts_SN: numerators.
        weight_N: denominators, equal for all runs.
        unit_N: number of each row's unit, from 0; None counts each row as a unit.

    Raises:
        ValueError: the weights sum to 0.
    """
    amounts = np.atleast_2d(np.asarray(amounts_SN, np.float64))
    weight = np.asarray(weight_N, np.float64)
    if weight.sum() <= 0:
        raise ValueError("the weights of the rows must sum to more than 0")
    # A ratio of sums weights long rows more, as the token error rate is defined.
    values = amounts.sum(1) / weight.sum()
    rest = amounts - values[:, None] * weight
    if unit_N is not None:
        units = np.asarray(unit_N, np.int64)
        rest = np.stack([np.bincount(units, row) for row in rest])
        weight = np.bincount(units, weight).astype(np.float64)
    share_K = weight / weight.sum()
    count = len(share_K)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Without the unit, the score changes by its rest over the weight of all others.
        effects = (count - 1) * rest / (weight.sum() * (1 - share_K))
    return UnitEffects(values, effects, float(1 / (share_K**2).sum() - 1))


def compute_unit_error(effects_K: NDArray[np.float64]) -> float:
    """Return the standard error that follows from the effects of units; NaN for one unit."""
    count = len(effects_K)
    if count < 2:
        return float("nan")
    return float(np.sqrt((effects_K**2).sum() / (count * (count - 1))))


def compute_least_error(units: int, dof: float, level: float = CONFIDENCE_LEVEL) -> float:
    """Return the standard error of a score that shows no variance at all.

    All rows right, or two systems with equal answers, do not prove that the next unit is like
    them. The interval is then that of Wilson (1927) for no failure among all units.

    Args:
        units: number of units.
        dof: degrees of freedom.
        level: confidence level of the interval.
    """
    if units < 2:
        return float("nan")
    quantile = _quantile(dof, level)
    return quantile / (units + quantile**2)


def bound_score(
    value: float,
    error: float,
    dof: float,
    units: int,
    scale: ScoreScale = "free",
    level: float = CONFIDENCE_LEVEL,
) -> tuple[float, float]:
    """Return the confidence interval of a score; it holds the score and has a width.

    Shares and error rates get the score interval of Wilson (1927) with the effective number of
    observations that the standard error implies, and Student's t in place of the normal
    distribution (source: Korn & Graubard 1998). It stays in range near the ends of the scale.

    Args:
        value: the score.
        error: its standard error, 0 if it shows no variance.
        dof: degrees of freedom of the standard error.
        units: number of units.
        scale: how the variance depends on the value. "free" gives value ± t * error.
        level: confidence level.

    Returns:
        Lower and upper bound; NaN without a standard error, for example with one unit.
    """
    if np.isnan(error) or np.isnan(value):
        return float("nan"), float("nan")
    quantile = _quantile(dof, level)
    error = error or compute_least_error(units, dof, level)
    is_inside = 0 < value < 1 if scale == "share" else 0 < value
    if scale == "free" or (not is_inside and value not in (0.0, 1.0)):
        return value - quantile * error, value + quantile * error
    spread = value * (1 - value) if scale == "share" else value
    # At an end of the scale the error carries no information; each unit counts once.
    count = spread / error**2 if is_inside else float(units)
    shift = quantile**2 / count
    half = quantile * np.sqrt(spread / count + shift / (4 * count))
    middle, divisor = value + shift / 2, 1 + shift if scale == "share" else 1.0
    low, high = (middle - half) / divisor, (middle + half) / divisor
    # Rounding must not exclude the score itself.
    return float(min(max(low, 0.0), value)), float(max(high, value))


def _quantile(dof: float, level: float) -> float:
    # Only evaluations need it; scipy.stats would take another half second to import.
    from scipy import special

    return float(special.stdtrit(dof, (1 + level) / 2))
