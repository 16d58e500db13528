"""Micro-batches: the gradients, loss and counts of the whole batch, with one part in memory."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loading.dataloader import Batch, rank_slice
from pipelines.training.loop.gradient_sync import GradientSync
from pipelines.training.loop.resolved_run import ResolvedRun, build_joint_run
from pipelines.training.loop.setup import build_model, trainable_parameters
from pipelines.training.loop.step import backward_step, count_parts, split_batch
from skillnet.multitask_model import TaskModel
from skillnet.precision import choose_precision
from skillnet.skills import default_tasks, masked_tasks
from skillnet_platform.errors import UserError
from tests.helpers.small_corpora import small_config, small_pretraining, write_corpora
from tests.helpers.small_models import drop_tokens

PRECISION = choose_precision("fp64", torch.device("cpu"))
TASKS = tuple(default_tasks())
MASKED = tuple(masked_tasks())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora") / "data", pretrain=20)


def config_of(data: Path, task: str) -> FinetuneConfig:
    """Return a run that trains the task."""
    if task in MASKED:
        return build_joint_run(small_pretraining(data))
    return small_config(data)


def batch_for(config: FinetuneConfig, task: str) -> Batch:
    """Return the first whole batch of a task."""
    stream = ResolvedRun(config).dataloader
    step = next(step for step in range(200) if stream.batch_spec(step).task == task)
    return stream.batch(step).to(PRECISION.device, torch.float64)


def gradients_of(
    config: FinetuneConfig, batch: Batch, micro_batch_size: int | None
) -> tuple[torch.Tensor, TaskModel]:
    """Return the loss of a batch, and the model with its gradients."""
    torch.manual_seed(0)
    model = build_model(config).double().train()
    config.training.micro_batch_size = micro_batch_size
    sync = GradientSync(trainable_parameters(model, config), 1, 1e6)
    sync.begin(batch.task)
    torch.manual_seed(1)
    loss = backward_step(model, batch, PRECISION, config, sync)
    sync.finish()
    return loss, model


@pytest.mark.parametrize("task", TASKS + MASKED)
def test_parts_give_the_gradients_of_the_whole_batch(data: Path, task: str) -> None:
    """With stochastic depth: a part drops the rows that the whole batch drops."""
    config = config_of(data, task)
    config.model.drop_path = 0.3
    batch = batch_for(config, task)
    assert len(batch.rows) > 2
    whole, expected = gradients_of(config, batch, None)
    for size in (1, 2):
        loss, model = gradients_of(config, batch, size)
        torch.testing.assert_close(loss, whole, rtol=1e-9, atol=1e-12)
        wanted = dict(expected.named_parameters())
        for name, parameter in model.named_parameters():
            other = wanted[name].grad
            assert (parameter.grad is None) == (other is None), name
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, other, rtol=1e-9, atol=1e-12)


def test_a_part_repeats_its_dropout_in_the_second_pass(data, monkeypatch):
    """Without that, the gradient of a contrastive loss belongs to other embeddings."""
    drop_tokens(monkeypatch, 0.3)
    config = small_config(data)
    config.model.drop_path = 0.3
    batch = batch_for(config, "text_to_image")
    seen: list[torch.Tensor] = []
    model = build_model(config).double().train()
    forward = model.forward

    def watch(task: str, towers: dict) -> dict:
        outputs = forward(task, towers)
        seen.append(outputs["query"].detach())
        return outputs

    model.forward = watch
    config.training.micro_batch_size = 3
    sync = GradientSync(trainable_parameters(model, config), 1, 1e6)
    sync.begin(batch.task)
    backward_step(model, batch, PRECISION, config, sync)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) == -(-len(batch.rows) // 3)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_all_ranks_have_equally_many_parts(size: int) -> None:
    """Sharded ranks gather weights together in each part: another number would wait forever."""
    for rows, world in itertools.product(range(1, 30), range(1, 9)):
        count = count_parts(rows, world, size)
        for rank in range(world):
            own = rank_slice(rows, rank, world)
            own_rows = max(own.stop - own.start, 1)  # a rank without a row computes one
            assert count <= own_rows
            assert math.ceil(own_rows / count) <= max(size, 2 if rows % world else size)
    assert count_parts(30, 2, None) == 1


@pytest.mark.parametrize("task", ["speech_recognition", MASKED[0]])
def test_parts_have_all_rows_in_order(data: Path, task: str) -> None:
    batch = batch_for(config_of(data, task), task)
    parts = list(split_batch(batch, 3))
    sizes = [len(part.rows) for part in parts]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 1
    assert all(part.global_rows == batch.global_rows for part in parts)
    for name, expected in batch.targets.items():
        assert torch.equal(torch.cat([part.targets[name] for part in parts]), expected)
    for name, expected in batch.towers["input"].items():
        pieces = [part.towers["input"][name] for part in parts]
        if name == "places":
            # A place is a number among the tokens of its own part.
            tokens = [part.targets["masked"].numel() for part in parts]
            pieces = [piece + sum(tokens[:i]) for i, piece in enumerate(pieces)]
        assert torch.equal(torch.cat(pieces), expected)


def test_a_label_fraction_needs_labels(data: Path) -> None:
    config = small_config(data)
    task = "text_classification"
    config.tasks[task] = replace(config.tasks[task], label_fraction=0.1, views=True)
    with pytest.raises(UserError, match=r"text_classification\.label_fraction: this task learns"):
        ResolvedRun(config).dataloader  # noqa: B018
