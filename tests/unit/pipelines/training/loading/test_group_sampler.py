"""Groups of shards: the same order for any number of ranks, and own shards for each rank."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.training.loading.dataloader import MultiTaskDataLoader, rank_slice
from pipelines.training.loading.samplers import GroupedShuffleSampler, divide_shards
from pipelines.training.runs.identity import open_corpora
from skillnet_platform.errors import UserError
from tests.helpers.small_corpora import small_config

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


def test_groups_have_all_shards_and_about_equal_numbers_of_rows() -> None:
    groups = divide_shards(ROWS, 4, (0, "order"))
    assert sorted(shard for group in groups for shard in group) == list(range(len(ROWS)))
    sizes = [sum(ROWS[shard] for shard in group) for group in groups]
    assert max(sizes) - min(sizes) <= min(ROWS)
    assert divide_shards(ROWS, 4, (0, "order")) == groups
    assert divide_shards(ROWS, 4, (1, "order")) != groups


def loader(data: Path, batch_size: int, groups: int) -> MultiTaskDataLoader:
    config = small_config(data)
    name = "text_classification"
    config.tasks = {name: replace(config.tasks[name], batch_size=batch_size)}
    corpora = open_corpora(config)
    return MultiTaskDataLoader(corpora, config.tasks, config.model, seed=0, shard_groups=groups)


def test_a_rank_opens_only_the_shards_of_its_groups(data: Path) -> None:
    whole = loader(data, 8, 2)
    table = whole.datasets["text_classification"].shard_table
    assert len(table.rows) == 2
    ranks = [loader(data, 8, 2) for _ in range(2)]
    for step in range(5):
        rows = [stream.batch(step, rank, 2).rows for rank, stream in enumerate(ranks)]
        assert np.array_equal(np.concatenate(rows), whole.batch(step).rows)
    opened = [set(stream.datasets["text_classification"].shard_table._open) for stream in ranks]
    assert sorted(map(len, opened)) == [1, 1]
    assert opened[0] != opened[1]


def test_groups_that_do_not_fit_are_explained(data: Path) -> None:
    with pytest.raises(
        UserError, match=r"batch_size 9 is not a multiple of training\.shard_groups"
    ):
        loader(data, 9, 2)
    with pytest.raises(UserError, match=r"has 2 shards, fewer than training\.shard_groups 4"):
        loader(data, 8, 4)
