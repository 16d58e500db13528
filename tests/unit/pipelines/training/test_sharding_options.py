"""Sharded training: rejected options, systems and nodes."""

import pytest

from pipelines.config.run import TrainingConfig
from pipelines.training.replicas import count_sharing_workers
from pipelines.training.sharding import count_ranks_per_node, require_sharding
from skillnet.systems import build_system
from skillnet_platform.errors import UserError
from tests.helpers.small_models import small_config


def test_sharding_and_offloading_exclude_each_other() -> None:
    TrainingConfig(sharding="full")
    with pytest.raises(ValueError, match="set sharding to none, or the other to false"):
        TrainingConfig(sharding="full", offload_inactive_weights=True)


@pytest.mark.parametrize("system", ["skillnet", "dense"])
def test_models_of_skills_can_be_sharded(system: str) -> None:
    require_sharding(build_system(system, small_config()))


def test_other_systems_are_rejected() -> None:
    with pytest.raises(UserError, match="the system moe cannot be sharded; set it to none"):
        require_sharding(build_system("moe", small_config()))


def test_a_replica_lies_on_one_node() -> None:
    assert count_ranks_per_node(["a", "a", "b", "b", "c", "c"]) == 2
    for nodes in (["a", "a", "b"], ["a", "b", "a", "b"], ["a", "b", "b", "b"]):
        with pytest.raises(UserError, match="hybrid needs equally many workers on each node"):
            count_ranks_per_node(nodes)


def test_workers_that_share_a_replica() -> None:
    found = [count_sharing_workers(name, 8, 4) for name in ("none", "hybrid", "full")]
    assert found == [1, 4, 8]
    assert count_sharing_workers("full", 0, 1) == 1, "without Ray one process holds everything"
