"""Training in the command's process, under Ray Train with one worker, and as a bare loop.

Rates: all train the demo's configuration on the prepared built-in corpora, the same steps on the
same batches. They take turns of :data:`TURN_STEPS` steps; meanwhile all processes of the other
sides are stopped. ``command`` and ``ray`` are whole commands: display, MLflow run in a file, and
for Ray its background processes, controller and one worker. ``alone`` is the loop, with as many
threads as Ray's worker has. The rates are those of the wall. The CPU seconds of each process tell
where a difference is.

Commands: ``finetune --config tiny --evaluate false`` from its start to its end, in its own process
and under Ray Train, in turns: wall, CPU seconds, processes and private memory. Their weights must
be equal.
"""

import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.measure import Result, ratio, spread
from skillnet_platform import console
from skillnet_platform.cli import SPIN_COUNT, SPIN_VARIABLE
from skillnet_platform.signals import terminate_as_interrupt
from skillnet_platform.storage import data_root

CLOCK = "wall; cpu where the row says so"
#: Steps of a turn. Blocks of tasks in the schedule are longer, so turns have different tasks; both
#: sides have the same.
TURN_STEPS = 10
#: Turns that are not counted: the first batches compile kernels and fill caches.
WARM_UP_TURNS = 3
#: Seconds for a side to start.
START_S = 300.0

ALONE, COMMAND, RAY = "alone", "command", "ray"
#: Environment that the program ``skillnet`` sets for its commands.
AS_SKILLNET = {SPIN_VARIABLE: SPIN_COUNT}
#: Steps and repeats of a whole command, and seconds between two looks at its processes.
COMMAND_STEPS, MOST_COMMANDS, LOOK_S = 60, 5, 0.1
#: Words of a command line -> name of a process of Ray; the first that fits counts.
_KINDS = (
    ("ray::RayTrainWorker|_RayTrainWorker", "worker"),
    ("ray::TrainController|TrainController", "controller of Ray Train"),
    ("ray::", "other actors"),
    ("ray::IDLE", "idle workers"),
    ("gcs_server", "gcs"),
    ("raylet/raylet", "raylet"),
    ("dashboard/dashboard", "dashboard"),
    ("DashboardAgent|dashboard/agent|runtime_env/agent|forkserver", "agents"),
    ("log_monitor", "log monitor"),
)


@dataclass
class TurnCallback:
    """Callback of the training loop that waits for its turn.

    Args:
        folder: directory of the two pipes ``done`` and ``go``.
        steps: number of optimizer steps in a turn.
    """

    folder: str
    steps: int

    def on_train_start(self, folder: Path | None, rank: int) -> None:
        """Nothing happens before the first step."""

    def on_step_start(self, step: int) -> None:
        """Report the step, and wait for the next turn."""
        if step % self.steps:
            return
        with (Path(self.folder) / "done").open("w", encoding="utf-8") as done:
            done.write(f"{step}\n")
        with (Path(self.folder) / "go").open(encoding="utf-8") as go:
            go.readline()


@dataclass
class StoppableSide:
    """A command in a process of its own, which trains in turns and is stopped between them.

    Args:
        process: running process of the command.
        folder: directory of its pipes.
        seconds: wall time of each turn.
        cpu: kind of process -> CPU seconds of each turn.
        seen: process id -> process, of all that the command ever had.
    """

    process: subprocess.Popen[bytes]
    folder: Path
    seconds: list[float] = field(default_factory=list)
    cpu: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    seen: dict[int, Any] = field(default_factory=dict)

    def wait(self) -> None:
        """Wait for the end of a turn.

        Raises:
            RuntimeError: the command ended.
        """
        end = time.monotonic() + START_S
        # The reader opens at once: a command that failed would never open the other end.
        pipe = os.open(self.folder / "done", os.O_RDONLY | os.O_NONBLOCK)
        try:
            while not _read(pipe):
                if self.process.poll() is not None or time.monotonic() > end:
                    log = (self.folder / "log").read_text(encoding="utf-8", errors="replace")
                    raise RuntimeError(f"{self.folder.name} did not train: {log[-2000:]}")
                time.sleep(0.002)
        finally:
            os.close(pipe)

    def take_turn(self, is_counted: bool) -> None:
        """Continue for one turn, and stop again."""
        self._signal(signal.SIGCONT)
        before, begin = self._cpu_times(), time.perf_counter()
        with (self.folder / "go").open("w", encoding="utf-8") as go:
            go.write("go\n")
        self.wait()
        seconds, after = time.perf_counter() - begin, self._cpu_times()
        self.stop()
        if not is_counted:
            return
        self.seconds.append(seconds)
        for kind in before.keys() | after.keys():
            self.cpu[kind].append(max(after.get(kind, 0.0) - before.get(kind, 0.0), 0.0))

    def stop(self) -> None:
        """Stop all processes of the command until the next turn."""
        self._signal(signal.SIGSTOP)

    def end(self) -> None:
        """End all processes of the command, also those whose parents have ended."""
        try:
            self._list_processes()
        finally:
            self._signal(signal.SIGKILL, list(self.seen.values()))
            self.process.wait()

    def _signal(self, number: int, processes: Sequence[Any] | None = None) -> None:
        import psutil

        for process in self._list_processes() if processes is None else processes:
            try:
                process.send_signal(number)
            except psutil.Error:
                continue

    def _list_processes(self) -> list[Any]:
        import psutil

        if self.process.poll() is not None:
            return []
        own = psutil.Process(self.process.pid)
        found = [own, *own.children(recursive=True)]
        self.seen |= {process.pid: process for process in found}
        return found

    def _cpu_times(self) -> dict[str, float]:
        import psutil

        times: dict[str, float] = defaultdict(float)
        for process in self._list_processes():
            try:
                words = " ".join(process.cmdline())
                times[_kind_of(words)] += sum(process.cpu_times()[:2])
            except psutil.Error:
                continue
        return times


def run(rounds: int, threads: int) -> list[Result]:
    """Ratio of the two rates, and the CPU seconds of Ray's processes."""
    del threads  # as many as Ray gives its worker: all cores
    data = Path(os.environ.get("SKILLNET_BENCHMARK_DATA") or data_root())
    if not (data / "headings" / "manifest.json").is_file():
        console.print_warning(f"ray_overhead needs prepared corpora; there are none in {data}")
        return []
    environments = {ALONE: {}, COMMAND: AS_SKILLNET, RAY: AS_SKILLNET}
    sides = measure_sides(environments, data, rounds)
    return describe_sides(sides) + measure_commands(data, min(rounds, MOST_COMMANDS))


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


def measure_commands(data: Path, rounds: int) -> list[Result]:
    """Run whole commands in turns, in one process and under Ray Train.

    Raises:
        RuntimeError: their weights differ, or one failed.
    """
    used: dict[str, list[CommandUse]] = {COMMAND: [], RAY: []}
    for number in range(rounds):
        for name in used if number % 2 == 0 else reversed(used):
            used[name].append(_run_command(name, data))
    if len({each.weights for uses in used.values() for each in uses}) > 1:
        raise RuntimeError("the commands trained different weights")
    setting = f"finetune --config tiny --evaluate false, {COMMAND_STEPS} steps, equal weights"
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
        begin = time.perf_counter()
        with (folder / "log").open("wb") as log:
            process = _start_side(name, AS_SKILLNET, folder, data, COMMAND_STEPS, "tiny", log)
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
        model = folder / "runs/overhead/model"
        digest = hashlib.sha256()
        for path in sorted(model.glob("*.safetensors")):
            digest.update(path.read_bytes())
        return CommandUse(wall, sum(cpu.values()), most, memory, digest.hexdigest())


def measure_sides(
    environments: Mapping[str, Mapping[str, str]], data: Path, rounds: int
) -> dict[str, StoppableSide]:
    """Train all sides in turns.

    Args:
        environments: name of a side -> its variables. Sides whose name begins with ``ray`` train
            under Ray Train.
        data: prepared corpora.
        rounds: counted turns of each side.
    """
    with (
        terminate_as_interrupt(),
        tempfile.TemporaryDirectory(prefix="skillnet-") as home,
        ExitStack() as stack,
    ):
        sides: dict[str, StoppableSide] = {}
        for name, variables in environments.items():
            sides[name] = stack.enter_context(_started(name, variables, data, Path(home), rounds))
            sides[name].wait()
            sides[name].stop()
        names = list(sides)
        for number in range(-WARM_UP_TURNS, rounds):
            for name in names if number % 2 == 0 else reversed(names):
                sides[name].take_turn(number >= 0)
    return sides


def describe_sides(sides: Mapping[str, StoppableSide]) -> list[Result]:
    """Return the results of sides, each against the first one."""
    first, *others = sides
    rounds = len(sides[first].seconds)
    cores = len(os.sched_getaffinity(0))
    setting = f"configuration of the quickstart, turns of {TURN_STEPS} steps, {cores} threads"
    results = []
    for name in others:
        rates = ratio(sides[first].seconds, sides[name].seconds)
        results.append(
            Result(
                f"rate of steps, {name}",
                f"rate of steps, {first}",
                "ratio of rates",
                *rates,
                ">= 0.95",
                rounds,
                setting,
            )
        )
    for name, side in sides.items():
        rate = spread([TURN_STEPS / seconds for seconds in side.seconds])
        results.append(Result(f"rate, {name}", "", "steps/s", *rate, "", rounds, setting))
        for kind, seconds in sorted(side.cpu.items(), key=lambda item: -sum(item[1])):
            of_wall = spread([a / b for a, b in zip(seconds, side.seconds, strict=False)])
            if of_wall.high >= 0.001:
                about = f"{name}: {kind}"
                results.append(Result(about, "", "cores", *of_wall, "", rounds, setting, "cpu"))
    return results


@contextmanager
def _started(
    name: str, variables: Mapping[str, str], data: Path, home: Path, rounds: int
) -> Iterator[StoppableSide]:
    folder = home / name
    folder.mkdir()
    for pipe in ("done", "go"):
        os.mkfifo(folder / pipe)
    steps = (WARM_UP_TURNS + rounds + 1) * TURN_STEPS
    with (folder / "log").open("wb") as log:
        process = _start_side(name, variables, folder, data, steps, "quickstart", log)
    side = StoppableSide(process, folder)
    try:
        yield side
    finally:
        side.end()


def _start_side(
    name: str,
    variables: Mapping[str, str],
    folder: Path,
    data: Path,
    steps: int,
    preset: str,
    log: BinaryIO,
) -> "subprocess.Popen[bytes]":
    words = [sys.executable, "-m", "benchmarks.ray_overhead", name, str(folder), str(data)]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"SKILLNET_HOME": str(folder / "home"), **variables}
    return subprocess.Popen(
        [*words, str(steps), preset], env=environment, stdout=log, stderr=subprocess.STDOUT
    )


def _kind_of(words: str) -> str:
    return next((kind for pattern, kind in _KINDS if re.search(pattern, words)), "driver")


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 64)
    except BlockingIOError:
        return b""


def train_side(name: str, folder: Path, data: Path, steps: int, preset: str) -> None:
    """Train one side until its steps are done, or it is ended from outside.

    Args:
        name: a name that begins with ``ray`` trains under Ray Train.
        folder: directory of the run, and of the pipes of a side that takes turns.
        data: prepared corpora.
        steps: optimizer steps.
        preset: configuration of the run.
    """
    from pipelines.training.config.run import FinetuneConfig
    from pipelines.training.loop import run
    from skillnet_platform import config as configuration

    words = ["--config", preset, "--data", str(data), "--training.steps", str(steps)]
    words += ["--name", "overhead", "--run_dir", str(folder / "runs"), "--evaluate", "false"]
    config = configuration.parse_config(FinetuneConfig, words, "skillnet finetune")
    turns = [TurnCallback(str(folder), TURN_STEPS)] if (folder / "go").exists() else []
    if name != ALONE:
        from pipelines.finetune import run_end_to_end

        # No option asks for Ray with one worker on one machine.
        if name.startswith(RAY):
            run.trains_in_process = lambda training: False
        run_end_to_end(config, "finetune", callbacks=turns)
        return
    import torch

    from pipelines.training.loop.loop import train_model
    from pipelines.training.loop.resolved_run import ResolvedRun
    from skillnet.precision import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    train_model(ResolvedRun(config), callbacks=turns)


if __name__ == "__main__":
    side, place, corpora, count, which = sys.argv[1:]
    train_side(side, Path(place), Path(corpora), int(count), which)
