"""Checks of values: bounds and choices as part of their types, and hints for unknown names."""

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral, Real
from typing import Annotated, Any, Literal

from annotated_types import Interval

#: End of the name of a package of skills, and bytes of its ``skill.json``.
PACKAGE_SUFFIX, MAX_ABOUT_BYTES = ".skill", 2**22

#: Upper limits. A saved configuration can come from anyone, and building a larger model would not
#: end.
MAX_SIZE = 2**24
MAX_LAYERS = 1024

LayerSize = Annotated[int, Interval(ge=1, le=MAX_SIZE)]
OptionalSize = Annotated[int, Interval(ge=0, le=MAX_SIZE)]
DropProbability = Annotated[float, Interval(ge=0, lt=1)]


def check_bounds(settings: Any, prefix: str) -> None:
    """Check the values of a dataclass against the bounds and the choices in its types.

    Args:
        settings: instance of the dataclass.
        prefix: start of the keys in messages, with a dot at the end.

    Raises:
        ValueError: a value is out of its bounds, is no number, or none of the choices.
    """
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        choices = typing.get_args(hints[field.name])
        if typing.get_origin(hints[field.name]) is Literal and value not in choices:
            listed = " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
            raise ValueError(f"{prefix}{field.name} is {listed}, not {value!r}")
        for kind, interval in _intervals(hints[field.name]):
            if value is not None:
                _check_number(f"{prefix}{field.name}", value, kind, interval)


def _intervals(hint: Any) -> Iterator[tuple[type, Interval]]:
    """Yield the kind and the interval of ``Annotated[kind, interval]`` and of ``… | None``."""
    if typing.get_origin(hint) is Annotated:
        kind, interval = typing.get_args(hint)
        yield kind, interval
    elif type(None) in typing.get_args(hint):
        for arg in typing.get_args(hint):
            yield from _intervals(arg)


def _check_number(key: str, value: Any, kind: type, interval: Interval) -> None:
    low = interval.ge if interval.ge is not None else interval.gt
    expected: Any = Integral if kind is int else Real
    fits = isinstance(value, expected) and not isinstance(value, bool)
    # A comparison with nan is false.
    fits = fits and low <= value <= (interval.le if interval.le is not None else interval.lt)
    if not fits or value in (interval.gt, interval.lt):
        end = f"to {interval.le}" if interval.le is not None else f"to below {interval.lt}"
        above = "above " if interval.gt is not None else ""
        raise ValueError(f"{key} must be from {above}{low} {end}, got {value!r}")


def require_fields(given: Iterable[str], kind: type | None, where: str) -> None:
    """Raise ValueError for an option that a dataclass does not have, with the nearest one.

    Args:
        given: names of options.
        kind: the dataclass; None has no options.
        where: start of the message.
    """
    known = [field.name for field in dataclasses.fields(kind)] if kind is not None else []
    for key in given:
        if key not in known:
            hint = nearest_hint(key, known) if known else "; it has none"
            raise ValueError(f"{where}: unknown option {key!r}{hint}")


def nearest_hint(name: str, known: Sequence[str]) -> str:
    """Return a hint for an unknown name: '; did you mean …? Known: …'.

    Args:
        name: the unknown name.
        known: the valid names.
    """
    # Imported here: only an error needs it.
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} Known: {', '.join(known) or 'none'}"
