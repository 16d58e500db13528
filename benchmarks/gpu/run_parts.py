"""Runs of ``make gpu``: loader, checkpoints, evaluation, offload, a killed run, and the demo."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import GpuBench, last_line
from benchmarks.gpu.step_parts import StepRunner, time_steps
from benchmarks.measure import Result, plain, spread
from benchmarks.waiting import open_pictures
from pipelines.training.loading.dataloader import MultiTaskDataLoader, prefetch_batches
from pipelines.training.loop import checkpointing
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.residency import WeightResidency
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.run_evaluation import evaluate_run
from pipelines.training.runs.checkpoints import find_newest
from pipelines.training.runs.progress_log import PROGRESS, read_pace
from skillnet_platform import config as configuration
from skillnet_platform.cluster.gpu_types import GB
from skillnet_platform.errors import UserError

LOADERS = (0, 4, 8)
LOADED_STEPS = 20
#: Task that the loader feeds, and the one that an offloaded model changes to.
PICTURES, OTHER = "text_to_image", "speech_recognition"
RUN_STEPS, RESTART_STEPS, RESTART_CHECKPOINT = 40, 200, 10


def measure_loader(bench: GpuBench) -> Iterator[Result]:
    """Yield rows per second of pictures of 224 x 224, alone, and what steps wait for them."""
    batch = bench.choose_size(128, 4)
    media = write_photographs(bench.scratch / "media", bench.choose_size(1024, 12))
    stream = open_pictures(bench.scratch / "prepared", media, batch)
    step = StepRunner(bench.read_preset("paper"), bench.device).make_step(PICTURES, batch, None)
    setting = f"batches of {batch} JPEG of 224 x 224, augmented"
    for processes in LOADERS:
        name = f"loader, {processes} processes"
        _, wall = _load(bench, stream, processes, lambda: None)
        yield plain(name, "rows per second", LOADED_STEPS * batch / wall, setting=setting)
        waited, wall = _load(bench, stream, processes, step)
        note = "beside steps of this task at the paper's sizes"
        yield plain(name, "share of the time waiting", waited / wall, "", setting, note)


def _load(
    bench: GpuBench, stream: MultiTaskDataLoader, processes: int, step: Callable[[], None]
) -> tuple[float, float]:
    """Return waited and all seconds of some steps."""
    with prefetch_batches(
        stream, 0, LOADED_STEPS + 1, processes=processes, for_gpu=bench.is_gpu
    ) as batches:
        iterator = iter(batches)
        # The first one starts the processes.
        next(iterator)
        began, waited = time.perf_counter(), 0.0
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                break
            waited += time.perf_counter() - asked
            batch.to(bench.device)
            step()
        bench.synchronize()
        return waited, time.perf_counter() - began


def write_photographs(folder: Path, count: int) -> Path:
    """Write JPEG files of 224 x 224 as large as photographs, with captions, and return the folder.

    Args:
        folder: to create.
        count: number of pictures.
    """
    import numpy as np
    from PIL import Image

    folder.mkdir()
    lines = []
    for number in range(count):
        random = np.random.default_rng(number)
        # Coarse and fine noise: photographs of this size take 26 to 31 KiB.
        pixels: Any = 0.0
        for side, share in ((7, 60), (28, 25), (224, 12)):
            noise = random.normal(0, share, (side, side, 3)).clip(-127, 127) + 128
            layer = Image.fromarray(noise.astype(np.uint8)).resize((224, 224))
            pixels = pixels + np.asarray(layer, np.float32) - 128
        picture = Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number}.jpg", quality=92)
        lines.append(json.dumps({"file_name": f"{number}.jpg", "caption": f"picture {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def measure_checkpoints(bench: GpuBench) -> Iterator[Result]:
    """Yield the seconds of writing and of reading a checkpoint with the state of all tasks.

    Checkpoints are written as in a run on a GPU: the training waits for the copies alone.
    """
    runner = StepRunner(bench.read_preset("base"), bench.device)
    for task in bench.read_preset("base").trained:
        runner.make_step(task, 4, None)()
    bench.synchronize()
    tensors = checkpointing.CheckpointTensors(runner.model, runner.optimizer, None)
    setting = f"{tensors.count_bytes() / GB:.2f} GB, weights and Adam state"
    folder, state = bench.scratch / "checkpoints", {"config_digest": "", "seed": 0}
    writer = checkpointing.BackgroundCheckpoints(
        folder, tensors, 2, checkpointing.UnchangedFiles(only_unread=True), lambda *_: None
    )
    # The first one takes the memory of the copies, too.
    for step in (1, 2):
        began = time.perf_counter()
        writer.start(step, state)
        yield plain("checkpoint, copied", "s", time.perf_counter() - began, setting=setting)
        writer.finish()
        yield plain("checkpoint, written", "s", time.perf_counter() - began, setting=setting)
    writer.close()
    began = time.perf_counter()
    newest = find_newest(folder)
    verified = time.perf_counter() - began
    assert newest is not None
    yield plain("checkpoint, verified", "s", verified, setting=setting)
    began = time.perf_counter()
    checkpointing.load_checkpoint(newest, runner.model, runner.optimizer)
    bench.synchronize()
    yield plain("checkpoint, loaded", "s", time.perf_counter() - began, setting=setting)


def measure_runs(bench: GpuBench) -> Iterator[Result]:
    """Yield rates of the training loop and of an evaluation; and of the loop with offload."""
    steps = bench.choose_size(RUN_STEPS, 5)
    for sharding in ("none", "host"):
        config = bench.make_run(steps=steps, sharding=sharding)
        done = train_model(ResolvedRun(config))
        name, setting = f"training loop, sharding {sharding}", f"{steps} steps of small corpora"
        yield plain(name, "rows per second", done.rows_per_second, setting=setting)
        yield plain(name, "share of the time waiting", done.waiting, setting=setting)
        if sharding == "none":
            rows: list[int] = []
            began = time.perf_counter()
            evaluate_run(
                config,
                done.model,
                ["train"],
                on_split=lambda *given: rows.append(given[2]),  # noqa: B023
            )
            rate = sum(rows) / (time.perf_counter() - began)
            yield plain("evaluation", "rows per second", rate, setting="rows of the training split")


def measure_swaps(bench: GpuBench) -> Iterator[Result]:
    """Yield the time to exchange the weights of two tasks with their optimizer state."""
    config = bench.read_preset("base")
    training = replace(config.training, compile=False)
    config = replace(config, training=replace(training, use_gpu=False))
    host = StepRunner(config, torch.device("cpu"))
    for task in (PICTURES, OTHER):
        host.make_step(task, 2, None)()
    residency = WeightResidency(host.model, host.optimizer, None, bench.device, (PICTURES, OTHER))
    count = 0

    def swap() -> None:
        nonlocal count
        residency.begin_step((PICTURES, OTHER)[count % 2], None)
        residency.settle()
        count += 1

    seconds = [1e3 * each for each in time_steps(bench, swap)]
    only = {name for name, _ in host.model.active_parameters(PICTURES)}
    own = {name: x for name, x in host.model.active_parameters(OTHER) if name not in only}
    setting = f"{12 * sum(x.numel() for x in own.values()) / GB:.2f} GB to the device"
    yield Result("exchange of tasks", "", "ms", *spread(seconds), "", bench.rounds, setting)


def measure_restart(bench: GpuBench) -> Iterator[Result]:
    """Kill a run with signal 9 and start it again; yield what that costs.

    Raises:
        UserError: the run ends before it is killed, or does not end well afterwards.
    """
    every, steps = RESTART_CHECKPOINT, RESTART_STEPS
    config = bench.make_run(steps=steps, checkpoint_every=every, log_every=1)
    config = replace(config, name="restart", run_dir=str(bench.scratch))
    file = bench.scratch / "restart.yaml"
    file.write_text(configuration.to_yaml(config), encoding="utf-8")
    words = [*_program(), "finetune", "--config", str(file), "--tracking.register", "false"]
    progress = bench.scratch / "restart" / PROGRESS
    home = os.environ | {"SKILLNET_HOME": str(bench.scratch)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, env=home, start_new_session=True, **quiet) as run:  # type: ignore[call-overload]
        while run.poll() is None and not (progress.is_file() and read_pace(progress)[0] > every):
            time.sleep(0.05)
        killed = read_pace(progress)[0] if progress.is_file() else 0
        if run.poll() is not None:
            raise UserError(f"the run ended with {run.returncode} before it was killed")
        os.killpg(run.pid, signal.SIGKILL)
    began = time.perf_counter()
    done = subprocess.run([*words, "--json"], env=home, capture_output=True, text=True)
    if done.returncode:
        raise UserError(last_line(done.stderr))
    result, setting = json.loads(done.stdout), f"{steps} steps, a checkpoint after each {every}"
    lost = killed - result["resumed"]
    yield plain("killed run", "steps done twice", lost, f"<= {every}", setting)
    whole = time.perf_counter() - began
    yield plain("killed run", "s beside the training", whole - result["seconds"], setting=setting)


def run_demo(bench: GpuBench) -> Iterator[Result]:
    """Run ``pretrain`` and ``finetune`` on the corpora of the demo, which must be prepared.

    Raises:
        UserError: a command fails; its last line is the text.
    """
    name = time.strftime("gpu-%Y%m%d-%H%M%S")
    options = ["--training.use_gpu", str(bench.is_gpu).lower(), "--training.workers", "1"]
    if bench.is_rehearsal:
        options += ["--training.steps", "2", *bench.list_width_options()]
    for words in (
        ["pretrain", "--config", "pretrain", "--name", f"{name}-pretrain"],
        ["finetune", "--config", "quickstart", "--from", f"{name}-pretrain", "--name", name],
    ):
        command = [*_program(), *words, *options, "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(last_line(done.stderr))
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


def _program() -> Sequence[str]:
    return [sys.executable, "-m", "skillnet_platform.cli"]
