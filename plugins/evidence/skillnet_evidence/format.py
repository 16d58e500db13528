"""Format counts, durations, differences and p-values for tables and figures."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def format_plural(number: int, noun: str) -> str:
    """Return a number with its noun: ``2, "seed" -> "2 seeds"``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_count(value: float) -> str:
    """Return a number with three digits and a unit: ``4,200,000 -> "4.2 M"``."""
    if np.isnan(value):
        return "–"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def format_duration(seconds: float) -> str:
    """Return a time with its unit: ``95 -> "1.6 min"``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_signed_points(value: float) -> str:
    """Return a difference in points with its sign: ``0.0123 -> "+1.2"``."""
    # Adding 0.0 turns -0.0 into 0.0, so the sign is "+".
    return f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", "−")


def format_interval(change: Sequence[float]) -> str:
    """Return (difference, low, high, …) in points: ``+1.2 (+0.3 to +2.1)``."""
    # One held-out unit gives a value without an interval.
    if np.isnan(change[1]):
        return format_signed_points(change[0])
    value, low, high = (format_signed_points(x) for x in change[:3])
    return f"{value} ({low} to {high})"


def format_p_value(p: float) -> str:
    """Return a p-value with three decimals, or ``< 0.001``."""
    if np.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def format_setting(value: Any) -> str:
    """Return a value as one word for names and tables; list items are joined with +."""
    if isinstance(value, list | tuple):
        return "+".join(map(format_setting, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
