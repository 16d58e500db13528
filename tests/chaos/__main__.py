"""Chaos: faults, victims and steps drawn by seed, in small real runs of two workers.

    python -m tests.chaos.__main__ --runs 45 --seed 0 --launcher ranks
    python -m tests.chaos.__main__ --runs 26 --seed 0
    python -m tests.chaos.__main__ --runs 9 --seed 0 --launcher hosts

Each run trains the same few steps on prepared corpora, is disturbed once, resumes by itself or by
the same command, and its last checkpoint, optimizer state included, is compared with that of an
undisturbed run. A row of the CSV is one run; rows that it has already are not run again. As root it
moves into namespaces of its own, so that it may fill a disk and Ray finds no other Ray.
"""

import argparse
import contextlib
import datetime
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from lab import RESULTS
from tests.chaos import node_runs as chaos_hosts
from tests.chaos.namespaces import missing
from tests.chaos.result_rows import Row, append, is_sound, read
from tests.chaos.run_measures import metrics, recovery, same, size_of, tensors
from tests.chaos.tracking_server import Server

STEPS = 24
#: A fault comes after one of these steps: late enough for a checkpoint to lie there, early enough
#: for the run not to be over before a signal has gone round.
WHEN = range(3, STEPS - 8)
#: One disturbance each; those that end the driver run as a command of their own.
FAULTS = (
    "worker killed",
    "all workers killed",
    "controller killed",
    "worker raises",
    "worker asked to leave",
    "bit of a checkpoint flipped",
    "killed while writing a checkpoint",
    "bit of a shard flipped",
    "disk full",
    "tracker killed",
    "driver killed",
    "driver asked to leave",
    "raylet killed",
    *chaos_hosts.FAULTS,
)
#: Faults that were added when results existed. Runs from this number on draw from them, so that a
#: seed still draws what the earlier rows have.
LATER_RUNS = 1000
LATER_FAULTS = ("worker stopped", *chaos_hosts.LATER_FAULTS)
#: Seconds that a worker waits for a stopped one. On a busy machine the start of two workers can
#: be half a minute apart, which must not look like a stop.
COLLECTIVE_TIMEOUT_S = 60.0
#: Those that Ray has a part in; without Ray the others are left.
OF_RAY = ("controller killed", "driver killed", "driver asked to leave", "raylet killed")
ALONE = ("tracker killed", "driver killed", "driver asked to leave", "raylet killed")
DISK = "200m"
#: Number of times that the command of a run is started.
ATTEMPTS = 3
INSIDE = "SKILLNET_CHAOS_INSIDE"


def kinds_of(launcher: str, root: bool, later: bool = False) -> tuple[str, ...]:
    """The faults that a launcher has; only root can have a disk to fill.

    Args:
        launcher: ``ranks``, ``ray`` or ``hosts``, which starts the workers.
        root: whether the user is root.
        later: those of runs from ``LATER_RUNS`` on.
    """
    if later:
        on_hosts = launcher == "hosts"
        return chaos_hosts.LATER_FAULTS if on_hosts else LATER_FAULTS[:1]
    if launcher == "hosts":
        return chaos_hosts.FAULTS
    absent = (*chaos_hosts.FAULTS, *(() if root else ("disk full",)))
    absent += OF_RAY if launcher == "ranks" else ()
    return tuple(kind for kind in FAULTS if kind not in absent)


def drawn(
    launcher: str, seed: int, run: int, kinds: tuple[str, ...]
) -> tuple[Row, list[dict[str, Any]]]:
    """What happens in a run, and faults to order; each round of runs has every kind once."""
    turn, place = divmod(run, len(kinds))
    order = sorted(kinds, key=lambda kind: random.Random(f"{seed}/{turn}/{kind}").random())
    kind = order[place]
    pick = random.Random(f"{seed}/{run}")
    step, rank = pick.choice(WHEN), pick.randrange(2)
    victim, fault = f"rank {rank}", {"rank": rank, "step": step, "kind": "kill"}
    if kind == "all workers killed":
        victim, fault["rank"] = "ranks 0 and 1", None
    elif kind in ("controller killed", "driver killed", "raylet killed"):
        victim = fault["victim"] = kind.split()[0]
    elif kind == "driver asked to leave":
        victim = fault["victim"] = "driver"
        fault["kind"] = "term"
    elif kind == "worker asked to leave":
        fault["kind"] = "term"
    elif kind == "worker raises":
        fault["kind"] = "raise"
    elif kind == "worker stopped":
        fault["kind"] = "stop"
    elif kind == "killed while writing a checkpoint":
        victim, fault["rank"], fault["kind"] = "rank 0", 0, "tear"
    elif kind == "bit of a checkpoint flipped":
        # Rank 1 may be ahead of the checkpoint that rank 0 writes, and alter an older one.
        fault |= {"rank": 0, "kind": "flip", "place": round(pick.random(), 4)}
        victim = f"newest checkpoint, at {fault['place']:.0%}"
    elif kind == "disk full":
        victim, fault["kind"] = "disk of the run", "full"
    elif kind == "tracker killed":
        victim = "MLflow server"
    elif kind == "bit of a shard flipped":
        victim = "drawings"
    row = Row(
        datetime.date.today().isoformat(),
        machine(),
        round(os.getloadavg()[0], 1),
        launcher,
        seed,
        run,
        kind,
        victim,
        step,
    )
    on_hosts = kind in (*chaos_hosts.FAULTS, *chaos_hosts.LATER_FAULTS)
    return row, chaos_hosts.holds(step) if on_hosts else [fault]


class Lane:
    """Runs disturbed trainings below a folder, on one Ray or on hosts with one each.

    Args:
        folder: directory of the runs.
        data: prepared corpora; copied, since a bit of a shard is turned over.
        launcher: ``ranks``, ``ray`` or ``hosts``, which starts the workers.
    """

    def __init__(self, folder: Path, data: Path, launcher: str) -> None:
        self.folder, self._launcher = folder, launcher
        self.data = folder / "corpora"
        for name in ("headings", "drawings"):
            shutil.copytree(data / name, self.data / name, dirs_exist_ok=True)
        self.server = Server(folder / "server.db")
        self._hosts = chaos_hosts.Hosts(folder / "hosts")
        self._expected: dict[str, Any] = {}

    def expected(self) -> dict[str, Any]:
        """Tensors of the undisturbed run."""
        if not self._expected:
            code = self._attempt(self.config("undisturbed"), False)
            assert code == 0, f"undisturbed it ends with {code}"
            self._expected = tensors(self.folder / "undisturbed", STEPS)
        return self._expected

    def config(self, name: str, uri: str | None = None, timeout_s: float = 1800.0) -> Any:
        """A tiny model on two of the corpora."""
        from pipelines.training.config.run import FinetuneConfig, TaskTraining, TrainingConfig
        from skillnet.config import SkillNetConfig
        from skillnet_platform.tracking import TrackingConfig

        return FinetuneConfig(
            name=name,
            run_dir=str(self.folder),
            data=str(self.data),
            model=SkillNetConfig(
                dim=32, num_layers=3, num_heads=2, ffn_dim=128, embedding_dim=32, vocab_size=12000
            ),
            tasks={
                "text_classification": TaskTraining("headings", weight=1.0, batch_size=12),
                "text_to_image": TaskTraining("drawings", weight=1.0, batch_size=8),
            },
            training=TrainingConfig(
                steps=STEPS,
                workers=2,
                placement_strategy="strict_spread" if self._launcher == "hosts" else "pack",
                threads_per_worker=1,
                precision="fp32",
                log_every=1,
                checkpoint_every=3,
                keep_checkpoints=3,
                max_failures=2,
                collective_timeout_s=timeout_s,
                ema=0.9,
            ),
            tracking=TrackingConfig(
                uri=uri or f"sqlite:///{self.folder}/mlflow.db",
                register=False,
                system_metrics=False,
            ),
            evaluate=False,
        )

    def disturb(self, row: Row, orders: list[dict[str, Any]]) -> Row:
        """Do one run with these faults and fill its row in."""
        expected = self.expected()
        name = f"{row.launcher}-{row.seed}-{row.run}"
        run = self.folder / name
        config = self.config(name)
        if row.fault == "worker stopped":
            config = self.config(name, timeout_s=COLLECTIVE_TIMEOUT_S)
        exits: list[int] = []
        with contextlib.ExitStack() as stack:
            stack.callback(self._hosts.close)
            if row.fault == "tracker killed":
                self.server.start()
                config = self.config(name, self.server.uri)
                orders[0]["victim"] = f"-{self.server.pid}"
            if row.fault == "disk full":
                stack.enter_context(small_disk(run))
            if row.fault == "bit of a shard flipped":
                exits.append(self._with_flipped_shard(config, row))
            else:
                with ordered(orders):
                    exits.append(self._attempt(config, row.fault in ALONE, row))
            if row.fault == "bit of a checkpoint flipped":
                row.lost_bytes = size_of(max((run / "checkpoints").glob("step-*")))
            if row.fault == "disk full":
                (run / "faults" / "ballast").unlink()
            if row.fault == "tracker killed":
                self.server.start()
            # More than once only if the command dies of something that nobody ordered.
            while exits[-1] != 0 and len(exits) < ATTEMPTS:
                exits.append(self._attempt(config, False))
            row.exits = " ".join(map(str, exits))
            row.recovered = "same command" if len(exits) > 1 else "by itself"
            row.lost_steps, row.recovery_seconds = recovery(run / "progress.jsonl")
            row.lost_metrics, row.doubled_metrics = metrics(config, run, row.lost_steps)
            found = tensors(run, STEPS)
        row.equal_weights = same(found, expected)
        shutil.rmtree(run, ignore_errors=True)
        return row

    def _attempt(self, config: Any, alone: bool, row: Row | None = None) -> int:
        """The command, in a process of its own if it may die; its exit code.

        On hosts the row, if there is one, happens to it from outside.
        """
        from skillnet_platform import cli

        if self._launcher == "hosts":
            return self._hosts.attempt(self._command(config), self.folder / config.name, row)
        if not alone or self._launcher == "ranks":
            return cli.run_command(lambda _: self._finetune(config), [])
        command = self._command(config)
        return subprocess.run(command, stdout=subprocess.DEVNULL, timeout=600).returncode

    def _command(self, config: Any) -> list[str]:
        from pipelines.training.config.run import FinetuneConfig
        from skillnet_platform import config as configuration

        path = self.folder / f"{config.name}.yaml"
        absent = [name for name in FinetuneConfig().tasks if name not in config.tasks]
        reported = configuration.to_yaml(config)
        reported = reported.replace(
            "\ntasks:\n", "\ntasks:\n" + "".join(f"  {name}: null\n" for name in absent)
        )
        path.write_text(reported, encoding="utf-8")
        return [sys.executable, "-m", "tests.chaos.faulty_finetune", "--config", str(path)]

    def _finetune(self, config: Any) -> int:
        from pipelines.finetune import run_end_to_end
        from tests.chaos.fault_injection import faults_of_environment

        if self._launcher == "ranks":
            from pipelines.training.loop.ray_train import fit
            from tests.chaos.ranks import fit_on_ranks

            fit.fit_on_ray = fit_on_ranks
        else:
            from skillnet_platform import cluster

            cluster.ensure_ray(cpus=2)
        run_end_to_end(config, "finetune", callbacks=faults_of_environment())
        return 0

    def close(self) -> None:
        """End what serves the runs."""
        self.server.stop()
        self._hosts.close()

    def _with_flipped_shard(self, config: Any, row: Row) -> int:
        """The command while a bit of a shard is the other way round."""
        path = self.data / "drawings" / "train-00000.arrow"
        place = random.Random(f"{row.seed}/{row.run}/shard").randrange(path.stat().st_size)
        row.victim, row.step = f"{path.name} of drawings, byte {place}", 0
        for attempt in (1, 2):
            with path.open("r+b") as stream:
                stream.seek(place)
                (byte,) = stream.read(1)
                stream.seek(place)
                stream.write(bytes([byte ^ 1]))
            if attempt == 1:
                code = self._attempt(config, False)
        return code


@contextlib.contextmanager
def ordered(orders: list[dict[str, Any]]) -> Iterator[None]:
    """Order faults for the length of a block."""
    os.environ["SKILLNET_FAULTS"] = json.dumps(orders)
    try:
        yield
    finally:
        del os.environ["SKILLNET_FAULTS"]


@contextlib.contextmanager
def small_disk(run: Path) -> Iterator[None]:
    """A small disk of its own for a run's folder."""
    run.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "chaos", run], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", run], check=True)


def main(argv: list[str] | None = None) -> int:
    """Run the chaos runs; return 1 if a run of this seed differs from the undisturbed run."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.__main__", description=__doc__)
    parser.add_argument("--runs", type=int, help="runs in all (default: one of each fault)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--later", action="store_true", help=f"the faults of runs from {LATER_RUNS} on"
    )
    parser.add_argument("--data", type=Path, help="prepared corpora (default: the run root's)")
    parser.add_argument("--folder", type=Path, help="of the runs (default: in the run root)")
    parser.add_argument(
        "--launcher", choices=("ray", "ranks", "hosts"), default="ray", help="of workers"
    )
    parser.add_argument("--only", choices=FAULTS + LATER_FAULTS, help="only this fault")
    parser.add_argument(
        "--without",
        choices=FAULTS + LATER_FAULTS,
        nargs="*",
        default=[],
        help="put these off to another time",
    )
    parser.add_argument("--output", type=Path, help="the CSV")
    options = parser.parse_args(argv)
    root = os.geteuid() == 0
    if root and INSIDE not in os.environ and shutil.which("unshare"):
        os.environ[INSIDE] = "1"
        apart = ["unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc"]
        words = sys.argv[1:] if argv is None else argv
        os.execvp("unshare", [*apart, sys.executable, "-m", "tests.chaos.__main__", *words])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path.cwd()), str(Path.cwd() / "platform"), os.environ.get("PYTHONPATH", "")]
    )

    from skillnet_platform import console, storage

    if options.launcher == "hosts" and (reason := missing(*chaos_hosts.PROGRAMS)):
        console.print_warning(f"no run is made on hosts: {reason}")
        return 0
    kinds = kinds_of(options.launcher, root, options.later)
    output = options.output or RESULTS / f"{datetime.date.today().isoformat()}-chaos.csv"
    done = {(row["launcher"], int(row["seed"]), int(row["run"])) for row in read(output)}
    folder = options.folder or storage.run_root() / f"chaos-{time.strftime('%Y%m%d-%H%M%S')}"
    lane = Lane(folder, options.data or storage.data_root(), options.launcher)
    first = LATER_RUNS if options.later else 0
    for number in range(first, first + (len(kinds) if options.runs is None else options.runs)):
        row, orders = drawn(options.launcher, options.seed, number, kinds)
        known = (options.launcher, options.seed, number) in done
        if known or row.fault in options.without or options.only not in (None, row.fault):
            continue
        began = time.monotonic()
        row = lane.disturb(row, orders)
        took = time.monotonic() - began
        append(output, row)
        console.print_note(
            f"{number}: {row.fault} ({row.victim}) after step {row.step}: exits {row.exits}, "
            f"{row.lost_steps} steps again, {row.lost_metrics} metrics lost, "
            f"{row.doubled_metrics} twice, {row.recovery_seconds} s, "
            f"{'equal' if row.equal_weights else 'NOT EQUAL'}; {took:.0f} s in all"
        )
    lane.close()
    shutil.rmtree(folder, ignore_errors=True)
    mine = [
        row
        for row in read(output)
        if (row["launcher"], int(row["seed"])) == (options.launcher, options.seed)
    ]
    return int(not all(map(is_sound, mine)))


if __name__ == "__main__":
    sys.exit(main())
