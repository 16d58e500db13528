"""Bounds of numeric options, checked when a configuration is built."""

from dataclasses import dataclass, field, fields
from typing import Any


def bounded_field(default: float, least: float, most: float = float("inf")) -> Any:
    """Return a dataclass field whose value must be in a closed interval.

    Args:
        default: value of the field.
        least: smallest value.
        most: largest value.
    """
    return field(default=default, metadata={"range": (least, most)})


@dataclass
class BoundedOptions:
    """Base class of options that checks the bounds of its fields.

    Raises:
        ValueError: a value is outside its bounds; names the field and the bounds.
    """

    def __post_init__(self) -> None:
        for option in fields(self):
            least, most = option.metadata.get("range", (None, None))
            value = getattr(self, option.name)
            if least is None or least <= value <= most:  # false for nan
                continue
            bounds = f"at least {least:g}" if most == float("inf") else f"{least:g} to {most:g}"
            raise ValueError(f"{option.name} is {value}; expected {bounds}")
