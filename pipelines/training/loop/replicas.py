"""Weights of a training run on one rank: whole (replicated), or a part of each (sharded).

:func:`build_replica` is called by the training loop, which treats both alike.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from pipelines.training.loop.freezing import trainable_parameters
from pipelines.training.loop.gradient_sync import BUCKET_BYTES, GradientSync, broadcast_parameters
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import build_model, build_structure
from skillnet.model import SkillNet
from skillnet.multitask_model import TaskModel
from skillnet_platform import console

if TYPE_CHECKING:
    from pipelines.training.loop.sharded_sync import ShardedSync
    from pipelines.training.loop.sharding import ModelShards, ShardedModel

NamedParameters = list[tuple[str, nn.Parameter]]


@dataclass
class TrainingReplica:
    """Weights of a run on one rank.

    Args:
        model: is evaluated and saved. With shards it holds only weights that were gathered for it.
        runner: computes steps.
        active: task -> weights that its steps change, as the optimizer sees them.
        sync: sums gradients over ranks.
        shards: this rank's part of the weights; None if it holds them whole.
    """

    model: TaskModel
    runner: "TaskModel | ShardedModel"
    active: dict[str, NamedParameters]
    sync: "GradientSync | ShardedSync"
    shards: "ModelShards | None" = None

    @property
    def owner(self) -> "TaskModel | ModelShards":
        """Holder of the weights that the optimizer updates."""
        return self.model if self.shards is None else self.shards

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """Ranks that each have a part of every weight; None if each has the whole."""
        return None if self.shards is None else self.shards.group


def compile_plans(*models: TaskModel, rank: int = 0, backend: str = "inductor") -> None:
    """Compile the plans of a run; the first rank names those that cannot be compiled.

    Args:
        *models: one module, or with shards those of training and of evaluation.
        rank: index of this process among the workers, from 0.
        backend: compiler that ``torch.compile`` uses, such as ``inductor``.
    """
    reported = set[str]()

    def report(line: str) -> None:
        if rank == 0 and line not in reported:
            reported.add(line)
            console.print_warning(f"training.compile: {line}")

    for model in models:
        if isinstance(model, SkillNet):
            model.enable_compilation(report, backend)
        else:
            report(f"the system {model.system} runs without compilation")


def build_replica(
    run: ResolvedRun,
    rank: int,
    world: int,
    device: torch.device,
    dtype: torch.dtype,
) -> TrainingReplica:
    """Build the weights of a run, equal on all ranks, as ``training.sharding`` says.

    Args:
        run: settings with their corpora, tasks and sizes resolved.
        rank: index of this process among the workers, from 0.
        world: number of processes. One holds all weights.
        device: device of the forward pass, such as ``cuda:0``.
        dtype: number type of the weights.

    Raises:
        UserError: corpora or initial weights do not fit, or the system cannot be sharded.
    """
    config, settings = run.config, run.config.training
    if settings.sharding in ("full", "hybrid") and world > 1:
        return _build_shards(run, rank, world, device, dtype)
    # Weights that are not in use stay in the host's memory.
    place = torch.device("cpu") if settings.sharding == "host" else device
    # Each rank builds the model from the seed or the initial weights.
    model = build_model(config, run.corpora).to(place, dtype)
    if settings.activation_checkpointing:
        model.enable_activation_checkpointing()
    if settings.compile:
        compile_plans(model, rank=rank)
    # The broadcast makes weights bitwise equal even if nodes compute initial weights differently.
    if world > 1:
        broadcast_parameters(model.parameters(), BUCKET_BYTES, device)
    active = trainable_parameters(model, config)
    sync = GradientSync(active, world)
    return TrainingReplica(model, model, active, sync)


def count_sharing_workers(sharding: str, workers: int, workers_per_node: int) -> int:
    """Return the number of workers that divide one replica of the weights among themselves.

    A worker holds this fraction of all weights, optimizer states and averages. During a step it
    also holds the weights and gradients of the step's task as a whole.

    Args:
        sharding: ``training.sharding``.
        workers: number of training processes of the run.
        workers_per_node: workers on each node.
    """
    shares = {"none": 1, "host": 1, "hybrid": workers_per_node, "full": workers}
    return max(1, min(shares[sharding], workers))


def _build_shards(
    run: ResolvedRun,
    rank: int,
    world: int,
    device: torch.device,
    dtype: torch.dtype,
) -> TrainingReplica:
    # Other runs start faster without these libraries.
    from pipelines.training.loop.shard_groups import require_sharding
    from pipelines.training.loop.sharded_sync import ShardedSync
    from pipelines.training.loop.sharding import build_mesh, shard_model

    config, settings = run.config, run.config.training
    structure, whole = (build_structure(config, run.corpora, dtype) for _ in range(2))
    require_sharding(structure)
    if settings.activation_checkpointing:
        structure.enable_activation_checkpointing()
    if settings.compile:
        compile_plans(structure, whole, rank=rank)
    active = trainable_parameters(structure, config)
    # The first rank alone holds the whole model, on the host, until it has sent all parts.
    source = build_model(config, run.corpora) if rank == 0 else None
    shards = shard_model(
        structure,
        whole,
        source,
        build_mesh(device, world, settings.sharding == "hybrid"),
        frees_early=settings.activation_checkpointing,
    )
    whole.weight_loader = shards.load_task
    own = {task: [(n, shards.parameters[n]) for n, _ in named] for task, named in active.items()}
    return TrainingReplica(whole, shards.runner, own, ShardedSync(shards, own), shards)
