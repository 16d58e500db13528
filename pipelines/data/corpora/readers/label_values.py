"""Values of labels: texts with an equal value name one class, and numbers are reported.

Files of one corpus can write a value in several ways: ``1``, ``1.0`` and ``true`` in JSON, CSV and
Parquet. Only the value decides the class.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable
from decimal import Decimal
from typing import Any

from skillnet_platform.errors import UserError

#: Longer digit strings are sorted as texts: Python refuses to convert very long ones to numbers.
MAX_LABEL_DIGITS = 640
#: Largest value of a regression. Beyond it single precision is infinite.
MAX_VALUE = 1e38
#: ``007`` is a code, not a number. The exponent is short, so that values stay small.
_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]{0,639})(\.[0-9]{1,640})?([eE][+-]?[0-9]{1,3})?")
_BOOLEANS = {"true": Decimal(1), "false": Decimal(0)}


def parse_label(label: str) -> Decimal | str:
    """Return the value of a label: a number for ``1``, ``1.0`` and ``True``, else the text."""
    if _NUMBER.fullmatch(label):
        return Decimal(label)
    return _BOOLEANS.get(label.lower(), label)


def merge_equal_labels(labels: Collection[str]) -> list[str]:
    """Return one label per value: the shortest one, of equally long ones the first as text."""
    ordered = sorted(labels, key=lambda label: (len(label), label))
    chosen: dict[Decimal | str, str] = {}
    for label in ordered:
        chosen.setdefault(parse_label(label), label)
    return list(chosen.values())


def count_labels(labels: Iterable[str]) -> Counter[str]:
    """Return the number of rows by class; labels of equal value are one class."""
    counts = Counter(labels)
    names = {parse_label(name): name for name in merge_equal_labels(counts.keys())}
    merged = Counter[str]()
    for label, count in counts.items():
        merged[names[parse_label(label)]] += count
    return merged


def sort_labels(labels: Collection[str]) -> list[str]:
    """Return class names in the order of their ids: by value if all are numbers, else as texts.

    ``"1"`` and ``"01"`` have the same value. The text decides between them, so that every reading
    of a corpus gives the same order.
    """
    if all(label.isdecimal() and len(label) <= MAX_LABEL_DIGITS for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    if all(_NUMBER.fullmatch(label) for label in labels):
        return sorted(labels, key=lambda label: (Decimal(label), label))
    return sorted(labels)


class RunningMoments:
    """Mean and deviation of numbers that are seen one by one (Welford 1962)."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = 0.0
        self._squares = 0.0

    def add(self, value: float) -> None:
        """Add a number."""
        self._count += 1
        step = value - self._mean
        self._mean += step / self._count
        self._squares += step * (value - self._mean)

    def scale(self, where: str) -> tuple[float, float]:
        """Return mean and deviation; the deviation of equal numbers counts as 1.

        Args:
            where: place of the rows, for the message.

        Raises:
            UserError: no number was added.
        """
        if not self._count:
            raise UserError(f"{where}: no training row has a value")
        return self._mean, (self._squares / self._count) ** 0.5 or 1.0


def read_number(value: Any) -> float:
    """Return the value of a regression.

    Args:
        value: a number, or a text with one.

    Raises:
        ValueError: it is no finite number; the text is the reason.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError("no number") from None
    # Shards hold the values in single precision.
    if not abs(number) <= MAX_VALUE:
        raise ValueError("no finite number")
    return number


def read_label_set(value: Any, separator: str) -> list[str]:
    """Return the labels of a row, without duplicates.

    Args:
        value: a list, or a text: a JSON list, or labels with a separator between them.
        separator: text between two labels.

    Raises:
        ValueError: the value is missing, or a label is no text; the text is the reason.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("labels are no JSON list") from None
    if isinstance(value, str):
        value = [part for part in value.split(separator) if part.strip()] or None
    if not isinstance(value, list | tuple):
        raise ValueError("no labels" if value is None else "labels are no list")
    if any(isinstance(each, list | dict) or each is None for each in value):
        raise ValueError("labels are no list of texts")
    return list(dict.fromkeys(str(each).strip() for each in value))


def describe_numeric_labels(labels: Collection[str]) -> str | None:
    """Return a sentence that labels are numbers and what to do, or None if they are not.

    Args:
        labels: class names.
    """
    if not labels or not all(_NUMBER.fullmatch(label) for label in labels):
        return None
    ordered = sort_labels(labels)
    return (
        f"the labels are numbers, {len(labels)} values from {ordered[0]} to {ordered[-1]}. Each "
        "value is a class, and classes have no order. If they are the target of a regression, set "
        "the option task of the corpus: values"
    )
