"""Bounds of numeric settings, as part of their types.

``lr: Annotated[float, Interval(gt=0, le=10)]`` is a number above 0 and at most 10. Every number of
a configuration has a lower and an upper bound. The builder of configurations checks them;
:func:`require_bounds` checks a dataclass that Python code makes.
"""

from typing import Annotated, Any

from annotated_types import Interval

from skillnet_platform.config.schema import describe_type, field_types, fits_bounds, format_value
from skillnet_platform.errors import UserError

#: Large enough for every run, small enough for sums and products of a few of them in 64 bits.
MAX_COUNT = 10**9

PositiveCount = Annotated[int, Interval(ge=1, le=MAX_COUNT)]
NonNegativeCount = Annotated[int, Interval(ge=0, le=MAX_COUNT)]
#: NumPy and scikit-learn take seeds of 32 bits.
RandomSeed = Annotated[int, Interval(ge=0, le=2**32 - 1)]
#: Resamples of an interval; 0 omits intervals.
SampleCount = Annotated[int, Interval(ge=0, le=1_000_000)]
ResampleCount = Annotated[int, Interval(ge=1, le=1_000_000)]
ProcessorCount = Annotated[int, Interval(ge=1, le=10_000)]
#: 0 takes a free port.
PortNumber = Annotated[int, Interval(ge=0, le=65_535)]
PositiveAmount = Annotated[float, Interval(gt=0, le=1e9)]
NonNegativeAmount = Annotated[float, Interval(ge=0, le=1e9)]
#: A share that may be everything, and one that leaves a rest.
UnitFraction = Annotated[float, Interval(ge=0, le=1)]
PartialFraction = Annotated[float, Interval(ge=0, lt=1)]


def require_bounds(settings: Any, prefix: str = "") -> None:
    """Check the numbers of a dataclass against the bounds of their types.

    Args:
        settings: instance of the dataclass.
        prefix: key of the instance, with a dot at the end, for the message.

    Raises:
        UserError: a value is out of its bounds or is no number.
    """
    for name, hint in field_types(settings.__class__, with_bounds=True).items():
        value = getattr(settings, name)
        if not fits_bounds(hint, value):
            expected = describe_type(hint)
            raise UserError(f"{prefix}{name}: expected {expected}, got {format_value(value)}")
