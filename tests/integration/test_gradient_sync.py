"""Gradients over ranks: sums, buckets, rows gathered with gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipelines.training.loading.dataloader import rank_slice
from pipelines.training.loop.gradient_sync import (
    DistributedGather,
    GradientSync,
    broadcast_parameters,
)
from pipelines.training.loop.task_groups import TaskGroups
from skillnet.objectives.retrieval import info_nce
from tests.integration.ranks import run_ranks

pytestmark = pytest.mark.integration


class Two(nn.Module):
    """Two skills; each call uses one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.right = nn.Linear(6, 3).double()
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))


def sums_of_gradients(rank: int, world: int, bucket_bytes: float) -> None:
    model = Two()
    active = {
        "left": [*model.left.named_parameters(), ("unused", model.unused)],
        "right": list(model.right.named_parameters()),
    }
    sync = GradientSync(active, world, bucket_bytes)
    x = torch.arange(60, dtype=torch.float64).view(10, 6).sin()
    for repeat, task in enumerate(("left", "right", "left", "left")):
        rows = x[rank_slice(10 - repeat, rank, world)]
        module = getattr(model, task)
        sync.begin(task, flag=repeat == 2 and rank == 1)
        (module(rows).square().sum() / 10).backward()
        assert sync.finish() == (repeat == 2), "what one rank wants, all know, and only then"
        reference = Two()
        (getattr(reference, task)(x[: 10 - repeat]).square().sum() / 10).backward()
        found = dict(model.named_parameters())
        for name, parameter in reference.named_parameters():
            grad = found[name].grad
            if name == "unused" and task == "left":
                assert grad is not None
                assert not grad.any()
            elif parameter.grad is None:
                assert grad is None, name
            else:
                torch.testing.assert_close(grad, parameter.grad, rtol=1e-12, atol=1e-12)
        for parameter in model.parameters():
            parameter.grad = None
    left = 8 * (sum(p.numel() for _, p in active["left"]) + 1)
    right = 8 * (sum(p.numel() for _, p in active["right"]) + 1)
    assert sync.bytes_reduced == 3 * left + right


class LateSum:
    """Handle of a sum over two equal ranks that is not made before somebody waits for it."""

    def __init__(self, values: torch.Tensor, group: None, async_op: bool) -> None:
        assert async_op
        self._values = values

    def wait(self) -> None:
        self._values.mul_(2)


@pytest.mark.parametrize("bucket_bytes", [1, 200, 1e9])
def test_no_step_ends_before_its_sums(bucket_bytes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", LateSum)
    model, alone = Two(), Two()
    active = {"left": list(model.left.named_parameters())}
    sync = GradientSync(active, 2, bucket_bytes)
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)
    sync.begin("left", flag=True)
    model.left(x).square().sum().backward()
    assert sync.finish(), "the flag is a sum as well"
    alone.left(x).square().sum().backward()
    for part, whole in zip(model.left.parameters(), alone.left.parameters(), strict=True):
        assert part.grad is not None
        assert whole.grad is not None
        torch.testing.assert_close(part.grad, 2 * whole.grad, rtol=0, atol=0)


def outside_the_plan(rank: int, world: int) -> None:
    model = Two()
    active = {name: list(getattr(model, name).named_parameters()) for name in ("left", "right")}
    sync = GradientSync(active, world, 1e6)
    sync.begin("left")
    with pytest.raises(AssertionError, match="outside the plan of left"):
        model.right(torch.ones(1, 6, dtype=torch.float64)).sum().backward()


class Shared(nn.Module):
    """A layer of both tasks between layers of one task each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own = nn.ModuleDict({name: nn.Linear(6, 40) for name in ("left", "right")})
        self.shared = nn.Linear(40, 40)
        self.double()

    def active(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        shared = list(self.shared.named_parameters())
        return {name: [*own.named_parameters(), *shared] for name, own in self.own.items()}

    def loss(self, task: str, rows: torch.Tensor) -> torch.Tensor:
        return self.shared(self.own[task](rows).tanh()).square().sum() / 10


def sums_in_shared_buckets(rank: int, world: int) -> None:
    model, reference = Shared(), Shared()
    sync = GradientSync(model.active(), world, 1e6)
    numbers = sum(p.numel() for _, p in model.active()["left"])
    assert sync.nbytes == 0
    x = torch.arange(60, dtype=torch.float64).view(10, 6).sin()
    for task in ("left", "right", "left"):
        sync.begin(task)
        assert sync.nbytes == 8 * (numbers + 2), "gradients of the task, and a flag a bucket"
        model.loss(task, x[rank_slice(10, rank, world)]).backward()
        sync.finish()
        reference.loss(task, x).backward()
        for own, whole in zip(model.parameters(), reference.parameters(), strict=True):
            assert (own.grad is None) == (whole.grad is None)
            if own.grad is not None:
                torch.testing.assert_close(own.grad, whole.grad, rtol=1e-12, atol=1e-12)
            own.grad = whole.grad = None


def sums_over_groups(rank: int, world: int, lanes: int) -> None:
    """Half of the lanes train each task; what one group alone uses does not leave it."""
    model, reference = Shared(), Shared()
    tasks = ["left"] * (lanes // 2) + ["right"] * (lanes // 2)
    groups = TaskGroups([{task} for task in tasks], rank, world)
    sync = GradientSync(model.active(), world, 1e6, groups)
    x = torch.arange(60, dtype=torch.float64).view(10, 6).sin()
    for stops in (False, True):
        own = [tasks[lane] for lane in groups.lanes]
        sync.begin(own[-1], stops and rank == world - 1, tasks)
        for number, task in enumerate(own):
            with sync.paused(number < len(own) - 1):
                model.loss(task, x[rank_slice(10, groups.rank, groups.world)]).backward()
        assert sync.finish() == stops
        for task in tasks:
            reference.loss(task, x).backward()
        assert sync.norm is not None
        expected = nn.utils.get_total_norm([p.grad for p in reference.parameters()])
        torch.testing.assert_close(sync.norm, expected, rtol=1e-12, atol=0)
        for name, own_weight in model.named_parameters():
            whole = reference.get_parameter(name)
            is_held = name.startswith("shared") or name.split(".")[1] in own
            assert (own_weight.grad is not None) == is_held, name
            if is_held:
                torch.testing.assert_close(own_weight.grad, whole.grad, rtol=1e-12, atol=1e-12)
            own_weight.grad = whole.grad = None
    shared = 8 * sum(p.numel() for p in model.shared.parameters())
    private = 8 * sum(p.numel() for p in model.own["left"].parameters())
    assert sync.bytes_reduced == 2 * (shared + private * (groups.world > 1))


def values_of_rank_0(rank: int, world: int, bucket_bytes: float) -> None:
    model, reference = Shared(), Shared()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += rank
    broadcast_parameters(model.parameters(), bucket_bytes)
    for own, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(own, expected)


def contrastive(rank: int, world: int, count: int) -> None:
    torch.manual_seed(1)
    query = nn.functional.normalize(torch.randn(count, 4, dtype=torch.float64), dim=-1)
    candidate = nn.functional.normalize(torch.randn(count, 4, dtype=torch.float64), dim=-1)
    groups = torch.tensor([7, -1, 3, 7, -1, 3, 7])[:count]
    scale = torch.tensor(5.0, dtype=torch.float64)
    whole = [x.clone().requires_grad_() for x in (query, candidate, scale)]
    expected = info_nce(*whole, groups, count)
    expected.backward()
    mine = rank_slice(count, rank, world)
    parts = [x[mine].clone().requires_grad_() for x in (query, candidate)]
    own_scale = scale.clone().requires_grad_()
    loss = info_nce(*parts, own_scale, groups[mine], count, DistributedGather(count, rank, world))
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-12, atol=1e-12)
    for part, reference in zip(parts, whole, strict=False):
        assert reference.grad is not None
        torch.testing.assert_close(part.grad, reference.grad[mine], rtol=1e-12, atol=1e-12)
    assert own_scale.grad is not None
    dist.all_reduce(own_scale.grad)
    torch.testing.assert_close(own_scale.grad, whole[2].grad, rtol=1e-12, atol=1e-12)


#: Number of ranks -> checks that run one after the other in one group of processes.
CHECKS: dict[int, list[tuple[Callable[..., None], *tuple[Any, ...]]]] = {
    2: [
        (sums_in_shared_buckets,),
        *((values_of_rank_0, bucket_bytes) for bucket_bytes in (1, 1e6)),
        (contrastive, 7),
        (outside_the_plan,),
        (sums_over_groups, 2),
        (sums_over_groups, 4),
    ],
    3: [*((sums_of_gradients, bucket_bytes) for bucket_bytes in (1, 200, 1e9)), (contrastive, 7)],
    # The last rank has no row.
    4: [(contrastive, 3), (sums_over_groups, 2)],
}


def run_checks(rank: int, world: int) -> None:
    for check, *given in CHECKS[world]:
        check(rank, world, *given)


@pytest.mark.parametrize("world", CHECKS)
def test_sums_and_gathered_rows_are_those_of_one_process(world: int) -> None:
    run_ranks(world, run_checks)
