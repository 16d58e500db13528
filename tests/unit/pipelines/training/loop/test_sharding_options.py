"""Sharded training: rejected options, systems and nodes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

from pipelines.training.loop.setup import count_sharing_workers
from pipelines.training.loop.sharding import (
    ModelShards,
    count_ranks_per_node,
    find_layers,
    require_sharding,
)
from skillnet.skipped_init import SkippedInit
from skillnet.systems import build_system
from skillnet_platform.errors import UserError
from tests.helpers.small_models import small_config


@pytest.mark.parametrize("system", ["skillnet", "dense", "moe", "alone", "specialist"])
def test_all_systems_can_be_sharded(system: str) -> None:
    with torch.device("meta"), SkippedInit():
        model = build_system(system, small_config(mel_stack=4))
    require_sharding(model)
    # Each layer is gathered by itself.
    encoders = {"alone": 5, "specialist": 8}.get(system, 1)
    assert len(find_layers(model)) == encoders * model.config.num_layers


def test_random_layers_are_rejected() -> None:
    """Workers would wait for each other's layers."""
    with torch.device("meta"), SkippedInit():
        model = build_system("specialist", small_config(mel_stack=4))
    part: Any = next(part for part in model.modules() if hasattr(part, "layerdrop"))
    part.layerdrop = 0.1
    with pytest.raises(UserError, match="leaves out layers at random"):
        require_sharding(model)


def test_a_replica_lies_on_one_node() -> None:
    assert count_ranks_per_node(["a", "a", "b", "b", "c", "c"]) == 2
    for nodes in (["a", "a", "b"], ["a", "b", "a", "b"], ["a", "b", "b", "b"]):
        with pytest.raises(UserError, match="hybrid needs equally many workers on each node"):
            count_ranks_per_node(nodes)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 7, 8, 9])
@pytest.mark.parametrize("ranks", [1, 2, 4, 5])
def test_the_rows_of_all_ranks_are_the_weight_also_if_some_have_none(
    rows: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ModelShards.__new__(ModelShards)
    shards.group = None  # type: ignore[assignment]
    whole = torch.arange(rows * 3.0).view(rows, 3)
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr(dist, "get_world_size", lambda group: ranks)
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        parts.append(shards.cut("weight", whole))
        # FSDP divides a weight in this way.
        count, start = Shard.local_shard_size_and_offset(rows, ranks, rank)
        torch.testing.assert_close(parts[-1], whole[start : start + count], rtol=0, atol=0)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


def test_workers_that_share_a_replica() -> None:
    found = [count_sharing_workers(name, 8, 4) for name in ("none", "hybrid", "full")]
    assert found == [1, 4, 8]
    assert count_sharing_workers("full", 0, 1) == 1, "without Ray one process holds everything"
