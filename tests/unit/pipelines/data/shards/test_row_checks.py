"""Inputs that splits share, and targets with one value, of each kind of column."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.data.shards import row_checks
from pipelines.data.shards.row_checks import check_rows, describe_row_checks, digest_shard


def fixed(rows: np.ndarray) -> pa.Array:
    flat = pa.array(rows.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, rows[0].size)


def ragged(lengths: list[int], width: int) -> pa.Array:
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = pa.array(np.arange(ends[-1] * width, dtype=np.float32))
    return pa.ListArray.from_arrays(pa.array(ends), pa.FixedSizeListArray.from_arrays(flat, width))


PIXELS = np.arange(5 * 12, dtype=np.uint8).reshape(5, 12)


@pytest.mark.parametrize(
    ("modality", "column", "values"),
    [
        ("text", "text", pa.array(["a", "b", "ab", "", "ba"])),
        ("code", "code", pa.array(["f()", "g()", "f( )", "h()", "é"])),
        ("image", "pixels", fixed(PIXELS)),
        ("image", "pixels", pa.array([b"\x01", b"\x02", b"", b"\x01\x02", b"\x03"])),
        ("video", "frames", fixed(PIXELS)),
        ("sound", "log_mel", ragged([2, 1, 3, 1, 2], 4)),
    ],
)
def test_rows_with_equal_inputs_are_counted_between_splits(modality, column, values, monkeypatch):
    """The second and fourth row of the first shards come again, under another label and key."""
    train = pa.table({column: values, "label": pa.array(range(5), pa.int32())})
    test = pa.table({column: values, "label": pa.array([9] * 5, pa.int32())}).take([3, 1, 3])
    other = train.slice(2, 1)
    shards = [
        ("train", digest_shard(train.slice(0, 2), modality)),
        ("train", digest_shard(train.slice(3, 2), modality)),
        ("test", digest_shard(test, modality)),
        ("validation", digest_shard(other, modality)),
    ]
    expected = {"test": {"train": 3}, "train": {"test": 2}}
    assert check_rows(lambda: shards, 8)["shared"] == expected
    monkeypatch.setattr(row_checks, "MAX_DIGESTS", 3)
    assert check_rows(lambda: shards, 8)["shared"] == expected


@pytest.mark.parametrize(
    ("column", "one", "two"),
    [
        ("label", pa.array([3, 3, 3], pa.int32()), pa.array([3, 3, 4], pa.int32())),
        ("value", pa.array([0.5] * 3, pa.float32()), pa.array([0.5, 0.5, 0.25], pa.float32())),
        ("label_set", pa.array([[1, 2]] * 3), pa.array([[1, 2], [1, 2], [1]])),
        ("symbols", pa.array([[7]] * 3), pa.array([[7], [7], [7, 7]])),
    ],
)
def test_a_target_that_never_varies_is_found(column: str, one: pa.Array, two: pa.Array) -> None:
    shards = [
        (split, digest_shard(pa.table({"text": ["a", "b", "c"], column: values}), "text"))
        for split, values in (("train", two), ("test", one), ("test", one), ("validation", two))
    ]
    assert check_rows(lambda: shards, 12)["constant"] == {"test": [column]}


def test_columns_of_other_packages_are_no_error() -> None:
    table = pa.table({"mine": [1, 2], "label": [["a"], ["a"]]})
    assert check_rows(lambda: [("test", digest_shard(table, "image"))], 2) == {
        "shared": {},
        "constant": {"test": ["label"]},
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"row_checks": {"shared": {"test": {"train": 3}}}}, "3 of 40 rows of test (7.5 %)"),
        (
            {"row_checks": {"constant": {"test": ["label"]}}},
            "all rows of test (40) have the same label",
        ),
        ({"labels": ["cat"]}, "one class, 'cat': every answer is right"),
        ({"splits": {"test": {"rows": 9}}, "schema": {"caption_tokens": ""}}, "R@10 is 100 %"),
    ],
)
def test_prepare_words_each_weakness(changes: dict[str, Any], sentence: str) -> None:
    manifest = {"splits": {"train": {"rows": 100}, "test": {"rows": 40}}, "labels": ["a", "b"]}
    assert not describe_row_checks(manifest)
    (said,) = describe_row_checks(manifest | changes)
    assert sentence in said
