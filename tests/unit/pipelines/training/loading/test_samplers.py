"""Fractions of the tasks, and the order of rows.

The order of corpora that are too large for a complete shuffle.

Groups of shards: the same order for any number of ranks, and own shards for each rank.
"""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.training.loading.dataloader import MultiTaskDataLoader, rank_slice
from pipelines.training.loading.samplers import (
    BLOCK,
    GroupedShuffleSampler,
    ShuffleSampler,
    TaskSampler,
    WindowedShuffleSampler,
    compute_task_weights,
    divide_shards,
)
from pipelines.training.loop.setup import open_corpora
from skillnet.keyed_random import keyed_rng
from skillnet_platform.errors import UserError
from tests.helpers.small_corpora import small_config


@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=6), st.integers(0, 5), st.integers(1, 9))
def test_counts_follow_the_shares_in_every_block(raw: list[float], seed: int, blocks: int) -> None:
    total = sum(raw)
    shares = {f"task{index}": weight / total for index, weight in enumerate(raw)}
    counts = TaskSampler(shares, seed).count_steps(blocks * BLOCK)
    assert sum(counts.values()) == blocks * BLOCK
    for name, share in shares.items():
        assert abs(counts[name] - share * blocks * BLOCK) <= len(shares) - 1 + 1e-6


def test_task_of_a_step_does_not_depend_on_earlier_calls() -> None:
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    far, near = TaskSampler(shares, 3), TaskSampler(shares, 3)
    far.task_at(9_999)
    assert [far.task_at(step) for step in range(2_000)] == [
        near.task_at(step) for step in range(2_000)
    ]


def test_batch_indices_count_up_per_task() -> None:
    schedule = TaskSampler({"a": 0.6, "b": 0.4}, 0)
    seen = {"a": 0, "b": 0}
    for step in range(500):
        name, batch_index = schedule.task_at(step)
        assert batch_index == seen[name]
        seen[name] += 1


def test_tasks_have_no_fixed_order() -> None:
    schedule = TaskSampler({"a": 0.5, "b": 0.5}, 0)
    blocks = {
        tuple(schedule.task_at(step)[0] for step in range(start, start + BLOCK))
        for start in range(0, 10 * BLOCK, BLOCK)
    }
    assert len(blocks) == 10


@pytest.mark.parametrize("lanes", [2, 3, 5, 7])
def test_lanes_divide_the_tasks_and_keep_their_fractions(lanes: int) -> None:
    shares = {"a": 0.15, "b": 0.2, "c": 0.25, "d": 0.25, "e": 0.15}
    schedule, steps = TaskSampler(shares, 3, lanes), 40 * BLOCK
    found = [schedule.task_at(number) for number in range(steps * lanes)]
    assert len(set(found)) == len(found), "no batch of a task occurs twice"
    for name, count in schedule.count_steps(steps).items():
        assert abs(count - shares[name] * steps * lanes) <= 2
    for lane, tasks in enumerate(schedule.lanes):
        assert {name for name, _ in found[lane::lanes]} == tasks
    # Each cut between two lanes divides one task at most.
    assert sum(map(len, schedule.lanes)) <= len(shares) + lanes - 1


def test_equal_tasks_have_a_lane_each() -> None:
    shares = dict.fromkeys("abcdefg", 1 / 7)
    assert TaskSampler(shares, 0, 7).lanes == [{name} for name in "abcdefg"]


def test_weights_explicit_and_by_temperature() -> None:
    rows = {"small": 100, "large": 10_000, "given": 5}
    shares = compute_task_weights(
        {"small": None, "large": None, "given": 2.0}, rows, temperature=2.0
    )
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["large"] / shares["small"] == pytest.approx(10)
    assert shares["given"] == pytest.approx((shares["large"] + shares["small"]) / 2)
    flat = compute_task_weights({"small": None, "large": None}, rows, temperature=1e9)
    assert flat["small"] == pytest.approx(flat["large"])


@given(
    rows=st.integers(1, 60),
    batch=st.integers(1, 25),
    window=st.integers(1, 5),
    bucketed=st.booleans(),
)
def test_every_row_occurs_once_per_epoch_for_any_size(rows, batch, window, bucketed):
    lengths = (np.arange(rows)[::-1] % 7).__getitem__ if bucketed else None
    order = ShuffleSampler(rows, batch, (1, "order"), lengths, window)
    epochs = 4
    batches = -(-epochs * rows // batch)
    flat = np.concatenate([order.batch(index) for index in range(batches)])
    assert len(flat) == batches * batch
    for epoch in range(epochs):
        assert sorted(flat[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


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
def test_every_row_occurs_once_per_epoch(rows, batch, limit, bucketed):
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
def test_a_batch_needs_the_shards_of_its_windows_only(rows, batch, limit):
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


ROWS = (5, 7, 6, 5, 9, 4, 6, 8, 5, 5, 7, 6)
SIZES = tuple(10 * rows for rows in ROWS)
STARTS = np.concatenate([[0], np.cumsum(ROWS)])
BATCH, GROUPS = 16, 8


def sampler(limit: float = 1e9, lengths: np.ndarray | None = None) -> GroupedShuffleSampler:
    measure = None if lengths is None else lengths.__getitem__
    return GroupedShuffleSampler(ROWS, SIZES, BATCH, GROUPS, limit, (3, "order"), measure)


def shards_of(rows: np.ndarray) -> set[int]:
    return set((np.searchsorted(STARTS, rows, side="right") - 1).tolist())


@pytest.mark.parametrize("limit", [1e9, 400.0])
@pytest.mark.parametrize("is_bucketed", [False, True])
def test_ranks_share_one_order_and_no_shard(limit: float, is_bucketed: bool) -> None:
    lengths = np.arange(sum(ROWS)) % 7 if is_bucketed else None
    whole = [sampler(limit, lengths).batch(index) for index in range(12)]
    for world in (1, 2, 4, 8):
        read: list[set[int]] = []
        for rank in range(world):
            part = rank_slice(BATCH, rank, world)
            own = sampler(limit, lengths)
            rows = [own.batch(index, part) for index in range(12)]
            assert all(np.array_equal(a, b[part]) for a, b in zip(rows, whole, strict=True))
            named = {shard for index in range(12) for shard in own.shards(index, part)}
            named |= {shard for index in range(12) for shard in own.next_shards(index, part)}
            assert shards_of(np.concatenate(rows)) <= named
            read.append(named)
        assert sum(map(len, read)) == len(set.union(*read)), "no shard is read by two ranks"


def test_ranks_that_divide_no_group_see_the_same_order() -> None:
    whole = sampler().batch(4)
    for world in (3, 5, 16):
        parts = [sampler().batch(4, rank_slice(BATCH, rank, world)) for rank in range(world)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_each_row_of_a_group_occurs_once_per_epoch() -> None:
    order = sampler(limit=400.0)
    share = BATCH // GROUPS
    for number, group in enumerate(order.groups):
        total = sum(ROWS[shard] for shard in group)
        part = slice(number * share, (number + 1) * share)
        stream = np.concatenate([order.batch(index, part) for index in range(2 * total)])
        for epoch in range(2):
            rows = stream[epoch * total : (epoch + 1) * total].tolist()
            assert Counter(rows) == Counter(
                row for shard in group for row in range(STARTS[shard], STARTS[shard + 1])
            )
        assert not np.array_equal(stream[:total], stream[total : 2 * total])


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=40),
    st.sampled_from([1, 7.5, 30, 64, 1e18, math.inf]),
    st.integers(1, 5),
)
def test_windows_and_groups_are_filled_shard_by_shard(shards, limit, groups):
    """The order of rows follows from these rules, so that a run resumes in every version."""
    rows, sizes = ([shard[part] for shard in shards] for part in (0, 1))
    key = (3, "order")
    windows: list[list[int]] = [[]]
    for shard in keyed_rng(*key, "shards", 0).permutation(len(shards)).tolist():
        if windows[-1] and sum(sizes[one] for one in windows[-1]) + sizes[shard] > limit:
            windows.append([])
        windows[-1].append(shard)
    order = WindowedShuffleSampler(rows, sizes, 1, limit, key)
    firsts = np.cumsum([0, *(sum(rows[shard] for shard in window) for window in windows)])
    assert [order.shards(int(first)) for first in firsts[:-1]] == windows
    assert order.next_shards(0) == (windows[1:] or [order.shards(sum(rows))])[0]
    found: list[list[int]] = [[] for _ in range(groups)]
    for shard in sorted(
        keyed_rng(*key, "groups").permutation(len(shards)).tolist(), key=lambda one: -rows[one]
    ):
        sums = [(sum(rows[one] for one in group), len(group)) for group in found]
        found[sums.index(min(sums))].append(shard)
    divided = divide_shards(rows, groups, key)
    assert [group.tolist() for group in divided] == [sorted(group) for group in found]


def loader(data: Path, batch_size: int, groups: int) -> MultiTaskDataLoader:
    config = small_config(data)
    name = "text_classification"
    config.tasks = {name: replace(config.tasks[name], batch_size=batch_size)}
    corpora = open_corpora(config)
    return MultiTaskDataLoader(corpora, config.tasks, config.model, seed=0, shard_groups=groups)


def test_groups_that_do_not_fit_are_explained(data: Path) -> None:
    with pytest.raises(
        UserError, match=r"batch_size 9 is not a multiple of training\.shard_groups"
    ):
        loader(data, 9, 2)
    with pytest.raises(UserError, match=r"has 2 shards, fewer than training\.shard_groups 4"):
        loader(data, 8, 4)
