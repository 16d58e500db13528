"""What each system spends until it reaches dense's final score.

The validation curves that runs log give the step at which the mean score over tasks first reaches
the mean score of a dense run at its end. Steps, operations and time up to there are ratios of what
the dense run spends in total (Liang et al. 2024, Mixture-of-Transformers: 0.56 of the operations).

Each run is paired with one dense run, of the same fold and seed or in the order of seeds, so that
the pairs are independent and an interval covers the runs of both systems. Replicates share training
rows, and the variance is corrected for it as that of scores. The dense runs themselves are paired
with the next dense run: their ratio is below 1 as far as curves are noisy or flat at the end.
:func:`estimate_budgets` is called by the report of ``skillnet compare``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from skillnet_evidence.comparison import (
    MEAN,
    PRETRAINED,
    SystemComparison,
    find_variant,
)
from skillnet_evidence.scores import ScoredRun
from skillnet_evidence.statistics import ScoreRange
from skillnet_evidence.units import CONFIDENCE_LEVEL

#: Label of the system whose final score is the target.
DENSE = "dense"

#: Task -> (step, value of its metric on validation rows).
TaskCurves = Mapping[str, Sequence[tuple[int, float]]]

#: A run and its (step, mean validation score), by step.
RunCurve = tuple[ScoredRun, list[tuple[int, float]]]


@dataclass(frozen=True)
class TargetBudget:
    """What a system spends until it reaches dense's final score.

    Args:
        against: label of the dense system.
        reached: runs that reach it.
        runs: all runs with curves.
        steps: ratio of the steps. If runs do not reach the target, they count with all that they
            spent, and the ratios are lower bounds without an interval.
        flops: ratio of the operations of all examples, forward passes.
        seconds: ratio of the time in the training loop.
    """

    against: str
    reached: int
    runs: int
    steps: ScoreRange
    flops: ScoreRange
    seconds: ScoreRange

    @property
    def is_bound(self) -> bool:
        """Whether the ratios are lower bounds, because runs do not reach the target."""
        return self.reached < self.runs


def estimate_budgets(
    comparison: SystemComparison,
    read_curves: Callable[[ScoredRun], TaskCurves],
    dense: str = DENSE,
) -> dict[str, TargetBudget]:
    """Return label -> budget, for each system whose runs have logged validation curves.

    Args:
        comparison: runs and their costs.
        read_curves: returns the validation curves of a run.
        dense: label of the dense system. A pretrained system is compared with the pretrained one.
    """
    labels = list(comparison.systems)
    curves = {
        label: [(run, curve) for run in runs if (curve := _average(comparison, read_curves(run)))]
        for label, runs in comparison.systems.items()
    }
    found = {}
    for label in labels:
        against = find_variant(dense, label, labels)
        # Another pretraining would make the target another one.
        if against is None or against.endswith(PRETRAINED) != label.endswith(PRETRAINED):
            continue
        if pairs := _pair_runs(curves[label], curves[against], label == against):
            flops = comparison.costs[label, MEAN].flops / comparison.costs[against, MEAN].flops
            found[label] = _estimate_budget(against, pairs, flops)
    return found


def _pair_runs(
    own: Sequence[RunCurve], other: Sequence[RunCurve], is_same: bool
) -> list[tuple[RunCurve, RunCurve]]:
    """Return pairs of a run and a dense run."""
    if is_same:
        # A run reaches its own final score by definition; the next run's is a target.
        other = [*other[1:], *other[:1]] if len(other) > 1 else []
    elif own and own[0][0].fold.test_to_train is not None:
        # Folds have validation rows of their own, so a target of another fold is another one.
        known = {run.replicate: (run, curve) for run, curve in other}
        return [(each, known[each[0].replicate]) for each in own if each[0].replicate in known]
    return list(zip(own, other, strict=False))


def _average(comparison: SystemComparison, curves: TaskCurves) -> list[tuple[int, float]]:
    """Return (step, mean validation score over the common tasks); [] without a log."""
    scores: list[Mapping[int, float]] = [
        {step: comparison.metrics[task].score(value) for step, value in curves.get(task, ())}
        for task in comparison.common_tasks
    ]
    steps = sorted(set.intersection(*(set(each) for each in scores)))
    return [(step, float(np.mean([each[step] for each in scores]))) for step in steps]


def find_crossing(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """Return the step at which a curve first reaches a score; None if it does not.

    Between two evaluations the score is interpolated. A curve that begins above the target has
    reached it by its first step.

    Args:
        curve: (step, score), by step.
        target: the score.
    """
    before: tuple[int, float] | None = None
    for step, score in curve:
        if score >= target:
            if before is None:
                return float(step)
            share = (target - before[1]) / (score - before[1])
            return before[0] + share * (step - before[0])
        before = (step, score)
    return None


def estimate_ratio(
    ratios: Sequence[float], is_bound: bool = False, test_to_train: float = 0.0
) -> ScoreRange:
    """Return the geometric mean of ratios with its interval over runs (Student's t).

    Args:
        ratios: one per run.
        is_bound: whether some are lower bounds, so that no interval is known.
        test_to_train: test rows per training row of runs that test folds; 0 without folds.
    """
    logs = np.log(np.asarray(ratios, np.float64))
    mean, nan = float(logs.mean()), float("nan")
    # Equal ratios do not show a spread, for instance if all curves begin above the target.
    if is_bound or np.ptp(logs) < 1e-12:
        return ScoreRange(float(np.exp(mean)), nan, nan)
    error = float(logs.std(ddof=1) * np.sqrt(1 / len(logs) + test_to_train))
    half = float(stats.t.ppf((1 + CONFIDENCE_LEVEL) / 2, len(logs) - 1)) * error
    return ScoreRange(*(float(np.exp(x)) for x in (mean, mean - half, mean + half)))


def _estimate_budget(
    against: str, pairs: Sequence[tuple[RunCurve, RunCurve]], flops: float
) -> TargetBudget:
    steps, seconds, reached = [], [], 0
    for (run, curve), (dense, target) in pairs:
        total, dense_total = run.steps, dense.steps
        crossing = find_crossing(curve, target[-1][1])
        reached += crossing is not None
        spent = total if crossing is None else crossing
        steps.append(spent / dense_total)
        seconds.append(run.seconds * spent / total / dense.seconds)
    is_bound = reached < len(pairs)
    (first, _), _ = pairs[0]
    overlap = first.fold.test_to_train or 0.0
    return TargetBudget(
        against,
        reached,
        len(pairs),
        estimate_ratio(steps, is_bound, overlap),
        estimate_ratio([flops * ratio for ratio in steps], is_bound, overlap),
        estimate_ratio(seconds, is_bound, overlap),
    )
