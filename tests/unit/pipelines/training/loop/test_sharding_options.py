"""Sharded training: rejected options and nodes, and checkpoints written beside the steps."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

from pipelines.training.config.run import TrainingConfig
from pipelines.training.loop import sharded_checkpoints
from pipelines.training.loop.checkpointing import (
    CheckpointTensors,
    complete_checkpoint,
    load_checkpoint,
)
from pipelines.training.loop.optimizer import build_optimizer
from pipelines.training.loop.reporter import LoopReporter
from pipelines.training.loop.setup import count_sharing_workers, find_checkpoint
from pipelines.training.loop.sharding import (
    ModelShards,
    build_mesh,
    count_ranks_per_node,
    find_layers,
    require_sharding,
    shard_model,
)
from pipelines.training.runs import checkpoints
from pipelines.training.runs.checkpoints import (
    VerifiedCheckpoint,
    load_weights,
    verify_checkpoint,
)
from skillnet.model import SkillNet
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
def test_the_rows_of_all_ranks_are_the_weight_also_if_some_have_none(rows, ranks, monkeypatch):
    shards = ModelShards.__new__(ModelShards)
    shards.group = None
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


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_training_continues_while_a_checkpoint_is_written(process_group, tmp_path, monkeypatch):
    source = SkillNet(small_config())
    with torch.device("meta"), SkippedInit():
        structure, whole = SkillNet(small_config()), SkillNet(small_config())
    mesh = build_mesh(torch.device("cpu"), 1, False)
    shards = shard_model(structure, whole, source, mesh)
    config = TrainingConfig()
    optimizer = build_optimizer(shards.named_parameters(), config)
    for part in shards.parameters.values():
        part.grad = torch.ones_like(part)
    optimizer.step()
    values = {name: part.detach().clone() for name, part in shards.named_parameters()}
    may_end = threading.Event()

    def wait(staging: Path, written: list[str], state: dict[str, object]) -> None:
        assert may_end.wait(60)
        complete_checkpoint(staging, written, state)

    monkeypatch.setattr(sharded_checkpoints, "complete_checkpoint", wait)
    tensors = CheckpointTensors(whole, optimizer, None, shards)
    writer = sharded_checkpoints.open_writer(tmp_path, tensors, 0, config, LoopReporter())
    writer.start(3, {"seed": 0})
    with torch.no_grad():
        for part in shards.parameters.values():
            part.add_(1)  # the next step
    assert not list(tmp_path.glob("step-*"))
    may_end.set()
    path = writer.close()
    assert path == tmp_path / "step-00000003"
    assert verify_checkpoint(path).state == {"seed": 0, "step": 3}
    found = SkillNet(small_config())
    load_weights(path, found)
    assert all(torch.equal(value, values[name]) for name, value in found.named_parameters())
    # The optimizer's files are those of a training without shards.
    again = build_optimizer(found.named_parameters(), config)
    load_checkpoint(verify_checkpoint(path), found, again)
    for name, parameter in found.named_parameters():
        expected = optimizer.state[shards.parameters[name]]
        assert again.state[parameter].keys() == expected.keys()
        assert all(torch.equal(again.state[parameter][key], expected[key]) for key in expected)


def test_workers_of_a_node_trust_the_one_that_hashes(tmp_path: Path, monkeypatch) -> None:
    """It found a damaged file, so the others take no checkpoint either."""
    seen = VerifiedCheckpoint(tmp_path / "step-5", {"step": 5, "config_digest": "same"})
    hashing: list[bool] = []
    found: list[int | None] = []

    def find(folder: Path, used: object, is_hashed: bool) -> VerifiedCheckpoint:
        hashing.append(is_hashed)
        return seen

    def gather(places: list[object], mine: object) -> None:
        places[:] = ["node", "node"] if isinstance(mine, str) else [found[-1], 5]

    monkeypatch.setattr(checkpoints, "find_newest", find)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    for step, expected in ((5, seen), (None, None)):
        found.append(step)
        assert find_checkpoint(tmp_path, "same", 2, None) is expected
    assert hashing == [False, False]


def test_parts_of_all_workers_must_be_visible(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    sharded_checkpoints.wait_for_files(tmp_path, {"a"}, 0)
    with pytest.raises(UserError, match="b, which another worker wrote, does not appear"):
        sharded_checkpoints.wait_for_files(tmp_path, {"a", "b"}, 0)
