"""The gate before an alias moves: at least as good on every task, better on one.

Both by confidence interval. The two systems are measured separately, each with a 95 % interval;
the interval of their difference has the half-width sqrt(a² + b²) of the two half-widths (the
normal approximation for independent estimates; on shared test rows it is wider than a paired
one, so it errs towards "no difference"). Worse means: the whole interval of the difference is
below zero; better: the whole of it is above.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MetricEstimate:
    """One task's measure of one system.

    Args:
        metric: its name; figures of different metrics are not compared.
        value: the estimate.
        low: lower end of its 95 % interval.
        high: upper end.
        higher_is_better: false for error rates.
        data: digest of the corpus it was measured on; different ones are not compared.
    """

    metric: str
    value: float
    low: float
    high: float
    higher_is_better: bool = True
    data: str = ""


@dataclass(frozen=True)
class PromotionDecision:
    """Whether the gate opens, and one line a task saying why."""

    passed: bool
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(self.reasons)


def decide_promotion(
    challenger: Mapping[str, MetricEstimate], champion: Mapping[str, MetricEstimate]
) -> PromotionDecision:
    """Hold a challenger's figures, by task, against a champion's.

    A task that only the champion knows closes the gate. One that only the challenger knows
    counts as better.
    """
    reasons: list[str] = []
    worse = better = False
    for task in sorted({*challenger, *champion}):
        new, old = challenger.get(task), champion.get(task)
        if old is None:
            better = True
            reasons.append(f"{task}: new")
        elif new is None:
            worse = True
            reasons.append(f"{task}: missing in the challenger")
        elif (new.metric, new.data) != (old.metric, old.data):
            worse = True
            what = "metric" if new.metric != old.metric else "data"
            reasons.append(f"{task}: measured with another {what}, cannot be compared")
        else:
            low, high = _difference(new, old)
            worse |= high < 0
            better |= low > 0
            word = "worse" if high < 0 else "better" if low > 0 else "no difference"
            reasons.append(
                f"{task}: {word} ({new.metric} {new.value:.4g} against {old.value:.4g}, "
                f"gain {low:+.4g} to {high:+.4g})"
            )
    if not worse and not better:
        reasons.append("better on no task")
    return PromotionDecision(better and not worse, tuple(reasons))


def estimates_to_json(figures: Mapping[str, MetricEstimate]) -> dict[str, dict[str, Any]]:
    """Figures by task as plain mappings."""
    return {task: asdict(figure) for task, figure in figures.items()}


def estimates_from_json(obj: Mapping[str, Mapping[str, Any]]) -> dict[str, MetricEstimate]:
    """The inverse of ``to_json``."""
    return {task: MetricEstimate(**fields) for task, fields in obj.items()}


def _difference(new: MetricEstimate, old: MetricEstimate) -> tuple[float, float]:
    """The interval of the gain; positive is better, whichever way the metric runs."""
    sign = 1.0 if new.higher_is_better else -1.0
    gain = sign * (new.value - old.value)
    below_new, above_new = _spread(new)
    below_old, above_old = _spread(old)
    return gain - math.hypot(below_new, above_old), gain + math.hypot(above_new, below_old)


def _spread(figure: MetricEstimate) -> tuple[float, float]:
    """How far the interval reaches towards worse and towards better."""
    down, up = figure.value - figure.low, figure.high - figure.value
    return (down, up) if figure.higher_is_better else (up, down)
