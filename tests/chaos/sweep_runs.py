"""Chaos runs of a sweep: Ray's GCS or raylet is killed while a trial trains.

    python -m tests.chaos.sweep_runs --seed 0

The command must end by itself. The same command again finishes the sweep; finished trials are not
trained again. Scores of all trials are compared with those of an undisturbed sweep. A row is one
run, in the CSV of the other chaos runs.
"""

import argparse
import contextlib
import csv
import datetime
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import machine
from lab import RESULTS
from tests.chaos.namespaces import ROOT
from tests.chaos.result_rows import Row, append, is_sound, read
from tests.helpers.processes import kill_family
from tests.helpers.waiting import wait_until

LAUNCHER = "sweep"
TASKS = ("text_classification", "text_to_image")
#: Fault -> name of the victim's process.
VICTIMS = {"GCS killed in a sweep": "gcs_server", "raylet killed in a sweep": "raylet"}
FAULTS = tuple(VICTIMS)
STEPS = 60
TRIALS = 2
#: Seconds for a sweep to reach a step, and to end. Ray's driver waits one minute for a dead GCS.
PATIENCE_S = 900.0
#: The embedded Ray of a sweep in a process of its own.
DRIVER = """
import sys
from skillnet_platform import cluster
from sweeps.sweep import main
with cluster.ray_session(cpus=2):
    sys.exit(main(sys.argv[1:]))
"""


class SweepRuns:
    """Sweeps below one folder, with the same corpora.

    Args:
        folder: directory of corpora and sweeps.
    """

    def __init__(self, folder: Path) -> None:
        # Imported here: the page's table needs only the names of the faults.
        from tests.helpers.small_corpora import write_corpora

        self._folder = folder
        self._data = write_corpora(folder / "corpora")
        self._expected: list[tuple[str, ...]] = []

    def disturb(self, row: Row) -> Row:
        """Do one sweep with the fault of a row, and fill in the row."""
        if not self._expected:
            root = self._folder / "undisturbed"
            assert self._start(root).wait(PATIENCE_S) == 0, "the undisturbed sweep failed"
            self._expected = scores(root)
        root = self._folder / f"{row.seed}-{row.run}"
        trial = f"{random.Random(f'{row.seed}/{row.run}').randrange(TRIALS):03d}-seed0"
        trials = root / "swept" / "trials"
        process = self._start(root)
        began = 0.0
        try:
            checkpoint = f"{trial}/checkpoints/step-*/manifest.json"
            wait_until(lambda: any(trials.glob(checkpoint)), PATIENCE_S, process=process)
            row.victim = f"{VICTIMS[row.fault]} in trial {trial}"
            began = time.monotonic()
            find_child(process.pid, VICTIMS[row.fault]).kill()
            exits = [process.wait(PATIENCE_S)]
        finally:
            kill_family(process)
        finished = {path: path.stat().st_mtime_ns for path in trials.glob("*/outcome.json")}
        if exits[-1] != 0:
            exits.append(self._start(root).wait(PATIENCE_S))
        row.recovery_seconds = round(time.monotonic() - began, 1)
        row.exits = " ".join(map(str, exits))
        row.recovered = "same command" if len(exits) > 1 else "by itself"
        row.doubled_metrics = sum(path.stat().st_mtime_ns != at for path, at in finished.items())
        row.lost_metrics = count_missing(root)
        row.equal_weights = scores(root) == self._expected
        return row

    def _start(self, root: Path) -> "subprocess.Popen[bytes]":
        root.mkdir(exist_ok=True)
        path = root / "sweep.yaml"
        path.write_text(json.dumps(self._sweep()), encoding="utf-8")
        paths = [str(ROOT), str(ROOT / "platform"), os.environ.get("PYTHONPATH", "")]
        variables = {"SKILLNET_HOME": str(root), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with (root / "output").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-c", DRIVER, "--config", str(path)],
                env={**os.environ, **variables},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _sweep(self) -> dict[str, Any]:
        from skillnet_platform import config as configuration
        from tests.helpers.small_corpora import small_config

        training = {"steps": STEPS, "log_every": 10, "checkpoint_every": 10, "precision": "fp32"}
        run = configuration.to_dict(small_config(self._data, **training))
        run["tasks"] = {
            name: run["tasks"][name] if name in TASKS else None for name in run["tasks"]
        }
        run["model"]["tasks"] = {name: run["model"]["tasks"][name] for name in TASKS}
        return {
            "name": "swept",
            "run": run,
            "space": {"training.lr": {"choice": [1e-3, 2e-3]}},
            "resources": {"max_concurrent_trials": 1},
            "tracking": {"system_metrics": False},
        }


def scores(root: Path) -> list[tuple[str, ...]]:
    """Return name, status, steps and score of each trial; empty if the sweep did not end."""
    path = root / "swept" / "trials.csv"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return sorted((r["name"], r["status"], r["step"], r["score"]) for r in rows)


def count_missing(root: Path) -> int:
    """Return how many trials have no finished run in the tracker."""
    sql = "select distinct name from runs where status = 'FINISHED' and name like '%-seed0'"
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as connection:
        return TRIALS - len(connection.execute(sql).fetchall())


def find_child(pid: int, name: str) -> psutil.Process:
    """Return the descendant of a process with a name."""
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() == name:
                return child
    raise LookupError(f"process {pid} has no {name}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the lane; return 1 if a sweep lost something."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.sweep_runs", description=__doc__)
    parser.add_argument("--runs", type=int, default=len(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="the CSV")
    options = parser.parse_args(argv)
    today = datetime.date.today().isoformat()
    output = options.output or RESULTS / f"{today}-chaos.csv"
    done = {(row["launcher"], int(row["seed"]), int(row["run"])) for row in read(output)}
    folder = Path(tempfile.mkdtemp(prefix="skillnet-sweeps-"))
    runs = SweepRuns(folder)
    for number in range(options.runs):
        if (LAUNCHER, options.seed, number) in done:
            continue
        load = round(os.getloadavg()[0], 1)
        fault = FAULTS[number % len(FAULTS)]
        row = Row(today, machine(), load, LAUNCHER, options.seed, number, fault, "", 10)
        append(output, runs.disturb(row))
        print(f"{number}: {fault}: exits {row.exits}, {row.recovery_seconds} s", flush=True)
    shutil.rmtree(folder)
    mine = [r for r in read(output) if (r["launcher"], int(r["seed"])) == (LAUNCHER, options.seed)]
    return int(not all(map(is_sound, mine)))


if __name__ == "__main__":
    sys.exit(main())
