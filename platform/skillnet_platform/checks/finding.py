"""TODO: skillnet_platform.checks.finding."""

from dataclasses import dataclass
from typing import Literal

GIB = 2**30
Level = Literal["ok", "warning", "error"]
FREE_DISK_BYTES = 5 * GIB


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, how it stands, what was seen, what to do."""

    check: str
    level: Level
    seen: str
    advice: str = ""
