"""Several GPUs of ``make gpu``: sums of NCCL, and training by number of GPUs and sharding."""

import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.gpu.bench import GpuBench
from benchmarks.measure import Result, plain, spread
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun
from skillnet_planning.measurements import SUMS

#: Bytes of a sum: a bucket of gradients, and all gradients of a task of base.
SUM_BYTES = (25_000_000, 200_000_000, 1_400_000_000)
TINY_BYTES = (4_096,)
STEPS = 30
TIMEOUT_S = 300


def measure_sums(bench: GpuBench, world: int) -> Iterator[Result]:
    """Yield the bandwidth of sums over all GPUs of this machine.

    Args:
        bench: device and sizes.
        world: number of GPUs.
    """
    for nbytes in TINY_BYTES if bench.is_rehearsal else SUM_BYTES:
        seconds = run_ranks(bench, world, time_sums, nbytes, bench.rounds)
        sent = 2 * (world - 1) / world * nbytes / 1e9
        rates, setting = spread([sent / each for each in seconds]), f"{nbytes / 1e6:g} MB"
        name = f"{SUMS}{world} ranks"
        yield Result(name, "", "GB/s", *rates, "", bench.rounds, setting)


def time_sums(rank: int, world: int, device: torch.device, nbytes: int, rounds: int) -> list[float]:
    """Return the seconds of some sums; see :func:`run_ranks`.

    Args:
        rank: index of this process.
        world: number of processes.
        device: where the tensor is.
        nbytes: bytes that are summed.
        rounds: number of measured sums, after three.
    """
    x, seconds = torch.ones(nbytes // 4, device=device), []
    for number in range(-3, rounds):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 0:
            seconds.append(time.perf_counter() - began)
    return seconds


def measure_training(
    bench: GpuBench, world: int, sharding: str, precision: str
) -> Iterator[Result]:
    """Yield the rate of the training loop on some GPUs.

    Args:
        bench: device and sizes.
        world: number of GPUs.
        sharding: value of ``training.sharding``.
        precision: value of ``training.precision``.
    """
    steps = bench.choose_size(STEPS, 3)
    config = bench.make_run(steps=steps, sharding=sharding, precision=precision, log_every=steps)
    found = run_ranks(bench, world, train, config)
    name = f"training on {world}, sharding {sharding}, {precision}"
    setting = f"{steps} steps of base's width on small corpora"
    yield plain(name, "rows per second", found["rows_per_second"], setting=setting)
    yield plain(name, "MB reduced per rank and step", found["reduced"] / steps, setting=setting)
    if bench.is_gpu:
        yield plain(name, "GB at the peak", found["peak_gb"], setting=setting)


def train(rank: int, world: int, device: torch.device, config: FinetuneConfig) -> dict[str, float]:
    """Train a run as one of several ranks; see :func:`run_ranks`.

    Args:
        rank: index of this process.
        world: number of processes.
        device: where the model is.
        config: settings of the run.
    """
    done = train_model(ResolvedRun(config), rank=rank, world=world)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    rate, reduced = done.rows_per_second, done.bytes_reduced / 1e6
    return {"rows_per_second": rate, "reduced": reduced, "peak_gb": peak}


def run_ranks(bench: GpuBench, world: int, function: Callable[..., Any], *given: Any) -> Any:
    """Call a function in processes with a GPU each, joined by NCCL; return what the first returns.

    Args:
        bench: its device, and the folder in which the processes meet.
        world: number of processes.
        function: a module's; gets rank, number of processes, device and the other arguments.
        *given: those.
    """
    place = bench.scratch / f"ranks-{time.monotonic_ns()}"
    place.mkdir()
    arguments = (world, bench.is_gpu, str(place), function, given)
    multiprocessing.spawn(_enter, arguments, nprocs=world)
    return json.loads((place / "found.json").read_text(encoding="utf-8"))


def _enter(
    rank: int, world: int, is_gpu: bool, place: str, function: Callable[..., Any], given: Any
) -> None:
    device = torch.device("cuda", rank) if is_gpu else torch.device("cpu")
    if is_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if is_gpu else "gloo",
        init_method=f"file://{place}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT_S),
        device_id=device if is_gpu else None,
    )
    try:
        found = function(rank, world, device, *given)
        if rank == 0:
            (Path(place) / "found.json").write_text(json.dumps(found), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()
