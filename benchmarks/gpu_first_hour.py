"""First hour on a GPU (``make gpu``): parity, waits, time, MFU and memory per task, and two runs.

1. Twelve steps in float64 on the CPU and on the GPU: the weights must be equal within rounding.
2. The waits of the host for the GPU in the training loop, by torch's own count.
3. Steps of each task of ``configs/base.yaml`` and of its pretraining, as the loop does them: time,
   MFU and memory, beside the memory that ``skillnet plan`` computes. The same compiled.
4. ``skillnet pretrain`` and ``skillnet finetune`` on the corpora of the demo.

Writes ``<date>-gpu-<card>.csv``. On a machine without a GPU it says so and exits with 2.
"""

import argparse
import json
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import Result, plain, spread
from pipelines.finetune import main as finetune
from pipelines.pretrain import main as pretrain
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.gradient_sync import GradientSync
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.optimizer import build_optimizer, update_weights
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import compile_plans, trainable_parameters
from pipelines.training.loop.step import backward_step
from skillnet.precision import choose_precision
from skillnet.systems import build_system
from skillnet_planning.example_batches import build_example_batch
from skillnet_planning.memory_plan import RunPlanner
from skillnet_platform import console
from skillnet_platform.cluster.gpu_types import GB, GpuType, describe_device

#: Workers of the run whose rows are measured: those of ray_cluster.yaml.
WORKERS = 4
#: Largest relative difference of a weight after the steps in float64.
PARITY_LIMIT = 1e-9
PARITY_STEPS = 12
WAIT_STEPS = 20


def find_device() -> torch.device | None:
    """Return the GPU of this process, or None."""
    return torch.device("cuda") if torch.cuda.is_available() else None


def describe_card(device: torch.device) -> GpuType:
    """Return the type of a card; its rates are 0 if its data sheet is not known."""
    if device.type != "cuda":
        return GpuType("CPU", 1e6, 1.0, 0.0, 0.0)
    about = torch.cuda.get_device_properties(device)
    return describe_device(about.name, about.total_memory, (about.major, about.minor))


def compare_devices(run: Callable[[bool], FinetuneConfig]) -> list[Result]:
    """Train in float64 on the CPU and on the GPU, and compare all weights.

    Args:
        run: returns the configuration of a short run; its argument is ``use_gpu``.
    """
    models = []
    for use_gpu in (False, find_device() is not None):
        config = run(use_gpu)
        training = replace(config.training, precision="fp64", use_gpu=use_gpu, steps=PARITY_STEPS)
        models.append(train_model(ResolvedRun(replace(config, training=training))).model)
    worst = 0.0
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        difference = (ours.detach() - theirs.detach().cpu()).abs().max()
        worst = max(worst, float(difference / ours.detach().abs().max().clamp(min=1e-12)))
    label, unit = f"weights after {PARITY_STEPS} steps in float64", "largest relative difference"
    return [Result(label, "CPU", unit, worst, worst, worst, f"<= {PARITY_LIMIT:g}")]


def count_waits(work: Callable[[], object], steps: int) -> list[Result]:
    """Count the waits of the host for the GPU by their places in the code.

    Args:
        work: trains some steps.
        steps: their number.
    """
    found: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for each in caught:
        if "synchroniz" in str(each.message):
            found[f"{Path(each.filename).name}:{each.lineno}"] += 1
    rows = [("all", found.total()), *found.most_common(20)]
    return [
        replace(plain(f"waits of the host, {place}", "per step", count / steps), rounds=steps)
        for place, count in rows
    ]


def measure_tasks(
    config: FinetuneConfig, label: str, device: torch.device, rounds: int
) -> Iterator[Result]:
    """Measure the steps of all tasks of a run, for one of its workers.

    Args:
        config: settings of the run.
        label: name of the results in the table.
        device: device of the model, such as ``cuda:0``.
        rounds: measured steps of each task.
    """
    card, training = describe_card(device), config.training
    planner = RunPlanner(config, card, WORKERS)
    torch.manual_seed(0)
    with device:
        model = build_system(config.system, config.model, config.options)
    model.train()
    if training.activation_checkpointing:
        model.enable_activation_checkpointing()
    if training.compile:
        compile_plans(model)
    precision = choose_precision(training.precision, device)
    optimizer = build_optimizer(model.named_parameters(), training)
    active = trainable_parameters(model, config)
    sync = GradientSync(active, 1)
    for task in config.trained:
        rows = planner.rows_per_worker(task)
        example = build_example_batch(config, task, rows, rows).to(device, precision.weights)

        def step(task: str = task, example: Any = example) -> None:
            sync.begin(task, False)
            backward_step(model, example, precision, config, sync)
            sync.finish()
            update_weights(optimizer, active[task], training.max_grad_norm)
            optimizer.zero_grad()

        name, setting = f"{label}{task}", f"{rows} rows, {training.micro_batch_size} at a time"
        try:
            seconds = time_steps(step, device, rounds)
        except torch.OutOfMemoryError:
            note = "out of memory"
            yield plain(name, "s per step", float("nan"), setting=setting, note=note)
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            continue
        took = spread(seconds)
        yield Result(name, "", "s per step", *took, rounds=rounds, setting=setting)
        yield Result(name, "", "rows per second", *_inverse(seconds, rows), rounds=rounds)
        cost, passes = planner.measure(task, planner.given)
        if card.bf16_tflops:
            work = passes * cost.flops / (card.bf16_tflops * 1e12)
            yield Result(name, f"peak of {card.name}", "MFU", *_inverse(seconds, work))
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / GB
            yield plain(name, "GB at the peak", peak, setting=setting)
            planned = (planner.memory(tasks=[]).fixed + cost.peak_bytes) / GB
            note = "Adam state of all tasks; measured is that of the tasks up to this one"
            yield plain(name, "GB of the plan", planned, setting=setting, note=note)


def time_steps(step: Callable[[], None], device: torch.device, rounds: int) -> list[float]:
    """Return the seconds of each step, after three steps of warm-up.

    Args:
        step: a training step.
        device: which is waited for before and after each step.
        rounds: number of measured steps.
    """
    is_gpu = device.type == "cuda"
    for _ in range(3):
        step()
    if is_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        step()
        if is_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return seconds


def _inverse(seconds: Sequence[float], amount: float) -> measure.Spread:
    return spread([amount / each for each in seconds])


def list_compiled(config: FinetuneConfig) -> list[tuple[str, FinetuneConfig]]:
    """Return the run as it is and, with the label ``compiled``, with ``training.compile``."""
    compiled = replace(config.training, compile=True)
    return [("", config), ("compiled ", replace(config, training=compiled))]


def run_commands(name: str, use_gpu: bool, options: Sequence[str] = ()) -> Iterator[Result]:
    """Run ``pretrain`` and ``finetune`` on the corpora of the demo.

    Args:
        name: folder of the runs below the run root.
        use_gpu: for a run on a machine without one, in tests of this file.
        options: command-line words of both commands, in addition.
    """
    program = Path(sys.executable).with_name("skillnet")
    device = ["--training.use_gpu", str(use_gpu).lower(), "--training.workers", "1"]
    for words in (["fetch"], ["prepare"]):
        subprocess.run([program, *words], check=True)
    first = f"{name}-pretrain"
    for words in (
        ["pretrain", "--config", "pretrain", "--name", first],
        ["finetune", "--config", "quickstart", "--from", first, "--name", f"{name}-finetune"],
    ):
        done = subprocess.run(
            [program, *words, *device, *options, "--json"], capture_output=True, text=True
        )
        if done.returncode:
            note = done.stderr.strip().splitlines()[-1][:200]
            yield plain(words[0], "s", float("nan"), note=note)
            return
        yield from read_run_result(words[0], json.loads(done.stdout))


def read_run_result(command: str, result: dict[str, Any]) -> Iterator[Result]:
    """Yield the figures of a run.

    Args:
        command: that made it.
        result: its JSON document.
    """
    setting = f"{result['step']} steps"
    for key, unit, factor in (
        ("seconds", "s", 1),
        ("rows_per_second", "rows per second", 1),
        ("waiting", "% of the time waiting for data", 100),
    ):
        yield plain(command, unit, factor * result[key], setting=setting)
    for row in result["evaluation"]:
        measured = f"{command}: {row['metric']} of {row['task']}, {row['split']}"
        yield plain(measured, row["metric"], row["value"], setting=setting)


def main(argv: list[str] | None = None) -> int:
    """Run ``python -m benchmarks.gpu_first_hour``; return 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_first_hour")
    parser.add_argument("--rounds", type=int, default=10, help="measured steps of a task")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="folder of the CSV")
    options = parser.parse_args(argv)
    device = find_device()
    if device is None:
        console.print_error(
            f"make gpu: torch {torch.__version__} finds no GPU on this machine. Run it on a "
            "machine with a GPU and a build of torch for it."
        )
        return 2
    from tempfile import TemporaryDirectory

    from tests.helpers.small_corpora import small_config, write_corpora

    card = describe_card(device).name
    results: list[Result] = []
    with TemporaryDirectory() as folder:
        data = write_corpora(Path(folder) / "corpora")
        results += compare_devices(lambda use_gpu: small_config(data, use_gpu=use_gpu))
        short = small_config(data, use_gpu=True, precision="bf16", steps=WAIT_STEPS)
        results += count_waits(lambda: train_model(ResolvedRun(short)), WAIT_STEPS)
    base = {
        "base, ": finetune.parse_arguments(["--config", "base"]),
        "base, pretraining, ": pretrain.parse_arguments(["--config", "base"]).joint(),
    }
    for label, config in base.items():
        for kind, each in list_compiled(config):
            for result in measure_tasks(each, f"{kind}{label}", device, options.rounds):
                results.append(result)
                console.print_note(f"{result.measured}: {result.value:.4g} {result.unit}")
    results += run_commands(time.strftime("gpu-%Y%m%d-%H%M%S"), use_gpu=True)
    suffix = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    path = measure.write(f"gpu-{suffix}", results, 1, options.output, "wall")
    console.print_note(f"written to {path}")
    return int(any(result.met == "no" or result.value != result.value for result in results))


if __name__ == "__main__":
    sys.exit(main())
