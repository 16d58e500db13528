"""The best learning rate of trials: the top of a parabola over the logarithm of the rate.

The trial with the best score is often best by chance. The top of a parabola moves less, and has a
standard error. The parabola runs through the trials of the best rate and of its neighbours: a rate
at which training fails would bend a parabola through all rates, and move its top to a lower rate.
:func:`fit_best_rate` is called by the tuning of a study.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RateFit:
    """The chosen learning rate, and how it was chosen.

    Args:
        rate: the chosen rate.
        low: rate one standard error of its logarithm below; None if unknown.
        high: rate one standard error above.
        score: value of the parabola at its top, or mean of the trials with the chosen rate.
        note: why the best trial was taken instead of a parabola; empty for a parabola.
    """

    rate: float
    low: float | None
    high: float | None
    score: float
    note: str = ""

    def describe(self) -> str:
        """Return ``1.2e-03 (1.0e-03 to 1.4e-03)``, or the rate with the reason of its choice."""
        if self.note:
            return f"{self.rate:.2g} ({self.note})"
        if self.low is None or self.high is None:
            return f"{self.rate:.2g} (error unknown: three trials)"
        return f"{self.rate:.2g} ({self.low:.2g} to {self.high:.2g})"


def fit_best_rate(rates: Sequence[float], scores: Sequence[float]) -> RateFit:
    """Return the rate at the top of a parabola of the score over log(rate).

    The parabola is fitted to the trials of three adjacent rates, with the best mean score in their
    middle, or at an end if it is the lowest or highest rate (ours). The error is the delta method
    on the covariance of the least-squares fit, whose residuals give the variance of a trial. The
    best trial is taken if fewer than three rates have a score, if the parabola has no top, or if
    the top lies outside of the three rates.

    Args:
        rates: learning rate of each trial; several trials may have one rate.
        scores: score of each trial; higher is better.
    """
    x_N, y_N = np.log(np.asarray(rates, float)), np.asarray(scores, float)
    means = {float(rate): float(y_N[x_N == rate].mean()) for rate in np.unique(x_N)}
    log_best = max(means, key=lambda each: means[each])

    def take_best(note: str) -> RateFit:
        # One of the given numbers: the logarithm of a rate would not give back the same bits.
        rate = next(r for r in rates if math.log(r) == log_best)
        return RateFit(rate, None, None, means[log_best], f"best trial: {note}")

    if len(means) < 3:
        return take_best("fewer than three rates have a score")
    tried = sorted(means)
    first = min(max(tried.index(log_best) - 1, 0), len(tried) - 3)
    is_near_N = np.isin(x_N, tried[first : first + 3])
    x_N, y_N = x_N[is_near_N], y_N[is_near_N]
    # Centred and scaled, because polyfit squares the logarithms.
    center, scale = float(x_N.mean()), float(x_N.std())
    t_N = (x_N - center) / scale
    (a, b, c), covariance = np.polyfit(t_N, y_N, 2, cov="unscaled")
    if a >= 0:
        return take_best("the scores have no top over the rates")
    top = float(-b / (2 * a))
    if not t_N.min() <= top <= t_N.max():
        return take_best("the top lies outside of the tried rates")
    low = high = None
    dof = len(t_N) - 3
    log_rate = center + scale * top
    if dof > 0:
        variance = float(((y_N - np.polyval((a, b, c), t_N)) ** 2).sum()) / dof
        slope_3 = np.array([b / (2 * a * a), -1 / (2 * a), 0.0])
        error = scale * math.sqrt(max(variance * float(slope_3 @ covariance @ slope_3), 0.0))
        low, high = (math.exp(log_rate + sign * error) for sign in (-1, 1))
    return RateFit(math.exp(log_rate), low, high, float(np.polyval((a, b, c), top)))
