"""TODO: sweeps.config.space."""

import json
from dataclasses import dataclass, field, fields
from typing import Any

from skillnet_platform.errors import UserError

Range = list[float]


@dataclass
class SearchDimension:
    """What one key takes; exactly one of these is given.

    Args:
        choice: values, one of which is drawn.
        grid: values, each of which is tried with everything that is drawn for the others.
        options: name -> keys that are set together; one of them is drawn.
        uniform: [low, high], a number between them.
        loguniform: [low, high], a number between them whose logarithm is uniform.
        integer: [low, high], a whole number, both included.
        log_integer: [low, high], a whole number whose logarithm is uniform.
    """

    choice: list[Any] = field(default_factory=list)
    grid: list[Any] = field(default_factory=list)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    uniform: list[float] = field(default_factory=list)
    loguniform: list[float] = field(default_factory=list)
    integer: list[int] = field(default_factory=list)
    log_integer: list[int] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Which of them is given."""
        return next((f.name for f in fields(self) if getattr(self, f.name)), "")

    @property
    def range(self) -> tuple[Any, Any] | None:
        """(low, high) of a range; none for a list of values."""
        kind = self.kind
        if kind in ("choice", "grid", "options"):
            return None
        low, high = getattr(self, kind)
        return low, high

    @property
    def values(self) -> list[Any]:
        """The values of a list, or the names of options."""
        return list(self.options) if self.options else list(self.grid or self.choice)

    def value_at(self, share: float) -> Any:
        """The value below which this share, in [0, 1), of what is drawn lies."""
        if self.range is None:
            return self.values[int(share * len(self.values))]
        low, high = self.range
        if self.kind == "integer":
            return low + int(share * (high + 1 - low))
        if self.kind == "uniform":
            return float(low + share * (high - low))
        if self.kind == "loguniform":
            return float(low * (high / low) ** share)
        # Each whole number owns the stretch around it, so that both ends are as likely as others.
        drawn = (low - 0.5) * ((high + 0.5) / (low - 0.5)) ** share
        return min(max(round(drawn), low), high)

    def check(self, where: str) -> None:
        """Raise UserError unless exactly one kind is given, and well formed."""
        given = [f.name for f in fields(self) if getattr(self, f.name)]
        known = ", ".join(f.name for f in fields(self))
        if len(given) != 1:
            what = " and ".join(given) if given else "nothing"
            raise UserError(f"{where}: give one of {known}, not {what}")
        if self.range is None:
            seen = [json.dumps(value, sort_keys=True) for value in self.values]
            twice = next((each for each in seen if seen.count(each) > 1), None)
            if twice is not None:
                raise UserError(f"{where}.{self.kind}: {twice} is there twice")
            return
        ends = getattr(self, self.kind)
        if len(ends) != 2 or not ends[0] < ends[1]:
            raise UserError(f"{where}.{self.kind}: expected [low, high], low < high, got {ends}")
        if self.kind.startswith("log") and ends[0] <= 0:
            raise UserError(f"{where}.{self.kind}: low must be above 0, got {ends[0]}")


def format_setting(value: Any) -> str:
    """A value in one word, for names and tables: lists joined with +."""
    if isinstance(value, list | tuple):
        return "+".join(map(format_setting, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
