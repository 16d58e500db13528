"""Promotion rule: a challenger becomes champion if it is worse on no task and better on one.

Both are decided by the confidence interval of the difference. The two systems are measured
separately, each with a 95 % interval. The interval of the difference has the half-width
sqrt(a² + b²) of the two half-widths: the normal approximation for independent estimates. On shared
test rows it is wider than a paired interval, so it errs towards "no difference". Worse means that
the interval lies below zero, better that it lies above zero.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

#: End of the reason of a task that was not compared. A tag of the version keeps the reasons.
THAN_THE_CHAMPION = "than the champion, so not compared"


@dataclass(frozen=True)
class MetricEstimate:
    """Estimate of one metric of one system on one task.

    Args:
        metric: name. Estimates of different metrics are not compared.
        value: the estimate.
        low: lower end of its 95 % interval.
        high: upper end of its 95 % interval.
        higher_is_better: False for error rates.
        data: digest of the corpus. Estimates on different corpora are not compared.
    """

    metric: str
    value: float
    low: float
    high: float
    higher_is_better: bool = True
    data: str = ""


@dataclass(frozen=True)
class PromotionDecision:
    """Decision about a challenger, with one reason per task.

    Args:
        passed: whether the challenger becomes the champion.
        reasons: one line per task.
    """

    passed: bool
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(self.reasons)

    @property
    def is_incomparable(self) -> bool:
        """Whether a task stops the promotion because the two were measured differently."""
        return any(THAN_THE_CHAMPION in reason for reason in self.reasons)


def decide_promotion(
    challenger: Mapping[str, MetricEstimate], champion: Mapping[str, MetricEstimate]
) -> PromotionDecision:
    """Compare the estimates of a challenger with those of the champion, task by task.

    A task that only the champion has counts as worse. A task that only the challenger has counts
    as better.

    Args:
        challenger: task -> estimate.
        champion: task -> estimate.
    """
    reasons: list[str] = []
    worse = better = False
    for task in sorted({*challenger, *champion}):
        new, old = challenger.get(task), champion.get(task)
        if old is None:
            better = True
            reasons.append(f"{task}: new")
        elif new is None:
            # A model that lost a task must not replace one that has it.
            worse = True
            reasons.append(f"{task}: missing in the challenger")
        elif (new.metric, new.data) != (old.metric, old.data):
            # Other metrics or data allow no comparison, so the champion stays.
            worse = True
            how = "by another metric" if new.metric != old.metric else "on other data"
            reasons.append(f"{task}: measured {how} {THAN_THE_CHAMPION}")
        else:
            low, high = _difference(new, old)
            worse |= high < 0
            better |= low > 0
            word = "worse" if high < 0 else "better" if low > 0 else "no difference"
            gain = f"gain {low:+.4g} to {high:+.4g}"
            # A test of one held-out unit has no interval, so it shows nothing.
            if math.isnan(low):
                gain = "no interval"
            reasons.append(
                f"{task}: {word} ({new.metric} {new.value:.4g} against {old.value:.4g}, {gain})"
            )
    if not worse and not better:
        reasons.append("better on no task")
    return PromotionDecision(better and not worse, tuple(reasons))


def estimates_to_json(estimates: Mapping[str, MetricEstimate]) -> dict[str, dict[str, Any]]:
    """Return task -> estimate as plain mappings."""
    return {task: asdict(estimate) for task, estimate in estimates.items()}


def estimates_from_json(obj: Mapping[str, Mapping[str, Any]]) -> dict[str, MetricEstimate]:
    """Return task -> estimate from plain mappings: the inverse of :func:`estimates_to_json`."""
    return {task: MetricEstimate(**fields) for task, fields in obj.items()}


def _difference(new: MetricEstimate, old: MetricEstimate) -> tuple[float, float]:
    """Return the interval of the gain; a positive gain is an improvement for every metric."""
    sign = 1.0 if new.higher_is_better else -1.0
    gain = sign * (new.value - old.value)
    below_new, above_new = _spread(new)
    below_old, above_old = _spread(old)
    # The gain is smallest with the new value at its worst and the old one at its best.
    return gain - math.hypot(below_new, above_old), gain + math.hypot(above_new, below_old)


def _spread(figure: MetricEstimate) -> tuple[float, float]:
    """Return the lengths of the interval towards worse and towards better."""
    down, up = figure.value - figure.low, figure.high - figure.value
    return (down, up) if figure.higher_is_better else (up, down)
