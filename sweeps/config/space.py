"""Configuration of one search dimension: values or a range of one key."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from annotated_types import Interval

from skillnet_platform.errors import UserError

#: Ends of a range; the key that is searched has closer bounds.
SearchBound = Annotated[float, Interval(ge=-1e12, le=1e12)]
SearchInteger = Annotated[int, Interval(ge=-(10**12), le=10**12)]


@dataclass
class SearchDimension:
    """Values of one key; exactly one field is set.

    Args:
        choice: values; one is drawn.
        grid: values; each is combined with everything that is drawn for the other keys.
        options: name -> keys that are set together; one name is drawn.
        uniform: [low, high]; a number between them.
        loguniform: [low, high]; a number between them with a uniform logarithm.
        integer: [low, high]; a whole number, bounds included.
        log_integer: [low, high]; a whole number with a uniform logarithm.
    """

    choice: list[Any] = field(default_factory=list)
    grid: list[Any] = field(default_factory=list)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    uniform: list[SearchBound] = field(default_factory=list)
    loguniform: list[SearchBound] = field(default_factory=list)
    integer: list[SearchInteger] = field(default_factory=list)
    log_integer: list[SearchInteger] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Name of the field that is set; "" if none is."""
        return next((f.name for f in fields(self) if getattr(self, f.name)), "")

    @property
    def range(self) -> tuple[Any, Any] | None:
        """(low, high) of a range; None for a list of values."""
        kind = self.kind
        if kind in ("choice", "grid", "options"):
            return None
        low, high = getattr(self, kind)
        return low, high

    @property
    def values(self) -> list[Any]:
        """Values of a list, or names of the options."""
        return list(self.options) if self.options else list(self.grid or self.choice)

    @property
    def countable(self) -> Sequence[Any] | None:
        """All values of a list or of a range of whole numbers; None for other ranges."""
        if self.range is None:
            return self.values
        low, high = self.range
        return range(low, high + 1) if self.kind.endswith("integer") else None

    def value_at(self, fraction: float) -> Any:
        """Return the quantile of the sampling distribution at a fraction in [0, 1)."""
        if self.range is None:
            # Equal parts of [0, 1) for the values of a list.
            return self.values[int(fraction * len(self.values))]
        low, high = self.range
        if self.kind == "integer":
            return low + int(fraction * (high + 1 - low))
        if self.kind == "uniform":
            return float(low + fraction * (high - low))
        if self.kind == "loguniform":
            return float(low * (high / low) ** fraction)
        # Each whole number covers ±0.5 around it, so that the bounds are as likely as the others.
        drawn = (low - 0.5) * ((high + 0.5) / (low - 0.5)) ** fraction
        return min(max(round(drawn), low), high)

    def check(self, where: str) -> None:
        """Raise UserError unless exactly one valid field is set.

        Args:
            where: key for the error message.
        """
        given = [f.name for f in fields(self) if getattr(self, f.name)]
        known = ", ".join(f.name for f in fields(self))
        if len(given) != 1:
            names = " and ".join(given) if given else "nothing"
            raise UserError(f"{where}: give one of {known}, not {names}")
        if self.range is None:
            # JSON makes lists and dictionaries comparable.
            texts = [json.dumps(value, sort_keys=True) for value in self.values]
            duplicate = next((each for each in texts if texts.count(each) > 1), None)
            if duplicate is not None:
                raise UserError(f"{where}.{self.kind}: {duplicate} occurs twice; remove one")
            return
        ends = getattr(self, self.kind)
        if len(ends) != 2 or not ends[0] < ends[1]:
            raise UserError(f"{where}.{self.kind}: expected [low, high], low < high, got {ends}")
        if self.kind.startswith("log") and ends[0] <= 0:
            raise UserError(f"{where}.{self.kind}: low must be above 0, got {ends[0]}")
