"""Growths as jobs on eight emulated hosts, some of which are killed, beside a command for each.

The hosts are nodes of one Ray on this machine, with a CPU each. A seed decides which processes and
hosts are killed, and when; killed hosts come back. A command each trains the same growths without
Ray, all at the same time as the jobs do, once before and once after: the mean is taken, because the
speed of a machine drifts. The union must have the bytes of these growths.

Work is CPU time of all processes, those of Ray's nodes included. The ideal time is the work of
these commands, divided by the cores of this machine, which all hosts share. The time of the union
is no part of either side: ``skillnet merge`` takes it after the commands too.

Bytes between hosts are those that a job needs from elsewhere and gives back: base in, skill out.
Data-parallel training of the same growths sends every gradient from every host in every step;
``two_workers`` measures that ``bytes reduced`` are the bytes of the trained weights. A second row
counts every file that a job writes on the shared disk. Both ways read corpora and write files.
"""

import contextlib
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import Result, plain

ROOT = Path(__file__).parents[1]
HOSTS = 8
GROWTHS = 8
STEPS = 5_000
#: Steps between checkpoints: what a lost process repeats.
CHECKPOINT_EVERY = 50
#: Killed processes and killed hosts.
KILLS = ("process", "host", "process")
OBJECT_STORE_BYTES = 80 * 2**20
CLOCK = "cpu of all processes, and wall"
#: Seconds for anything that is waited for.
PATIENCE_S = 3600.0
#: Seconds between looks at the CPU times of all processes, which take some from the growths.
LOOK_EVERY_S = 5.0
#: What idle nodes of Ray do less of: here nine of them share the cores of one machine.
IDLE_NODES = {
    "RAY_enable_metrics_collection": "false",
    "RAY_raylet_report_resources_period_milliseconds": "2000",
    "RAY_memory_monitor_refresh_ms": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}


@dataclass
class ApartRun:
    """What was measured.

    Args:
        cpu: CPU seconds of the queue.
        wall: seconds of the queue.
        alone_cpu: CPU seconds of a command for each growth: all of them before and after.
        restarts: restarts of jobs.
        kills: what was killed.
        lost: growths without a result.
        differing: weight files of the union that differ from those of the commands.
        moved: bytes of the base that jobs read, once per start, and of the files that they added.
        stored: bytes that they wrote on the shared disk, checkpoints included.
        exchanged: bytes of the gradients of data-parallel training on as many hosts.
    """

    cpu: float = 0.0
    wall: float = 0.0
    alone_cpu: list[float] = field(default_factory=list)
    restarts: int = 0
    kills: list[str] = field(default_factory=list)
    lost: int = 0
    differing: int = 0
    moved: int = 0
    stored: int = 0
    exchanged: int = 0


def run(rounds: int, threads: int) -> list[Result]:
    """Times, bytes and losses; one round, one thread."""
    del rounds, threads
    with tempfile.TemporaryDirectory() as folder:
        found = measure_apart(Path(folder), STEPS, GROWTHS, HOSTS, seed=0)
    cores = len(os.sched_getaffinity(0))
    setting = f"{GROWTHS} growths of {STEPS} steps, {HOSTS} hosts on {cores} cores"
    hits = f"{len(found.kills)} kills ({', '.join(found.kills)}), {found.restarts} restarts"

    def share(name: str, against: str, value: float, target: str, note: str) -> Result:
        return Result(name, against, "ratio", value, value, value, target, 1, setting, note)

    work = statistics.mean(found.alone_cpu)
    sides = " and ".join(f"{seconds:.0f}" for seconds in found.alone_cpu)
    times = f"{found.cpu:.0f} CPU s against {sides}"
    ideal = work / cores
    return [
        share("work as jobs", "a command each", found.cpu / work, "<= 1.15",
              f"{times}; {hits}"),
        share("wall as jobs", "ideal: work divided by cores", found.wall / ideal, "<= 1.15",
              f"{found.wall:.0f} s against {ideal:.0f}; other programs share the cores"),
        share("bytes between hosts", "data-parallel training", found.moved / found.exchanged,
              "<= 0.01", f"{found.moved / 2**20:.0f} MB against {found.exchanged / 2**20:.0f}"),
        share("bytes on the shared disk, checkpoints too", "data-parallel training",
              found.stored / found.exchanged, "", f"{found.stored / 2**20:.0f} MB"),
        plain("lost growths", "growths", found.lost, "<= 0", setting, hits),
        plain("weight files that differ from a command for each", "files", found.differing, "<= 0",
              setting),
    ]  # fmt: skip


def measure_apart(folder: Path, steps: int, growths: int, hosts: int, seed: int) -> ApartRun:
    """Train growths as jobs on hosts that are killed, and by a command each; compare both.

    Args:
        folder: empty directory, which all hosts share.
        steps: number of steps of each growth.
        growths: number of growths.
        hosts: number of emulated hosts.
        seed: decides the victims.
    """
    os.environ |= {"SKILLNET_HOME": str(folder), "RAY_AUTH_MODE": "disabled"}
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'platform'}"
    files = write_growths(folder, steps, growths)
    found = ApartRun()
    found.alone_cpu.append(train_alone(folder, files, "before"))
    with emulated_hosts(folder, hosts) as cluster, ProcessorMeter() as meter:
        # The hosts start before the growths do.
        began, before = time.monotonic(), meter.seconds
        words = ["base", "--name", "apart", "--tasks", *map(str, files.values())]
        with start_command(words, folder / "apart.log") as command:
            killer = Killer(cluster, folder, files, steps, random.Random(seed))
            found.kills = killer.run(command)
            found.wall, found.cpu = time.monotonic() - began, meter.seconds - before
            code = command.wait(PATIENCE_S)
        said = (folder / "apart.log").read_text(encoding="utf-8")
        assert code == 0, f"the growths end with {code}: {said}"
    found.alone_cpu.append(train_alone(folder, files, "after"))
    alone: dict[str, bytes] = {}
    for task in files:
        result = folder / f"apart-{task}" / "result.json"
        found.lost += not result.is_file()
        alone |= _weights(folder / f"after-{task}" / "model")
        log = (folder / ".jobs" / f"apart-{task}.log").read_text(encoding="utf-8")
        starts = log.count("started on")
        found.restarts += starts - 1
        base, grown = folder / "base" / "model", folder / f"apart-{task}" / "model"
        added = _weights(grown).keys() - _weights(base).keys()
        found.moved += starts * sum(map(len, _weights(base).values()))
        found.moved += sum((grown / name).stat().st_size for name in added)
        found.stored += count_stored_bytes(folder / f"apart-{task}", steps)
        trained = json.loads(result.read_text())["growth"]["transfer_results"][0]["trained_params"]
        found.exchanged += 4 * trained * steps * hosts
    union = _weights(folder / "apart" / "model")
    found.differing = sum(
        union.get(name) != alone.get(name) for name in union.keys() | alone.keys()
    )
    return found


def train_alone(folder: Path, files: dict[str, Path], name: str) -> float:
    """Train growths by a command each at the same time, and return the CPU seconds of all.

    Args:
        folder: directory of the runs.
        files: task -> file of its growth.
        name: start of the names of the runs.
    """
    began = _children_seconds()
    with contextlib.ExitStack() as stack:
        commands = [
            stack.enter_context(
                start_command(
                    ["base", "--config", str(file), "--name", f"{name}-{task}"],
                    folder / f"{name}-{task}.log",
                )
            )
            for task, file in files.items()
        ]
        codes = [command.wait(PATIENCE_S) for command in commands]
    assert codes == [0] * len(codes), f"the growths end with {codes}: see {folder}/{name}-*.log"
    return _children_seconds() - began


@contextlib.contextmanager
def start_command(words: list[str], log: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """Run ``skillnet grow`` with one thread in a block, and end it with the block."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "skillnet_platform.cli", "grow", *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def write_growths(folder: Path, steps: int, growths: int) -> dict[str, Path]:
    """Write corpora, a trained base and files of growths; return task -> file."""
    from dataclasses import replace

    from pipelines.finetune import finetune
    from pipelines.training.config.growth import NewSkill
    from skillnet.skills import SkillPlan
    from skillnet_platform import config as configuration
    from tests.helpers.sixth_corpus import grow_config, write_labelled_clips
    from tests.helpers.small_corpora import small_config, write_corpora

    data = write_corpora(folder / "corpora", rows=90, test_rows=8)
    write_labelled_clips(data)
    base = small_config(data, precision="fp32", steps=6)
    base.model = replace(base.model, dim=64, num_heads=4, ffn_dim=128, embedding_dim=32)
    base.tracking.register = False
    finetune(replace(base, name="base"))
    shared = {"steps": steps, "checkpoint_every": CHECKPOINT_EVERY, "threads_per_worker": 1}
    config = replace(grow_config("base", data, **shared), name=None)
    files = {}
    for number in range(growths):
        skill, name = f"skill{number}", f"task{number}"
        plan = SkillPlan(("general", "video", skill), "video")
        task = replace(
            config.task,
            name=name,
            towers={"input": plan},
            training=replace(config.task.training, batch_size=32),
        )
        made = replace(config, skill=NewSkill(skill, "video"), task=task, seed=number)
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(configuration.to_yaml(made), encoding="utf-8")
    return files


@contextlib.contextmanager
def emulated_hosts(folder: Path, hosts: int) -> Iterator[Any]:
    """Start a Ray with a head without CPUs and hosts with one each; set RAY_ADDRESS for a block."""
    from skillnet_platform.cluster import prepare_ray_environment

    os.environ |= IDLE_NODES
    prepare_ray_environment()
    import ray
    from ray.cluster_utils import Cluster

    small: dict[str, Any] = {"object_store_memory": OBJECT_STORE_BYTES}
    # A socket's path must be short. Ray also writes the cluster's address there.
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")
    head = {"num_cpus": 0, "include_dashboard": False, **small}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(hosts):
            cluster.add_node(num_cpus=1, **small)
        cluster.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = cluster.address
        yield cluster
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        ray.shutdown()
        cluster.shutdown()


class Killer:
    """Kills processes and hosts when all growths together reach drawn numbers of steps.

    Args:
        cluster: the emulated hosts.
        folder: directory of the runs.
        files: task -> file of its growth.
        steps: number of steps of each growth.
        draw: decides the moments and the victims.
    """

    def __init__(
        self, cluster: Any, folder: Path, files: dict[str, Path], steps: int, draw: random.Random
    ) -> None:
        self._cluster, self._folder, self._draw = cluster, folder, draw
        self._tasks, self._steps = list(files), steps
        total = steps * len(files)
        self._moments = sorted(draw.uniform(0.05, 0.8) * total for _ in KILLS)

    def run(self, command: "subprocess.Popen[bytes]") -> list[str]:
        """Kill as drawn until the command has trained all growths; return what was killed."""
        done = []
        for kind, moment in zip(KILLS, self._moments, strict=True):
            kill = getattr(self, f"_kill_{kind}")
            while command.poll() is None:
                if sum(map(self._step, self._tasks)) >= moment and kill():
                    done.append(kind)
                    break
                time.sleep(1.0)
        while not (self._folder / "apart" / "merge.yaml").is_file() and command.poll() is None:
            time.sleep(0.5)
        return done

    def _kill_process(self) -> bool:
        # A task between two processes has nothing to kill.
        running = [task for task in self._tasks if 0 < self._step(task) < self._steps]
        for task in self._draw.sample(running, len(running)):
            log = self._folder / ".jobs" / f"apart-{task}.log"
            pid = int(re.findall(r"as process (\d+)", log.read_text(encoding="utf-8"))[-1])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
                return True
        return False

    def _kill_host(self) -> bool:
        hosts = [node for node in self._cluster.list_all_nodes() if node.head is False]
        self._cluster.remove_node(self._draw.choice(hosts), allow_graceful=False)
        self._cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
        return True

    def _step(self, task: str) -> int:
        from pipelines.training.runs.progress_log import PROGRESS, read_pace

        return read_pace(self._folder / f"apart-{task}" / PROGRESS)[0]


class ProcessorMeter:
    """CPU seconds of the descendants of this process, those that were killed included.

    What this process takes to watch and to kill them is no work of theirs.

    A killed process whose parent was killed too leaves its time to nobody, so living ones are read.
    """

    def __init__(self) -> None:
        self._known: dict[Any, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "ProcessorMeter":
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        """CPU seconds so far."""
        self._look()
        return sum(self._known.values())

    def _watch(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            self._look()

    def _look(self) -> None:
        import psutil

        children = psutil.Process().children(recursive=True)
        for process in {*children, *list(self._known)}:
            try:
                self._known[process] = sum(process.cpu_times()[:2])
            except psutil.Error:
                continue


def count_stored_bytes(run: Path, steps: int) -> int:
    """Return the bytes that a growth wrote: its start, its checkpoints and its results.

    A file with several links counts once. Checkpoints that were removed had the size of the last.
    """
    sizes = {path.stat().st_ino: path.stat().st_size for path in run.rglob("*") if path.is_file()}
    last = max((run / "checkpoints").glob("step-*"))
    written = [path for path in last.iterdir() if path.stat().st_nlink == 1]
    removed = max(steps // CHECKPOINT_EVERY - 2, 0)
    return sum(sizes.values()) + removed * sum(path.stat().st_size for path in written)


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
