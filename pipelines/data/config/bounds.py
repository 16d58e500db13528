"""Base class of options whose numbers have bounds."""

from dataclasses import dataclass

from skillnet_platform.config.bounds import require_bounds


@dataclass
class BoundedOptions:
    """Base class of options that checks the bounds in the types of its fields.

    Raises:
        ValueError: a value is outside its bounds; names the field and the bounds.
    """

    def __post_init__(self) -> None:
        require_bounds(self)
