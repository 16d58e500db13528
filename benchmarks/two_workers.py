"""Two workers on this machine: our gradient sums against DDP with find_unused_parameters.

The task activates 2 of 7 skills. DDP reduces the gradients of all of them, ours of those two.
Both train the same model on the same rows, in turns, in the same two processes over gloo; the
step is timed by the wall, since waiting for the other worker belongs to it, and in CPU time of one
worker, gloo's threads included, since on a busy machine the wall tells of others.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import Result, alternate, ratio, spread
from pipelines.training.config.run import TrainingConfig
from pipelines.training.loop.gradient_sync import GradientSync
from pipelines.training.loop.optimizer import build_optimizer, clip_gradients
from skillnet.config import SkillNetConfig
from skillnet.model import SkillNet
from skillnet.precision import KEEP_FREED_MEMORY, native_bf16
from skillnet.skills import SkillPlan, Task

TASK = "text_classification"
SHAPES = ((16, 16), (16, 32), (32, 64))


def run(rounds: int, threads: int) -> list[Result]:
    """Bytes and times; ``threads`` each."""
    del threads  # one core a worker: more threads would only wait for each other
    os.environ |= KEEP_FREED_MEMORY | {"OMP_NUM_THREADS": "1"}
    results: list[Result] = []
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(_worker, (folder, shape, rounds), nprocs=2)
            found = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
        setting = f"B {shape[0]} a worker, T {shape[1]}, D 256 F 1024 L 4, 2 of 7 skills"
        if not results:
            for name, against, target in (
                ("bytes reduced", "bytes activated", "<= 1.02"),
                ("bytes that DDP reduces", "bytes activated", ""),
            ):
                value = found[name] / found["bytes activated"]
                results.append(Result(name, against, "ratio", *spread([value]), target, 1, setting))
        results += [
            _times(kind, shape, found["ours"][kind], found["ddp"][kind], rounds, setting)
            for kind in ("wall", "cpu")
        ]
        alone = ratio(found["alone"]["wall"], found["ddp"]["wall"])
        name = f"step of {shape[0]}x{shape[1]} tokens without any exchange"
        against = "DDP with find_unused_parameters"
        note = "no exchange can be faster"
        results.append(Result(name, against, "ratio of times", *alone, "", rounds, setting, note))
    return results


def _times(
    kind: str,
    shape: tuple[int, int],
    ours: list[float],
    theirs: list[float],
    rounds: int,
    setting: str,
) -> Result:
    rows, tokens = shape
    return Result(
        f"step of {rows}x{tokens} tokens a worker, {kind} time",
        "DDP with find_unused_parameters",
        "ratio of times",
        *ratio(ours, theirs),
        "<= 0.7",
        rounds,
        setting,
        f"{1e3 * spread(ours).median:.0f} ms against {1e3 * spread(theirs).median:.0f} ms",
    )


def _config() -> SkillNetConfig:
    plan = SkillPlan(("general", "text"))
    return SkillNetConfig(
        dim=256,
        ffn_dim=1024,
        vocab_size=1000,
        max_tokens=64,
        drop_path=0.0,
        tasks={TASK: Task("classification", {"input": plan}, 15)},
    )


def _worker(rank: int, folder: str, shape: tuple[int, int], rounds: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, twin = SkillNet(_config()), SkillNet(_config())
    torch.manual_seed(rank)
    towers = {"input": {"tokens": torch.randint(4, 1000, shape)}}
    labels = torch.randint(0, 15, shape[:1])

    named = list(model.active_parameters(TASK))
    sync = GradientSync({TASK: named}, 2)
    optimizer = build_optimizer(model.named_parameters(), TrainingConfig(lr=1e-4))

    def ours() -> None:
        sync.begin(TASK)
        _backward(model, towers, labels)
        sync.finish()
        _update(named, optimizer)

    ddp = DistributedDataParallel(twin, find_unused_parameters=True)
    twins = list(twin.active_parameters(TASK))
    other = build_optimizer(twin.named_parameters(), TrainingConfig(lr=1e-4))

    def theirs() -> None:
        _backward(ddp, towers, labels)
        _update(twins, other)

    def alone() -> None:
        _backward(model, towers, labels)
        _update(named, optimizer)

    seconds = _in_turns({"ours": ours, "ddp": theirs, "alone": alone}, rounds)
    before = sync.bytes_reduced
    ours()
    found: dict[str, Any] = seconds | {
        "bytes reduced": sync.bytes_reduced - before,
        "bytes activated": sum(p.numel() * p.element_size() for _, p in named),
        "bytes that DDP reduces": sum(p.numel() * p.element_size() for p in twin.parameters()),
    }
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _backward(model: Callable, towers: dict, labels: torch.Tensor) -> None:
    bf16 = native_bf16(torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(TASK, towers)["logits"]
    torch.nn.functional.cross_entropy(logits.float(), labels).backward()


def _update(named: list, optimizer: torch.optim.Optimizer) -> None:
    clip_gradients((p for _, p in named), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _in_turns(
    runs: dict[str, Callable[[], None]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Wall and CPU seconds of each; both workers start each step together."""
    seconds: dict[str, dict[str, list[float]]] = {n: {"wall": [], "cpu": []} for n in runs}
    for number, name in alternate(runs, rounds, first=-3):
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        runs[name]()
        cpu = time.process_time() - cpu
        dist.barrier()
        if number >= 0:
            seconds[name]["wall"].append(time.perf_counter() - wall)
            seconds[name]["cpu"].append(cpu)
    return seconds
