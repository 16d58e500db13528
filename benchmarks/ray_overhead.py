"""Training in the command's process and under Ray Train with one worker, as whole commands.

``finetune --config tiny --evaluate false`` runs from its start to its end, in its own process and
under Ray Train, in turns: wall, CPU seconds, processes and private memory. Their weights must be
equal.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Result, alternate, find_corpora, ratio, spread
from skillnet_platform.cli import SPIN_COUNT, SPIN_VARIABLE

CLOCK = "wall; cpu where the row says so"
COMMAND, RAY = "command", "ray"
#: Steps and repeats of a command, and seconds between two looks at its processes.
STEPS, MOST_ROUNDS, LOOK_S = 60, 5, 0.1


@dataclass
class CommandUse:
    """Use of a whole command.

    Args:
        wall: seconds.
        cpu: seconds of all of its processes, but for the last :data:`LOOK_S` of each.
        processes: largest number at a time.
        memory: largest private memory of all processes at a time, in MB.
        weights: SHA-256 of the files of its model.
    """

    wall: float
    cpu: float
    processes: int
    memory: float
    weights: str


def run(rounds: int, threads: int) -> list[Result]:
    """Run whole commands in turns, in one process and under Ray Train.

    Raises:
        RuntimeError: their weights differ, or one failed.
    """
    del threads  # as many as Ray gives its worker: all cores
    data, rounds = find_corpora("ray_overhead"), min(rounds, MOST_ROUNDS)
    if data is None:
        return []
    used: dict[str, list[CommandUse]] = {COMMAND: [], RAY: []}
    for _, name in alternate(used, rounds):
        used[name].append(_run_command(name, data))
    if len({each.weights for uses in used.values() for each in uses}) > 1:
        raise RuntimeError("the commands trained different weights")
    setting = f"finetune --config tiny --evaluate false, {STEPS} steps, equal weights"
    results = []
    units = {"wall": "s", "cpu": "CPU s", "processes": "processes", "memory": "MB"}
    for key, unit in units.items():
        values = {name: [float(getattr(each, key)) for each in uses] for name, uses in used.items()}
        share = ratio(values[COMMAND], values[RAY])
        results.append(
            Result(f"{key}, {COMMAND}", f"{key}, {RAY}", "ratio", *share, "", rounds, setting)
        )
        for name, each in values.items():
            results.append(
                Result(f"{key}, {name}", "", unit, *spread(each), "", rounds, setting, key)
            )
    return results


def _run_command(name: str, data: Path) -> CommandUse:
    import psutil

    with tempfile.TemporaryDirectory(prefix="skillnet-") as home:
        folder, cpu, most, memory = Path(home), dict[int, float](), 0, 0.0
        words = [sys.executable, "-m", "benchmarks.ray_overhead", name, str(folder), str(data)]
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        # As the program ``skillnet`` sets it for its commands.
        environment |= {"SKILLNET_HOME": str(folder / "home"), SPIN_VARIABLE: SPIN_COUNT}
        begin = time.perf_counter()
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
        own = psutil.Process(process.pid)
        while process.poll() is None:
            private, count = 0.0, 0
            for each in (own, *own.children(recursive=True)):
                with suppress(psutil.Error):
                    cpu[each.pid] = sum(each.cpu_times()[:2])
                    use = each.memory_info()
                    private, count = private + use.rss - use.shared, count + 1
            most, memory = max(most, count), max(memory, private / 1e6)
            with suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_S)
        wall = time.perf_counter() - begin
        if process.returncode:
            raise RuntimeError((folder / "log").read_text(encoding="utf-8")[-2000:])
        digest = hashlib.sha256()
        for path in sorted((folder / "runs/overhead/model").glob("*.safetensors")):
            digest.update(path.read_bytes())
        return CommandUse(wall, sum(cpu.values()), most, memory, digest.hexdigest())


def train_side(name: str, folder: Path, data: Path) -> None:
    """Train as the command does.

    Args:
        name: ``command`` or ``ray``.
        folder: directory of the run.
        data: prepared corpora.
    """
    from pipelines.finetune import run_end_to_end
    from pipelines.training.config.run import FinetuneConfig
    from pipelines.training.loop import run
    from skillnet_platform import config as configuration

    words = ["--config", "tiny", "--data", str(data), "--training.steps", str(STEPS)]
    words += ["--name", "overhead", "--run_dir", str(folder / "runs"), "--evaluate", "false"]
    config = configuration.parse_config(FinetuneConfig, words, "skillnet finetune")
    # No option asks for Ray with one worker on one machine.
    if name == RAY:
        run.trains_in_process = lambda training: False
    run_end_to_end(config, "finetune")


if __name__ == "__main__":
    side, place, corpora = sys.argv[1:]
    train_side(side, Path(place), Path(corpora))
