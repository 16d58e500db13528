"""Fractions of the tasks, and the order of rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.training.loading.samplers import (
    BLOCK,
    ShuffleSampler,
    TaskSampler,
    compute_task_weights,
)
from skillnet.keyed_random import keyed_rng


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
def test_every_row_occurs_once_per_epoch_for_any_size(
    rows: int, batch: int, window: int, bucketed: bool
) -> None:
    lengths = (np.arange(rows)[::-1] % 7).__getitem__ if bucketed else None
    order = ShuffleSampler(rows, batch, (1, "order"), lengths, window)
    epochs = 4
    batches = -(-epochs * rows // batch)
    flat = np.concatenate([order.batch(index) for index in range(batches)])
    assert len(flat) == batches * batch
    for epoch in range(epochs):
        assert sorted(flat[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_batches_can_be_requested_in_any_order() -> None:
    lengths = (np.arange(50) % 9).__getitem__
    one = ShuffleSampler(50, 8, (5,), lengths, bucket=3)
    expected = [one.batch(index) for index in range(40)]
    other = ShuffleSampler(50, 8, (5,), lengths, bucket=3)
    for index in (39, 2, 17, 16, 0):
        assert np.array_equal(other.batch(index), expected[index])


def test_generator_keys() -> None:
    draws = [keyed_rng(*key).random() for key in [(1, 2), (2, 1), (1, "a"), (1, "b"), (1,)]]
    assert len(set(draws)) == len(draws)
    assert keyed_rng(1, "a").random() == draws[2]
