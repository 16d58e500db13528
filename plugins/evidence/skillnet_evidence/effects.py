"""Effects of settings on a score, over trials whose settings are drawn or crossed.

The score is fitted by least squares with one indicator per value of each setting (main effects), so
that a setting is weighed over all configurations, also where values are drawn and not crossed. An
effect is the score with a value less the score with the first value of its setting.

With at least ``MIN_SEEDS`` seeds the fit is repeated per seed, and the interval is Student's t over
seeds: runs of one seed share initial weights and batches, so they are not independent. With fewer
seeds the interval is that of the fit to the means of configurations, whose residuals contain
interactions and noise. It requires ``MIN_DOF`` degrees of freedom. :func:`estimate_effects` is
called by ``skillnet sweep``.

Shapes: N trials or configurations, P indicators.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from skillnet_evidence.format import format_setting, format_signed_points
from skillnet_evidence.units import CONFIDENCE_LEVEL

#: Seeds from which on the interval is over seeds.
MIN_SEEDS = 3
#: Residual degrees of freedom below which a fit gives no interval.
MIN_DOF = 3
#: Distinct numbers of a setting above which they are grouped, and the number of groups.
MAX_VALUES, GROUPS = 5, 3
#: Largest relative error with which a contrast counts as estimable.
TOLERANCE = 1e-6


class ScoredTrial(NamedTuple):
    """A finished trial.

    Args:
        group: name of its configuration.
        seed: seed of the trial.
        settings: key -> value.
        score: mean validation score.
    """

    group: str
    seed: int
    settings: Mapping[str, Any]
    score: float


@dataclass(frozen=True)
class SettingEffect:
    """Score with one value of a setting less the score with its first value, other settings equal.

    Args:
        setting: key of the setting.
        value: the value, or a range of numbers.
        base: the first value.
        effect: the difference, as a fraction.
        low: lower bound of the 95 % interval; NaN if it is unknown.
        high: upper bound.
        source: whether the interval is over seeds or over configurations; "" without an interval.
    """

    setting: str
    value: str
    base: str
    effect: float
    low: float
    high: float
    source: Literal["seeds", "configurations", ""]


def estimate_effects(trials: Sequence[ScoredTrial], keys: Sequence[str]) -> list[SettingEffect]:
    """Return the effect of each value of each setting; values without an estimate are absent.

    Args:
        trials: finished trials.
        keys: settings of the space. Settings that follow from others are left out.
    """
    labels = {key: _group_values([trial.settings.get(key) for trial in trials]) for key in keys}
    levels = {key: _order_levels(own) for key, own in labels.items()}
    columns = [(key, level) for key in keys for level in levels[key][1:]]
    if not columns or not trials:
        return []
    design_NP = np.array(
        [[1.0, *(float(labels[key][n] == level) for key, level in columns)]
         for n in range(len(trials))]
    )  # fmt: skip
    score_N = np.array([trial.score for trial in trials])
    seeds = [trial.seed for trial in trials]
    groups = [trial.group for trial in trials]
    by_seed = [
        _fit_effects(design_NP[rows], score_N[rows])
        for rows in (np.array(seeds) == seed for seed in dict.fromkeys(seeds))
    ]
    mean_design, mean_score = _average_groups(design_NP, score_N, groups)
    pooled = _fit_effects(mean_design, mean_score)
    effects = []
    for place, (key, level) in enumerate(columns, 1):
        values = [
            effects_P[place] for effects_P, _, _ in by_seed if not math.isnan(effects_P[place])
        ]
        if len(values) >= MIN_SEEDS:
            effect, error, dof, source = *_summarize_seeds(values), "seeds"
        else:
            effect, error, dof = pooled[0][place], pooled[1][place], pooled[2]
            source = "configurations"
        if math.isnan(effect):
            continue
        half = _half_width(error, dof if source == "seeds" or dof >= MIN_DOF else math.nan)
        effects.append(
            SettingEffect(
                key, level, levels[key][0], float(effect), effect - half, effect + half,
                "" if math.isnan(half) else source,  # type: ignore[arg-type]
            )
        )  # fmt: skip
    return effects


def build_effects_table(effects: Sequence[SettingEffect]) -> tuple[list[str], list[list[str]], str]:
    """Return columns, cells and the caption of the table of effects.

    Args:
        effects: effect of each setting of a sweep.
    """
    cells = []
    for each in effects:
        interval = "too few trials"
        if not math.isnan(each.low):
            interval = f"{format_signed_points(each.low)} to {format_signed_points(each.high)}"
        change = f"{each.value} − {each.base}"
        points = format_signed_points(each.effect)
        cells.append([each.setting, change, points, interval, each.source or "–"])
    columns = ["setting", "difference", "points", "95 % interval", "over"]
    caption = (
        "Least squares over the finished trials, with one indicator per value of each setting; "
        "numbers with more than five values are grouped in thirds. The interval is Student's t "
        f"over seeds from {MIN_SEEDS} seeds on, else over the residuals of configurations. One in "
        "twenty differences without an effect appears distinct from 0."
    )
    return columns, cells, caption


def _group_values(values: Sequence[Any]) -> list[str]:
    """Return the label of each value; many different numbers are grouped by quantiles."""
    numbers = [_parse_number(value) for value in values]
    distinct = {number for number in numbers if number is not None}
    if None in numbers or len(distinct) <= MAX_VALUES:
        return [format_setting(value) for value in values]
    known = np.array([number for number in numbers if number is not None])
    ends = np.quantile(known, np.linspace(0, 1, GROUPS + 1))
    place = np.clip(np.searchsorted(ends, known, side="right") - 1, 0, GROUPS - 1)
    return [f"{ends[p]:.3g} to {ends[p + 1]:.3g}" for p in place]


def _order_levels(labels: Sequence[str]) -> list[str]:
    """Return the distinct labels: numbers ascending, others in the order of the trials."""
    distinct = list(dict.fromkeys(labels))
    first = [_parse_number(label.partition(" to ")[0]) for label in distinct]
    if any(number is None for number in first):
        return distinct
    return sorted(distinct, key=lambda label: float(label.partition(" to ")[0]))


def _parse_number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _average_groups(
    design_NP: NDArray[np.float64], score_N: NDArray[np.float64], groups: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows = [np.array(groups) == name for name in dict.fromkeys(groups)]
    return (
        np.stack([design_NP[own].mean(0) for own in rows]),
        np.array([score_N[own].mean() for own in rows]),
    )


def _fit_effects(
    design_NP: NDArray[np.float64], score_N: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Return the coefficients and standard errors, (P,), and the residual degrees of freedom.

    Coefficients that the rows do not determine are NaN.
    """
    inverse_PN = np.linalg.pinv(design_NP)
    effects_P = inverse_PN @ score_N
    # A coefficient is estimable if its unit vector lies in the row space of the design.
    projection_PP = inverse_PN @ design_NP
    is_known = np.abs(projection_PP - np.eye(len(projection_PP))).max(1) < TOLERANCE
    dof = len(score_N) - int(np.linalg.matrix_rank(design_NP))
    residual_N = score_N - design_NP @ effects_P
    variance = float(residual_N @ residual_N) / dof if dof > 0 else math.nan
    errors_P = np.sqrt(variance * (inverse_PN**2).sum(1))
    return np.where(is_known, effects_P, np.nan), errors_P, dof


def _summarize_seeds(values: Sequence[float]) -> tuple[float, float, int]:
    sample = np.array(values)
    return float(sample.mean()), float(sample.std(ddof=1)) / math.sqrt(len(sample)), len(sample) - 1


def _half_width(error: float, dof: float) -> float:
    """Return half of the interval; NaN if it is unknown or would have no width."""
    from scipy import stats

    if math.isnan(dof) or not error > 1e-12:
        return math.nan
    return float(stats.t.ppf((1 + CONFIDENCE_LEVEL) / 2, dof)) * error
