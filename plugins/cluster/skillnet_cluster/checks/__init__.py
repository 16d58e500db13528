"""Result of a check: a level, the observation and the advice."""

from dataclasses import dataclass
from typing import Literal

GIB = 2**30
Level = Literal["ok", "warning", "error"]
FREE_DISK_BYTES = 5 * GIB


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Args:
        check: name of the check.
        level: ``ok``, ``warning`` or ``error``.
        seen: observation.
        advice: what to do about it.
    """

    check: str
    level: Level
    seen: str
    advice: str = ""
