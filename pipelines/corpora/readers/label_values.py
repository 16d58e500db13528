"""Values of labels: texts with an equal value name one class, and numbers are reported.

Files of one corpus can write a value in several ways: ``1``, ``1.0`` and ``true`` in JSON, CSV and
Parquet. Only the value decides the class.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from decimal import Decimal

#: Longer digit strings are sorted as texts: Python refuses to convert very long ones to numbers.
MAX_LABEL_DIGITS = 640
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
        "value is a class, and classes have no order. If they are the target of a regression, "
        "which no task predicts, replace them by a few classes (such as low, medium, high) first"
    )
