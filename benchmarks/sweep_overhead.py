"""What the platform adds to a sweep: `skillnet sweep` on eight trials against their bare training.

The shipped sweep ``plans`` runs as a user starts it, in a process of its own, each trial for as
many steps as take a core the given time; a short training before it finds out how many. Its wall
time, from the start of the interpreter to the end of the command (Ray, MLflow, evaluation of each
trial on the validation splits, report), stands over the sum of the trials' time in the training
loop divided by the number that ran at once.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Result, find_corpora, spread

CONFIG = "sweeps/plans"
CLOCK = "wall"

#: Seconds of training of each trial.
SECONDS = 60.0
SECONDS_VARIABLE = "SKILLNET_BENCHMARK_SECONDS"


def run(rounds: int, threads: int) -> list[Result]:
    """One sweep; ``rounds`` and ``threads`` do not apply: a trial takes one core."""
    del rounds, threads
    data = find_corpora("sweep_overhead")
    if data is None:
        return []
    seconds = float(os.environ.get(SECONDS_VARIABLE) or SECONDS)
    steps = max(round(seconds / _seconds_per_step(data)), 2)
    with tempfile.TemporaryDirectory(prefix="skillnet-") as home:
        reported, wall = _sweep(data, steps, Path(home))
    trained = [trial["seconds"] for trial in reported["trials"] if trial["status"] == "finished"]
    assert len(trained) == len(reported["trials"]), "every trial has to finish"
    parallel = min(len(os.sched_getaffinity(0)), len(trained))
    bare = sum(trained) / parallel
    note = f"{wall:.0f} s against {bare:.0f} s; load before it {reported['load']:.1f}"
    setting = f"{len(trained)} trials of {steps} steps, {parallel} at once, one core each"
    names = "wall time of the sweep", "sum of the trials' training time / trials at once"
    ratio = spread([wall / bare])
    return [Result(*names, "ratio of times", *ratio, "<= 1.25", 1, setting, note)]


def _seconds_per_step(data: Path, steps: int = 40) -> float:
    """CPU seconds of a step of the sweep's run in this process, one thread."""
    import torch

    from pipelines.training.loop.loop import train_model
    from pipelines.training.loop.resolved_run import ResolvedRun
    from skillnet_platform import config as configuration
    from sweeps.config.sweep import SweepConfig

    torch.set_num_threads(1)
    words = ["--config", CONFIG, "--run.data", str(data), "--run.training.steps", str(steps)]
    run = configuration.parse_config(SweepConfig, words, "skillnet sweep").run
    train_model(ResolvedRun(run), stop_at=5)
    begin = time.process_time()
    train_model(ResolvedRun(run))
    return (time.process_time() - begin) / steps


def _sweep(data: Path, steps: int, home: Path) -> tuple[dict, float]:
    """The document of the command, and its wall time."""
    words = [sys.executable, "-m", "sweeps.sweep", "--config", CONFIG, "--json", "--name", "bench"]
    words += ["--run.training.steps", str(steps), "--run.data", str(data)]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    load = os.getloadavg()[0]
    begin = time.perf_counter()
    done = subprocess.run(
        words,
        env=environment | {"SKILLNET_HOME": str(home)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    wall = time.perf_counter() - begin
    return json.loads(done.stdout) | {"load": load}, wall
