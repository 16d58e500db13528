"""The order of corpora that are too large for a complete shuffle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.training.loading.samplers import WindowedShuffleSampler


def make(
    rows: list[int], batch: int, limit: float, bucketed: bool = False
) -> WindowedShuffleSampler:
    total = sum(rows)
    lengths = np.random.default_rng(0).integers(1, 50, total)
    return WindowedShuffleSampler(
        rows, [10 * count for count in rows], batch, limit, (1, "x"),
        (lambda wanted: lengths[wanted]) if bucketed else None, bucket=3,
    )  # fmt: skip


@given(
    rows=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    batch=st.integers(1, 40),
    limit=st.integers(1, 900),
    bucketed=st.booleans(),
)
@settings(deadline=None)
def test_every_row_occurs_once_per_epoch(
    rows: list[int], batch: int, limit: float, bucketed: bool
) -> None:
    order, total = make(rows, batch, limit, bucketed), sum(rows)
    count = -(-3 * total // batch)
    seen = np.concatenate([order.batch(batch_index) for batch_index in range(count)])
    for epoch in range(3):
        part = seen[epoch * total : (epoch + 1) * total]
        assert sorted(part.tolist()) == list(range(total))


@given(
    rows=st.lists(st.integers(1, 20), min_size=2, max_size=12),
    batch=st.integers(1, 15),
    limit=st.integers(1, 900),
)
@settings(deadline=None)
def test_a_batch_needs_the_shards_of_its_windows_only(
    rows: list[int], batch: int, limit: float
) -> None:
    order = make(rows, batch, limit)
    starts = np.concatenate([[0], np.cumsum(rows)])
    for batch_index in range(12):
        shards = order.shards(batch_index)
        touched = np.searchsorted(starts, order.batch(batch_index), side="right") - 1
        assert set(touched.tolist()) <= set(shards)
        touched = order._touched(batch_index)
        windows = len({(epoch, window) for epoch, window, _, _ in touched})
        largest = max(limit, 10 * max(rows))
        assert sum(10 * rows[shard] for shard in shards) <= windows * largest
        if windows == 2:
            assert sum(10 * rows[shard] for shard in shards) <= order.max_open_bytes()


def test_batch_depends_on_its_index_alone() -> None:
    rows = [7, 3, 9, 4, 8]
    straight = make(rows, 5, 120, bucketed=True)
    batches = [straight.batch(batch_index) for batch_index in range(20)]
    for batch_index in (17, 2, 9):
        fresh = make(rows, 5, 120, bucketed=True)
        np.testing.assert_array_equal(fresh.batch(batch_index), batches[batch_index])
        np.testing.assert_array_equal(straight.batch(batch_index), batches[batch_index])
    later = np.concatenate(batches[7:14])
    assert not np.array_equal(np.concatenate(batches[:7]), later)  # the second epoch is another


def test_next_shards_are_those_of_the_next_window() -> None:
    order = make([4] * 8, 4, 80)  # windows of two shards, batches of one window's half
    for batch_index in range(14):
        ahead = set(order.next_shards(batch_index))
        now = set(order.shards(batch_index))
        after = next(
            set(order.shards(later))
            for later in range(batch_index, batch_index + 4)
            if set(order.shards(later)) != now
        )
        assert ahead == after


def test_rows_of_a_batch_have_similar_lengths() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 200, 600)
    key = (0, "y")
    plain = WindowedShuffleSampler([100] * 6, [1] * 6, 10, 3, key)
    like = WindowedShuffleSampler([100] * 6, [1] * 6, 10, 3, key, lambda rows: lengths[rows])

    def spread(order: WindowedShuffleSampler) -> float:
        return float(np.mean([np.ptp(lengths[order.batch(n)]) for n in range(60)]))

    assert spread(like) < 0.4 * spread(plain)


def test_windows_mix_shards() -> None:
    """With two windows of three shards a batch holds rows of several shards."""
    order = WindowedShuffleSampler([100] * 6, [1] * 6, 30, 3, (0, "z"))
    shards = [len(np.unique(order.batch(n) // 100)) for n in range(20)]
    assert min(shards) >= 2
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(order.batch(0), order.batch(20))


def test_lengths_are_read_from_shards_of_the_window_only() -> None:
    asked: list[np.ndarray] = []

    def lengths(rows: np.ndarray) -> np.ndarray:
        asked.append(rows)
        return rows % 7

    order = WindowedShuffleSampler([40] * 8, [1] * 8, 10, 2, (0, "x"), lengths)
    for batch_index in range(32):
        asked.clear()
        order.batch(batch_index)
        if asked:
            assert set(np.unique(np.concatenate(asked) // 40)) <= set(order.shards(batch_index))
