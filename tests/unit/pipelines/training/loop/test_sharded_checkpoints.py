"""Checkpoints of shards are written beside the training, with the values of their step."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipelines.training.config.run import TrainingConfig
from pipelines.training.loop import sharded_checkpoints
from pipelines.training.loop.checkpointing import complete_checkpoint, load_checkpoint
from pipelines.training.loop.optimizer import build_optimizer
from pipelines.training.loop.reporter import LoopReporter
from pipelines.training.loop.sharding import build_mesh, shard_model
from pipelines.training.runs.checkpoints import load_weights, verify_checkpoint
from skillnet.model import SkillNet
from skillnet.skipped_init import SkippedInit
from skillnet_platform.errors import UserError
from tests.helpers.small_models import small_config


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_training_continues_while_a_checkpoint_is_written(
    process_group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    writer = sharded_checkpoints.open_writer(tmp_path, whole, shards, 0, config, LoopReporter())
    assert writer is not None
    writer.start(3, optimizer, None, {"seed": 0})
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


def test_parts_of_all_workers_must_be_visible(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    sharded_checkpoints.wait_for_files(tmp_path, {"a"}, 0)
    with pytest.raises(UserError, match="b, which another worker wrote, does not appear"):
        sharded_checkpoints.wait_for_files(tmp_path, {"a", "b"}, 0)
