"""Device of ``make gpu``: rates of products and copies, launches, parity with the CPU, waits."""

import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.bench import GpuBench
from benchmarks.gpu.step_parts import StepRunner, time_steps
from benchmarks.measure import Result, plain, spread
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun
from skillnet.layers import RaggedRows, multihead_attention, padding_bias
from skillnet_planning.measurements import (
    COPIES,
    LAUNCH,
    PRODUCTS,
)
from skillnet_planning.memory_plan import RunPlanner

#: Largest relative difference of a weight after the steps in float64.
PARITY_LIMIT = 1e-9
#: The same of attention in bf16, whose numbers have 8 binary digits.
ROUNDED_LIMIT = 2e-2
PARITY_STEPS, WAIT_STEPS = 12, 20
LAUNCHES = 2_000


def measure_rates(bench: GpuBench) -> Iterator[Result]:
    """Yield rates of products and copies, with the clocks of the card beside them."""
    size = bench.choose_size(8192, 128)
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
        seconds = time_steps(bench, partial(torch.mm, a, b))
        rates = spread([2 * size**3 / each / 1e12 for each in seconds])
        name = f"{PRODUCTS}{str(dtype).removeprefix('torch.')}"
        note = read_clocks() if bench.is_gpu else ""
        yield Result(name, "", "TFLOP/s", *rates, "", bench.rounds, f"{size} x {size}", note)
    numbers = bench.choose_size(2**28, 2**12)
    here = torch.zeros(numbers, device=bench.device)
    twin, host = torch.empty_like(here), torch.empty(numbers, pin_memory=bench.is_gpu)
    for place, target, source, times in (
        ("device", twin, here, 2),
        ("host to device", here, host, 1),
        ("device to host", host, here, 1),
    ):
        seconds = time_steps(bench, partial(target.copy_, source, non_blocking=True))
        rates = spread([times * 4 * numbers / each / 1e9 for each in seconds])
        setting = f"{4 * numbers / 1e6:.0f} MB, pinned" if times == 1 else "read and written"
        yield Result(f"{COPIES}{place}", "", "GB/s", *rates, "", bench.rounds, setting)


def read_clocks() -> str:
    """Return what ``nvidia-smi`` says of clocks, power and temperature; "" without it."""
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    words = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(found.stdout.split("\n")[0].split(", "))


def measure_launches(bench: GpuBench) -> Iterator[Result]:
    """Yield the host's time to launch an operation, alone and in the step of a narrow model."""
    x = torch.zeros(1, device=bench.device)
    seconds = []
    for _ in range(bench.rounds):
        bench.synchronize()
        began = time.perf_counter()
        for _ in range(LAUNCHES):
            x.add_(1.0)
        seconds.append((time.perf_counter() - began) / LAUNCHES * 1e6)
        bench.synchronize()
    yield Result("launch of one operation", "", "us", *spread(seconds), "", bench.rounds)
    config = bench.read_preset("base")
    narrow = replace(config.model, dim=16, num_heads=2, ffn_dim=32, embedding_dim=16)
    training = replace(config.training, micro_batch_size=None, use_gpu=bench.is_gpu)
    config = replace(config, model=narrow, training=training)
    runner = StepRunner(config, bench.device)
    for task in config.trained:
        sized = {task: replace(config.tasks[task], batch_size=2)}
        planner = RunPlanner(replace(config, tasks=sized), bench.card, 1)
        cost, passes = planner.measure(task, planner.given)
        operations = passes * len(cost.operations)
        took = [
            1e6 * each / operations for each in time_steps(bench, runner.make_step(task, 2, None))
        ]
        setting = f"{task}, 2 rows, width 16, {operations:.0f} operations"
        yield Result(LAUNCH, "", "us", *spread(took), "", bench.rounds, setting)


def compare_devices(bench: GpuBench) -> Iterator[Result]:
    """Train in float64 on the CPU and on the device; yield the largest difference of a weight."""
    from tests.helpers.small_corpora import small_config, write_corpora

    data, models = write_corpora(bench.scratch / "corpora"), []
    for use_gpu in (False, bench.is_gpu):
        config = small_config(data, use_gpu=use_gpu, precision="fp64", steps=PARITY_STEPS)
        models.append(train_model(ResolvedRun(config)).model)
    worst = 0.0
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        difference = (ours.detach() - theirs.detach().cpu()).abs().max()
        worst = max(worst, float(difference / ours.detach().abs().max().clamp(min=1e-12)))
    label, unit = f"weights after {PARITY_STEPS} steps in float64", "largest relative difference"
    yield Result(label, "CPU", unit, worst, worst, worst, f"<= {PARITY_LIMIT:g}")
    if bench.is_gpu:
        worst = compare_attention(bench.device)
        label = "attention by lengths in bf16, forward and backward"
        yield Result(label, "bias in float64", unit, worst, worst, worst, f"<= {ROUNDED_LIMIT:g}")


def compare_attention(device: torch.device) -> float:
    """Return the largest relative difference of attention by lengths to that with a bias.

    Args:
        device: GPU.
    """
    lengths_B = torch.tensor([200, 1, 130, 0, 64], device=device)
    mask_BT = torch.arange(200, device=device) < lengths_B[:, None]
    qkv = torch.randn(5, 200, 3 * 768, device=device).bfloat16()
    found = []
    for x, padding in (
        (qkv.double(), padding_bias(mask_BT, torch.float64)),
        (qkv, RaggedRows.find(mask_BT)),
    ):
        x.requires_grad_()
        y_MD = multihead_attention(x, 12, padding)[mask_BT]
        (gradient,) = torch.autograd.grad(y_MD.square().sum(), x)
        found.append((y_MD.detach().double(), gradient[mask_BT].double()))
    return max(
        float((ours - exact).norm() / exact.norm()) for exact, ours in zip(*found, strict=True)
    )


def measure_waits(bench: GpuBench) -> Iterator[Result]:
    """Yield the waits of the host for the GPU in the training loop, by torch's own count."""
    from tests.helpers.small_corpora import small_config, write_corpora

    data = write_corpora(bench.scratch / "corpora")
    short = small_config(data, use_gpu=bench.is_gpu, precision="auto", steps=WAIT_STEPS)
    yield from count_waits(lambda: train_model(ResolvedRun(short)), WAIT_STEPS, bench.is_gpu)


def count_waits(work: Callable[[], object], steps: int, is_gpu: bool = True) -> Iterator[Result]:
    """Yield the waits of the host by their places in the code.

    Args:
        work: trains some steps.
        steps: their number.
        is_gpu: let torch report the waits.
    """
    set_mode = torch.cuda.set_sync_debug_mode if is_gpu else lambda mode: None
    found: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        set_mode("warn")
        try:
            work()
        finally:
            set_mode("default")
    for each in caught:
        if "synchroniz" in str(each.message):
            found[f"{Path(each.filename).name}:{each.lineno}"] += 1
    for place, count in [("all", found.total()), *found.most_common(20)]:
        label = f"waits of the host, {place}"
        yield replace(plain(label, "per step", count / steps), rounds=steps)
