"""Bounds of options that are numbers: a size of 0 is told before anything runs."""

from dataclasses import dataclass, field, fields
from typing import Any


def within(default: float, least: float, most: float = float("inf")) -> Any:
    """A field of a dataclass whose value lies between ``least`` and ``most``, both included."""
    return field(default=default, metadata={"range": (least, most)})


@dataclass
class Ranged:
    """A dataclass that looks at the bounds of its fields.

    Raises:
        ValueError: a value lies outside of them; says which, and what they are.
    """

    def __post_init__(self) -> None:
        for each in fields(self):
            least, most = each.metadata.get("range", (None, None))
            value = getattr(self, each.name)
            if least is None or least <= value <= most:  # nan lies nowhere
                continue
            bounds = f"at least {least:g}" if most == float("inf") else f"{least:g} to {most:g}"
            raise ValueError(f"{each.name} is {value}; expected {bounds}")
