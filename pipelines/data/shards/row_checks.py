"""Checks of a corpus' rows as a test: inputs that splits share, and targets that never vary.

A worker reduces each shard to digests with :func:`digest_shard`. :func:`check_rows` compares those
of all shards when a corpus is published, and its result is the key ``ROW_CHECKS`` of the manifest.
:func:`describe_row_checks` words it for ``prepare``.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from skillnet.modality import find_modality

#: Key of a manifest. The digest of a corpus omits it, because it follows from the rows.
ROW_CHECKS = "row_checks"
#: Columns with the right answer of a row.
_TARGET_COLUMNS = ("label", "label_set", "value", "symbols")
#: Digests that are compared at once, 8 bytes each. More rows are compared in several passes.
MAX_DIGESTS = 2**23

#: Checks of one shard, as JSON: see :func:`digest_shard`.
ShardDigests = Mapping[str, Any]


def digest_shard(table: pa.Table, modality: str) -> dict[str, Any]:
    """Return the digests of a shard that :func:`check_rows` compares.

    Args:
        table: rows of the shard.
        modality: medium of the corpus.

    Returns:
        ``inputs``, the digests of all inputs in hexadecimal digits, "" without the usual column;
        and ``targets``: column -> digests of up to two different targets.
    """
    content = find_modality(modality).content_column
    inputs = _digest_column(table, content) if content in table.column_names else None
    targets = {
        name: np.unique(_digest_column(_unique_numbers(table.select([name])), name))[:2].tolist()
        for name in _TARGET_COLUMNS
        if name in table.column_names
    }
    return {"inputs": "" if inputs is None else inputs.tobytes().hex(), "targets": targets}


def check_rows(read: Callable[[], Iterable[tuple[str, ShardDigests]]], rows: int) -> dict[str, Any]:
    """Compare the rows of all splits.

    Memory does not grow with the corpus: each pass compares a part of the digests.

    Args:
        read: returns (split, digests) of every shard; is called once per pass.
        rows: number of all rows.

    Returns:
        ``shared``: split -> other split -> rows whose input a row of the other split has, if there
        are any; and ``constant``: split -> columns of targets with a single value.
    """
    targets: dict[tuple[str, str], set[int]] = defaultdict(set)
    shared: dict[str, dict[str, int]] = {}
    passes = max(-(-rows // MAX_DIGESTS), 1)
    for part in range(passes):
        found: dict[str, list[np.ndarray]] = defaultdict(list)
        for split, digests in read():
            inputs = np.frombuffer(bytes.fromhex(digests["inputs"]), np.uint64)
            found[split].append(inputs if passes == 1 else inputs[inputs % passes == part])
            for column, values in digests["targets"].items():
                targets[split, column].update(values)
        inputs_of = {split: np.concatenate(each) for split, each in found.items()}
        sorted_of = {split: np.unique(each) for split, each in inputs_of.items()}
        for split, own in inputs_of.items():
            for other, known in sorted_of.items():
                if other != split and (count := _count_members(own, known)):
                    counts = shared.setdefault(split, {})
                    counts[other] = counts.get(other, 0) + count
    constant: dict[str, list[str]] = defaultdict(list)
    for (split, column), values in sorted(targets.items()):
        if len(values) == 1:
            constant[split].append(column)
    return {
        "shared": {split: dict(sorted(each.items())) for split, each in sorted(shared.items())},
        "constant": dict(constant),
    }


def describe_row_checks(manifest: Mapping[str, Any]) -> list[str]:
    """Return sentences on splits whose rows prove less than they seem to; none for a good corpus.

    Args:
        manifest: parsed ``manifest.json`` of a corpus.
    """
    checks, splits = manifest.get(ROW_CHECKS, {}), manifest["splits"]
    sentences = []
    for split, others in checks.get("shared", {}).items():
        count, rows = others.get("train", 0), splits[split]["rows"]
        if count and measures_models(split):
            sentences.append(
                f"{describe_shared(split, count, rows, 'train')}, so a model knows them from its "
                "training. Remove these rows from one of the splits"
            )
    labels = manifest.get("labels")
    if labels is not None and len(labels) == 1:
        return [
            *sentences,
            f"one class, {labels[0]!r}: every answer is right, so an accuracy says nothing. Give "
            "rows of a second class, or the folder that holds the folders of all classes",
        ]
    sentences += [
        f"all rows of {split} ({splits[split]['rows']}) have the same {columns[0]}, so a constant "
        "answer is right for all of them. Give the split rows with other answers"
        for split, columns in checks.get("constant", {}).items()
        if measures_models(split) and splits[split]["rows"]
    ]
    sentences += [
        f"{split} has {entry['rows']} rows, so R@10 is 100 % for every model. Give it more rows"
        for split, entry in splits.items()
        if split.startswith("test")
        and 0 < entry["rows"] <= 10
        and "caption_tokens" in manifest.get("schema", ())
    ]
    return sentences


def describe_shared(split: str, count: int, rows: int, other: str) -> str:
    """Return ``"12 of 100 rows of test (12.0 %) have the input of a row of train"``."""
    share = f"{100 * count / rows:.1f} %"
    return f"{count} of {rows} rows of {split} ({share}) have the input of a row of {other}"


def is_constant(table: pa.Table, column: str) -> bool:
    """Return whether all rows of a table have the same value in a column."""
    return len(np.unique(_digest_column(table, column))) == 1


def measures_models(split: str) -> bool:
    """Return whether a split is for measuring: a test, or the validation."""
    return split.startswith("test") or split == "validation"


def _unique_numbers(table: pa.Table) -> pa.Table:
    """Return the different values of a column of whole numbers; another column as it is."""
    (column,) = table.columns
    if not pa.types.is_integer(column.type):
        return table
    return pa.table({table.column_names[0]: pc.unique(column)})


def _digest_column(table: pa.Table, name: str) -> np.ndarray:
    """Return (N,) digests of 64 bits.

    Among 10 million rows, a test row equals a training row by chance with a probability below 1e-5.
    """
    rows = (
        blake2b(row, digest_size=8).digest()
        for chunk in table.column(name).chunks
        for row in _iter_row_bytes(chunk)
    )
    return np.frombuffer(b"".join(rows), np.uint64)


def _iter_row_bytes(array: pa.Array) -> Iterator[Any]:
    """Yield the bytes of each value of an array: a text, a number, or a list of numbers."""
    kind = array.type
    if not _holds_numbers(kind):
        if not pa.types.is_string(kind) and not pa.types.is_binary(kind):
            array = pa.array([repr(value) for value in array.to_pylist()], pa.string())
        yield from (value or b"" for value in array.cast(pa.large_binary()).to_pylist())
    elif pa.types.is_fixed_size_list(kind):
        yield from _flatten(array).reshape(len(array), -1)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        values = array.values
        numbers = _flatten(values)
        width = len(numbers) // max(len(values), 1)
        for begin, end in pairwise(array.offsets.to_pylist()):
            yield numbers[begin * width : end * width]
    else:
        yield from array.to_numpy(zero_copy_only=False).reshape(-1, 1)


def _holds_numbers(kind: pa.DataType) -> bool:
    """Return whether a type is a number, or a list of numbers or of fixed-size lists of them."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    while pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _flatten(array: pa.Array) -> np.ndarray:
    while pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False)


def _count_members(values: np.ndarray, known: np.ndarray) -> int:
    """Return how many values occur in a sorted array."""
    if not len(known):
        return 0
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return int((known[places] == values).sum())
