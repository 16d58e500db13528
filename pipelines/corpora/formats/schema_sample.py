"""Fields of the first rows of a corpus, and the splits in which they hold values.

A single row does not decide, because it can lack fields that all other rows have. A public test
split often lacks the labels that it asks for.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

#: Rows of a file, or members of a tar, that are sampled.
SAMPLE_ROWS = 1000


class SchemaSample:
    """Field names of sampled rows, with the splits in which each field holds a value."""

    def __init__(self) -> None:
        #: Field names in the order in which they occur.
        self.names: list[str] = []
        self._filled: defaultdict[str | None, set[str]] = defaultdict(set)
        # Fields with a value of -1 in a split, and fields with any other value.
        self._minus_one: defaultdict[str | None, set[str]] = defaultdict(set)
        self._other: defaultdict[str | None, set[str]] = defaultdict(set)

    def add(self, split: str | None, fields: Mapping[str, Any]) -> None:
        """Add a row of a split; None is an unknown split."""
        self.names += [name for name in fields if name not in self.names]
        for name, value in fields.items():
            if not is_empty_value(value):
                self._filled[split].add(name)
                (self._minus_one if is_minus_one(value) else self._other)[split].add(name)

    @property
    def filled_fields(self) -> list[str]:
        """Names of the fields that hold a value in at least one row."""
        filled = {name for names in self._filled.values() for name in names}
        return [name for name in self.names if name in filled]

    def has_value(self, split: str | None, field: str) -> bool:
        """Return whether a row of the split has a value in the field.

        A label of -1 means "no label", as in the tests of GLUE, unless training rows have it too.
        """
        if field in self._other[split]:
            return True
        return field in self._minus_one[split] and field in self._minus_one["train"]


def is_empty_value(value: Any) -> bool:
    """Return whether a value is None, NaN, an empty or blank text, or an empty collection."""
    if isinstance(value, str):
        return not value.strip()
    empty = isinstance(value, bytes | list | tuple | dict) and not value
    return value is None or empty or (isinstance(value, float) and value != value)


def is_minus_one(value: Any) -> bool:
    """Return whether a value is -1, as a number or as a text."""
    return isinstance(value, int | float | str) and str(value).strip() in ("-1", "-1.0")
