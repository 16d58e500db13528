"""Runs a training function in several processes joined by gloo, as Ray's workers are."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.reporter import LoopReporter
from pipelines.training.loop.resolved_run import ResolvedRun
from tests.helpers.ports import free_port
from tests.helpers.processes import fork_context


def run_ranks(world: int, function: Callable[..., None], *args: Any) -> None:
    """Call ``function(rank, world, *args)`` in ``world`` fresh processes."""
    port = free_port()
    fork_context()
    multiprocessing.start_processes(
        _enter, (world, port, function, args), nprocs=world, start_method="forkserver"
    )


def _enter(rank: int, world: int, port: int, function: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        function(rank, world, *args)
    finally:
        dist.destroy_process_group()


class Metrics(LoopReporter):
    """Keeps what the loop reports."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.seen.append(values)


def train_and_save(
    rank: int,
    world: int,
    config: FinetuneConfig,
    run: str | None,
    out: str,
    stop_at: int | None = None,
) -> None:
    """Train, and on rank 0 keep weights, logged losses and bytes on the wire in ``out``."""
    from safetensors.torch import save_file

    metrics = Metrics()
    place = Path(run) if run else None
    done = train_model(
        ResolvedRun(config, place), rank=rank, world=world, reporter=metrics, stop_at=stop_at
    )
    names = [name for name, _ in done.model.named_parameters()]
    read = done.model.get_parameter if done.shards is None else done.shards.gather_weight
    tensors = {name: read(name).detach().contiguous() for name in names}
    if rank == 0:
        for index, values in enumerate(metrics.seen):
            for name, value in values.items():
                if name.endswith("/loss"):
                    tensors[f"{index}:{name}"] = torch.tensor(value, dtype=torch.float64)
        tensors["bytes_reduced"] = torch.tensor(done.bytes_reduced)
        save_file(tensors, out)
