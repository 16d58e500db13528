"""What the first rows of a corpus show: its fields, and in which split they hold something.

One row does not decide: it may lack what all others have. A test often lacks what it asks for.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

#: So many rows of a file, or members of a tar, are looked at.
SAMPLE_ROWS = 1000


class SchemaSample:
    """Fields of some rows."""

    def __init__(self) -> None:
        #: Fields, in the order in which they come.
        self.names: list[str] = []
        self._held: defaultdict[str | None, set[str]] = defaultdict(set)
        self._less: defaultdict[str | None, set[str]] = defaultdict(set)
        self._more: defaultdict[str | None, set[str]] = defaultdict(set)

    def add(self, split: str | None, fields: Mapping[str, Any]) -> None:
        """Look at a row, of that split if it is known."""
        self.names += [name for name in fields if name not in self.names]
        for name, value in fields.items():
            if not is_empty_value(value):
                self._held[split].add(name)
                (self._less if is_minus_one(value) else self._more)[split].add(name)

    @property
    def filled_fields(self) -> list[str]:
        """Fields that hold a value in any row."""
        return [name for name in self.names if any(name in held for held in self._held.values())]

    def has_value(self, split: str | None, field: str) -> bool:
        """Whether any row of a split says something in a field. A label of -1 stands for none, as
        in the tests of GLUE, unless the training rows have it, too."""
        if field in self._more[split]:
            return True
        return field in self._less[split] and field in self._less["train"]


def is_empty_value(value: Any) -> bool:
    """Whether it is none, not a number, an empty text, or an empty list."""
    if isinstance(value, str):
        return not value.strip()
    empty = isinstance(value, bytes | list | tuple | dict) and not value
    return value is None or empty or (isinstance(value, float) and value != value)


def is_minus_one(value: Any) -> bool:
    """Whether it is -1, as a number or written."""
    return isinstance(value, int | float | str) and str(value).strip() in ("-1", "-1.0")
