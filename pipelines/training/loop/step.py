"""Forward and backward pass of one step: the loss of a batch, whole or in micro-batches.

:func:`backward_step` is called by the loop. With ``training.micro_batch_size``, the rows of a
worker pass through the model in parts, so that only one part's activations are in memory. Losses
are sums over rows, so their gradients add up. A contrastive loss compares all rows of the step;
its gradients come from GradCache (Gao et al. 2021):

1. embed all parts without gradients;
2. compute the loss of the whole batch, and its gradient for each embedding;
3. embed each part again, with the same random numbers, and pass these gradients back.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loading.dataloader import Batch, rank_slice
from pipelines.training.loop.gradient_sync import DistributedGather, GradientSync
from pipelines.training.loop.task_health import TaskHealth
from skillnet.encoder import place_rows
from skillnet.objectives.base import PAIR, find_objective
from skillnet.objectives.heads import LossInputs, RankGather, head_class
from skillnet.precision import ComputePrecision
from skillnet.skill_weights import share_merges
from skillnet.skills import Task
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from pipelines.training.loop.sharding import ShardedSync


class StepModel(Protocol):
    """Computation of a step: a model, or a sharded one."""

    def __call__(self, task: str, towers: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Run a task; see :meth:`TaskModel.forward`."""

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Return further losses of the last call."""


def backward_step(
    model: StepModel,
    batch: Batch,
    precision: ComputePrecision,
    config: FinetuneConfig,
    sync: "GradientSync | ShardedSync",
    rank: int = 0,
    world: int = 1,
    health: TaskHealth | None = None,
    losses: Mapping[str, Callable[..., Any]] | None = None,
    channel: dist.ProcessGroup | None = None,
) -> Tensor:
    """Add the gradients of a batch to the parameters; return the loss, without a graph.

    Args:
        model: in training mode.
        batch: this rank's rows, on the model's device.
        precision: number type of the forward pass.
        config: settings of the run.
        sync: reduces gradients during the backward pass of the last part.
        rank: index of this process among the ranks of the batch, from 0.
        world: number of ranks of the batch.
        health: counts the rows that cannot be aligned.
        losses: see :class:`pipelines.training.loop.resolved_run.InProcessParts`.
        channel: ranks of the batch; None for all.
    """
    task = config.model.tasks[batch.task]
    own = (losses or {}).get(batch.task)

    def compute_loss(part: Batch) -> Tensor:
        return step_loss(model, task, part, precision, config, rank, world, health, own, channel)

    # All towers and parts of the step read the same weights.
    with share_merges(plan.skills for plan in task.towers.values()):
        total_rows = batch.global_rows if world > 1 else len(batch.rows)
        count = count_parts(total_rows, world, config.training.micro_batch_size)
        if count == 1:
            loss = compute_loss(batch)
            loss.backward()
            return loss.detach()
        parts = list(split_batch(batch, count))
        if find_objective(task.objective).pairs_towers:
            gather = _open_gather(batch, rank, world, channel)
            return _backward_contrastive(model, task, batch, parts, precision, sync, gather, own)
        total = torch.zeros((), device=_device_of(batch))
        for part in parts:
            with sync.paused(part is not parts[-1]):
                loss = compute_loss(part)
                loss.backward()
            total = total + loss.detach()
        return total


def count_parts(rows: int, world: int, size: int | None) -> int:
    """Return the number of parts of a batch, which is equal on all ranks.

    Sharded ranks gather weights in each part together, so a rank with one row less must not have
    one part less. Only with a size of 1, parts of some ranks have two rows then.

    Args:
        rows: number of rows of all ranks together.
        world: number of ranks.
        size: largest number of rows of a part; None computes all rows at once.
    """
    if size is None:
        return 1
    fewest, most = max(rows // world, 1), math.ceil(rows / world)
    return min(math.ceil(most / size), fewest)


def split_batch(batch: Batch, count: int) -> Iterator[Batch]:
    """Yield the rows of a batch in parts of nearly equal size, each of the same global batch.

    Args:
        batch: rows of this rank.
        count: number of parts, at most one for each row.
    """
    counts_B = batch.masked_counts
    for number in range(count):
        rows = rank_slice(len(batch.rows), number, count)
        start = rows.start

        def cut(tensors: Mapping[str, Tensor], rows: slice = rows) -> dict[str, Tensor]:
            return {
                name: x[rows] for name, x in tensors.items() if name not in ("values", "places")
            }

        targets = cut(batch.targets)
        towers = {name: cut(tensors) for name, tensors in batch.towers.items()}
        part = dataclasses.replace(
            batch,
            towers=towers,
            targets=targets,
            rows=batch.rows[rows],
            first_row=batch.first_row + start,
        )
        if counts_B is not None:
            # Masked tokens are listed one after the other, for all rows. The host knows where a
            # row begins, so it does not wait for the device.
            first = int(counts_B[:start].sum())
            masked = slice(first, first + int(counts_B[rows].sum()))
            targets["values"] = batch.targets["values"][masked]
            skipped = start * batch.targets["masked"].shape[1]
            (tower,) = towers
            towers[tower]["places"] = batch.towers[tower]["places"][masked] - skipped
            part.masked_counts = counts_B[rows]
        yield part


def _backward_contrastive(
    model: StepModel,
    task: Task,
    batch: Batch,
    parts: list[Batch],
    precision: ComputePrecision,
    sync: "GradientSync | ShardedSync",
    gather: RankGather | None,
    own: Callable[..., Any] | None,
) -> Tensor:
    device = _device_of(batch)
    states, embedded = [], []
    with torch.no_grad(), precision.autocast():
        for part in parts:
            states.append(_read_random_state(device))
            embedded.append(_run_model(model, part))
    leaves = {
        name: torch.cat([outputs[name] for outputs in embedded]).requires_grad_() for name in PAIR
    }
    # The scale of the similarities is a weight; its gradient goes back with the first part.
    leaves["scale"] = embedded[0]["scale"].detach().requires_grad_()
    del embedded
    loss = task_loss(task, leaves, batch, gather, own=own)
    with sync.paused():
        loss.backward()
    start = 0
    for part, state in zip(parts, states, strict=True):
        _restore_random_state(device, state)
        rows = slice(start, start + len(part.rows))
        with sync.paused(part is not parts[-1]):
            with precision.autocast():
                outputs = _run_model(model, part)
            # The gradient of these sums for an embedding is the one that the loss gave it.
            sums = [(outputs[name] * _gradient(leaves[name])[rows]).sum() for name in PAIR]
            if not start:
                sums.append(outputs["scale"] * _gradient(leaves["scale"]))
            auxiliary = _add_auxiliary_losses(loss.new_zeros(()), model, part)
            (torch.stack(sums).sum() + auxiliary).backward()
        loss = loss.detach() + auxiliary.detach()
        start = rows.stop
    return loss.detach()


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _device_of(batch: Batch) -> torch.device:
    return next(iter(next(iter(batch.towers.values())).values())).device


def _read_random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), own


def _restore_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def step_loss(
    model: StepModel,
    task: Task,
    batch: Batch,
    precision: ComputePrecision,
    config: FinetuneConfig,
    rank: int = 0,
    world: int = 1,
    health: TaskHealth | None = None,
    own: Callable[..., Any] | None = None,
    channel: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return this rank's share of the loss of a global batch; the shares of all ranks add up to it.

    Args:
        model: in training mode.
        task: objective of the batch.
        batch: this rank's rows, on the model's device.
        precision: number type of the forward pass.
        config: settings of the run.
        rank: index of this process among the ranks of the batch, from 0.
        world: number of ranks of the batch.
        health: counts the rows that cannot be aligned.
        own: see :func:`task_loss`.
        channel: ranks of the batch; None for all.
    """
    with precision.autocast():
        outputs = _run_model(model, batch)
    if health is not None:
        health.add_outputs(task, outputs, batch)
    gather = _open_gather(batch, rank, world, channel)
    smoothing = config.tasks[batch.task].label_smoothing
    loss = task_loss(task, outputs, batch, gather, smoothing, own)
    return _add_auxiliary_losses(loss, model, batch)


def _open_gather(
    batch: Batch, rank: int, world: int, channel: dist.ProcessGroup | None
) -> RankGather | None:
    return DistributedGather(batch.global_rows, rank, world, channel) if world > 1 else None


def _run_model(model: StepModel, batch: Batch) -> dict[str, Tensor]:
    with place_rows(batch.seed, batch.global_rows, batch.first_row):
        return model(batch.task, batch.towers)


def _add_auxiliary_losses(loss: Tensor, model: StepModel, batch: Batch) -> Tensor:
    # An auxiliary loss is a mean over this rank's rows, so it is weighted by their share.
    share = 0.0 if batch.is_padding else len(batch.rows) / batch.global_rows
    for extra in model.auxiliary_losses().values():
        loss = loss + share * extra
    return loss


def task_loss(
    task: Task,
    outputs: Mapping[str, Tensor],
    batch: Batch,
    gather: RankGather | None = None,
    smoothing: float = 0.0,
    own: Callable[..., Any] | None = None,
) -> Tensor:
    """Return the loss of a rank's rows: a sum over rows, divided by the global number of rows.

    Args:
        task: its objective.
        outputs: named tensors of the model.
        batch: targets of this rank's rows.
        gather: collects rows of all ranks for contrastive losses; None with one rank.
        smoothing: label smoothing of classification.
        own: loss of one process in place of the objective's: maps outputs and targets to a mean.

    Raises:
        UserError: the own loss is no tensor of one number.
    """
    if own is not None:
        loss = own(outputs, batch.targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(
                f"losses.{batch.task}: expected the mean loss of the rows, a tensor of shape (), "
                f"got {shape}"
            )
        # Parts of a batch add up to it.
        return loss.reshape(()) * (len(batch.rows) / batch.global_rows)
    inputs = LossInputs(batch.targets, batch.global_rows, batch.is_padding, gather, smoothing)
    return head_class(task).compute_loss(outputs, inputs)
