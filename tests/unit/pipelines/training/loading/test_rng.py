"""Random numbers of a rank: its part of the global sequence, without the other parts."""

import numpy as np
import pytest

from skillnet.keyed_random import BatchRandom, draw_uniform, keyed_rng


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 1001])
@pytest.mark.parametrize("count", [0, 1, 13, 64])
def test_a_part_equals_the_same_part_of_the_whole_sequence(start: int, count: int) -> None:
    whole = keyed_rng(3, "mask", 5).random(start + count, dtype=np.float32)
    assert np.array_equal(draw_uniform((3, "mask", 5), start, count), whole[start:])


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_ranks_draw_the_rows_of_one_batch(shape: tuple[int, ...]) -> None:
    whole = BatchRandom((1, 2), 10, slice(None)).uniform("crop", *shape)
    assert np.array_equal(whole, keyed_rng(1, 2, "crop").random((10, *shape), dtype=np.float32))
    parts = [slice(0, 3), slice(3, 3), slice(3, 10)]
    ranks = [BatchRandom((1, 2), 10, part).uniform("crop", *shape) for part in parts]
    assert np.array_equal(np.concatenate(ranks), whole)


def test_a_rank_draws_no_numbers_of_other_ranks() -> None:
    # The whole batch would take 4 TB.
    rows = 2**32
    last = BatchRandom((1, 2), rows, slice(rows - 2, rows)).uniform("mask", 256)
    assert last.shape == (2, 256)
