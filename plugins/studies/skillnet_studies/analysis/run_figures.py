"""Figures of a comparison over runs: the chance that one system beats another, and robust means.

They are additional to the estimates of :mod:`skillnet_studies.analysis.comparison`. Their intervals
resample runs and hold for these test rows only. :func:`estimate_run_figures` is called by the
tables.

Shapes: T tasks, S runs of one system, D bootstrap draws.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from skillnet.metrics import ConfidenceInterval
from skillnet_studies.analysis.comparison import SPLIT, SystemComparison, find_variant

#: Draws of the bootstrap, of all runs of a system at a time.
DRAWS = 2000


class RunFigures(NamedTuple):
    """Figures of one system against the specialists, over its runs.

    Args:
        against: label of the specialists.
        chance: probability that a run has a higher score than a run of the specialists, mean over
            tasks; equal scores count half (source: Bouthillier et al. 2021).
        middle: interquartile mean, over tasks and runs, of the score relative to the mean score of
            the specialists (source: Agarwal et al. 2021).
    """

    against: str
    chance: ConfidenceInterval
    middle: ConfidenceInterval


def estimate_run_figures(comparison: SystemComparison) -> dict[str, RunFigures]:
    """Return label -> figures, for each system that has specialists and several runs."""
    labels = list(comparison.systems)
    figures = {}
    for label in labels:
        against = find_variant(comparison.specialist, label, labels)
        if against is None or against == label:
            continue
        own, other = (_scores_TS(comparison, name) for name in (label, against))
        # One run has no spread to resample.
        if min(own.shape[1], other.shape[1]) > 1:
            figures[label] = _estimate_figures(against, own, other)
    return figures


def compute_chance(own_DTS: NDArray[np.float64], other_DTS: NDArray[np.float64]) -> NDArray:
    """Return the probability that a run of one system scores above a run of the other, (D,).

    Args:
        own_DTS: scores of the system.
        other_DTS: scores of the other system; the numbers of runs may differ.
    """
    above = np.sign(own_DTS[..., :, None] - other_DTS[..., None, :])
    return (1 + above.mean((1, 2, 3))) / 2


def compute_middle_ratio(own_DTS: NDArray[np.float64], other_DTS: NDArray[np.float64]) -> NDArray:
    """Return the interquartile mean of scores relative to the other system's means, (D,).

    Args:
        own_DTS: scores of the system.
        other_DTS: scores of the other system.
    """
    from scipy import stats

    below = other_DTS.mean(2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(below > 0, own_DTS / below, np.nan)
    return stats.trim_mean(ratios.reshape(len(ratios), -1), 0.25, axis=1)


def _scores_TS(comparison: SystemComparison, label: str) -> NDArray[np.float64]:
    parts = [comparison.samples[label, task, SPLIT] for task in comparison.common_tasks]
    seeds = sorted(set.intersection(*(set(part.seeds) for part in parts)))
    return np.stack([part.select([part.seeds.index(s) for s in seeds]).values for part in parts])


def _estimate_figures(
    against: str, own_TS: NDArray[np.float64], other_TS: NDArray[np.float64]
) -> RunFigures:
    random = np.random.default_rng(0)
    drawn = [_draw_runs(scores_TS, random) for scores_TS in (own_TS, other_TS)]
    found = []
    for figure in (compute_chance, compute_middle_ratio):
        value = float(figure(own_TS[None], other_TS[None])[0])
        low, high = (float(x) for x in np.quantile(figure(*drawn), [0.025, 0.975]))
        # Systems that never overlap give equal draws, which are no certainty.
        nan = float("nan")
        found.append(ConfidenceInterval(value, *((low, high) if low < high else (nan, nan))))
    return RunFigures(against, *found)


def _draw_runs(scores_TS: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    """Return as many runs, drawn with replacement; a run keeps the scores of all of its tasks."""
    runs = scores_TS.shape[1]
    return scores_TS[:, random.integers(0, runs, (DRAWS, runs))].transpose(1, 0, 2)
