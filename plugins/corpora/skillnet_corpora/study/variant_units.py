"""Units of collections without groups: variants of an item share a mark, and a split holds out all.

A mark is anything that variants have in common: a caption, or a folder with the start of a name.
:func:`join_variants` and :func:`divide_units` serve the corpora of stamps and of clip art.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.data.corpora.base import stable_hash
from skillnet_corpora.demo import IdAllocator

#: Per cent of the units of at most ``LARGEST_UNIT`` items.
TEST, VALIDATION = 25, 10
#: Larger units are used for training: a test of one unit measures little.
LARGEST_UNIT = 6


def join_variants(marks: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Return item -> unit: the first item that shares a mark with it, directly or through others.

    Args:
        marks: item -> its marks.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    numbers = IdAllocator()
    links = [(row, len(marks) + numbers(mark)) for row, each in enumerate(marks.values())
             for mark in each]  # fmt: skip
    size = len(marks) + len(numbers.numbers)
    rows, columns = zip(*links, strict=True) if links else ((), ())
    graph = csr_array(([1] * len(links), (rows, columns)), shape=(size, size))
    _, found = connected_components(graph, directed=False)
    first: dict[int, str] = {}
    return {
        item: first.setdefault(int(part), item) for item, part in zip(marks, found, strict=False)
    }


def divide_units(corpus: str, units: Mapping[str, str]) -> dict[str, str]:
    """Return unit -> split.

    Args:
        corpus: name that decides the random but fixed order.
        units: item -> unit.
    """
    split = {}
    for unit, size in Counter(units.values()).items():
        place = stable_hash(corpus, unit) % 100
        is_held = size <= LARGEST_UNIT and place < TEST + VALIDATION
        split[unit] = ("test" if place < TEST else "validation") if is_held else "train"
    return split


def describe_units() -> dict[str, Any]:
    """Return the numbers of the split."""
    return {"test_percent": TEST, "validation_percent": VALIDATION, "largest_unit": LARGEST_UNIT}
