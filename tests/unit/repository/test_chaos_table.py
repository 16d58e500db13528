"""The chaos lane fails for every run that lost something, and its table shows what."""

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lab import RESULTS
from tests.chaos import __main__ as chaos
from tests.chaos import node_runs as chaos_hosts
from tests.chaos import sweep_runs
from tests.chaos.result_rows import Row, append, read
from tools.docs.chaos_table import table


def row_of(launcher: str = "ranks", fault: str = "worker killed", **values: Any) -> Row:
    reported = {"date": "2026-11-25", "machine": "a machine", "load": 1.0, "seed": 0, "run": 0}
    reported |= {"victim": "rank 0", "step": 3, "exits": "0", "equal_weights": True}
    return Row(launcher=launcher, fault=fault, **(reported | values))


@pytest.mark.parametrize(
    ("lost", "code"),
    [
        ({}, 0),
        ({"equal_weights": False}, 1),
        ({"lost_metrics": 2}, 1),
        ({"doubled_metrics": 3}, 1),
        ({"exits": "143 0"}, 0),
        ({"exits": "143 0", "fault": "spot notice"}, 0),
        ({"exits": "143 0", "fault": "spot notice", "lost_steps": 1}, 1),
        ({"exits": "2 0", "fault": "driver killed"}, 1),
        ({"exits": "-9 -11"}, 1),
    ],
)
def test_a_run_that_lost_something_fails_the_lane(
    lost: dict[str, Any], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(chaos.INSIDE, "1")
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # the lane sets them for its children
    for name in ("headings", "drawings"):
        (tmp_path / "data" / name).mkdir(parents=True)
    output = tmp_path / "chaos.csv"
    append(output, row_of(seed=0, **lost))
    append(output, row_of(seed=1))
    words = ["--launcher", "ranks", "--runs", "1", "--output", str(output)]
    words += ["--data", str(tmp_path / "data"), "--folder", str(tmp_path / "runs")]
    assert chaos.main([*words, "--seed", "0"]) == code, "also when it was run before"
    assert chaos.main([*words, "--seed", "1"]) == 0
    shown = table(read(output))
    assert ("2 metrics |" in shown) == ("lost_metrics" in lost)
    assert ("3 metrics doubled" in shown) == ("doubled_metrics" in lost)
    assert ("weights of 1 runs" in shown) == ("equal_weights" in lost)


def test_a_seed_draws_what_the_newest_csv_has() -> None:
    """Or its rows would stand for runs that nobody can do again."""
    for reported in read(max(RESULTS.glob("*-chaos.csv"))):
        if reported["launcher"] == sweep_runs.LAUNCHER:
            continue  # nothing but the trial is drawn, and the victim names it
        later = int(reported["run"]) >= chaos.LATER_RUNS
        kinds = chaos.kinds_of(reported["launcher"], root=True, later=later)
        row, _ = chaos.drawn(
            reported["launcher"], int(reported["seed"]), int(reported["run"]), kinds
        )
        assert row.fault == reported["fault"], reported
        assert str(row.step) == reported["step"] or row.fault == "bit of a shard flipped", reported


def test_each_launcher_has_its_faults() -> None:
    kinds = {name: chaos.kinds_of(name, root=True) for name in ("ray", "ranks", "hosts")}
    assert kinds["hosts"] == chaos_hosts.FAULTS
    assert not set(kinds["hosts"]) & {*kinds["ray"], *kinds["ranks"]}
    assert set(kinds["ray"]) - set(kinds["ranks"]) == set(chaos.OF_RAY)
    assert set(chaos.FAULTS) == set().union(*kinds.values()), "or the table leaves one out"
    assert "disk full" not in chaos.kinds_of("ray", root=False)
    later = {chaos.kinds_of(name, root=True, later=True) for name in ("ray", "ranks", "hosts")}
    assert set(chaos.LATER_FAULTS) == {kind for each in later for kind in each}


def test_the_table_counts_each_launcher_and_names_all_dates() -> None:
    rows = [row_of("ray"), row_of(), row_of(), row_of("hosts", "host killed", date="2026-11-26")]
    lines = table([{name: str(value) for name, value in asdict(row).items()} for row in rows])
    assert "| fault | runs: on nodes / with Ray / without |" in lines
    assert "| worker killed | 0 / 1 / 2 |" in lines
    assert "| host killed | 1 / 0 / 0 |" in lines
    assert lines.endswith("load 1 to 1, 2026-11-25 and 2026-11-26.")


class PlayedHosts:
    """Hosts on which a run stops as its holds say; it writes down what becomes of them.

    Args:
        folder: directory of what they keep, in that of the runs.
    """

    #: What was done, in order; whether rank 0 is on the host without the driver.
    reported: list[str] = []  # noqa: RUF012 - a test empties it
    zero_is_there = False
    address = "10.77.0.1:6379"

    def __init__(self, folder: Path) -> None:
        self.reported.append("new cluster")
        self._faults = folder.parent / "a run" / "faults"
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, name: str) -> None:
        self.reported.append(f"start {name}")

    def kill(self, name: str) -> None:
        held = sorted(path.name for path in self._faults.glob("*"))
        self.reported.append(f"kill {name} while {held} are held")
        for process in self._processes if name == "head" else ():
            process.kill()

    def close(self) -> None:
        self.reported.append("end")

    def run(self, name: str, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(words, int(not self.zero_is_there), "", "")

    @contextlib.contextmanager
    def started(
        self, name: str, *words: str, **environment: str
    ) -> "Iterator[subprocess.Popen[str]]":
        self.reported.append(f"{Path(words[-1]).name} on {name}")
        with subprocess.Popen(words, text=True, stdout=subprocess.PIPE) as process:
            self._processes.append(process)
            yield process
            process.kill()


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[PlayedHosts]]:
    monkeypatch.setattr(chaos_hosts, "RayHosts", PlayedHosts)
    PlayedHosts.reported.clear()
    yield PlayedHosts
    PlayedHosts.zero_is_there = False


def held_run(folder: Path) -> list[str]:
    """The command of a run of which both workers are held; the test lets its end come."""
    faults = folder / "a run" / "faults"
    faults.mkdir(parents=True)
    for rank in (0, 1):
        (faults / f"{rank}-hold-3").touch()
    return ["bash", "-c", f"until [ -e {folder}/go ]; do sleep 0.02; done", "the run"]


@pytest.mark.parametrize(("zero_is_there", "rank"), [(False, 1), (True, 0)])
def test_a_host_is_killed_when_the_worker_that_stays_is_let_go(
    zero_is_there: bool, rank: int, tmp_path: Path, played: type[PlayedHosts]
) -> None:
    words, row = held_run(tmp_path), row_of("hosts", "host killed")
    played.zero_is_there = zero_is_there
    (tmp_path / "go").touch()
    hosts = chaos_hosts.Hosts(tmp_path / "hosts")
    assert hosts.attempt(words, tmp_path / "a run", row) == 0
    assert row.victim == f"host of rank {rank}"
    first = ["new cluster", "start head", "start host1", "the run on head"]
    kill = f"kill host1 while ['{rank}-hold-3'] are held"
    assert played.reported == [*first, kill, "start host2"]
    assert hosts.attempt(words, tmp_path / "a run") == 0
    assert played.reported[6:] == ["the run on head"], "hosts that are there are taken again"


def test_a_heads_host_takes_the_driver_along_and_all_hosts_are_new(
    tmp_path: Path, played: type[PlayedHosts]
) -> None:
    words, row = held_run(tmp_path), row_of("hosts", "head's host killed")
    hosts = chaos_hosts.Hosts(tmp_path / "hosts")
    assert hosts.attempt(words, tmp_path / "a run", row) == -9
    assert row.victim == "host of head, driver and rank 0"
    assert played.reported[4:] == ["kill head while ['0-hold-3'] are held", "end"]
    (tmp_path / "go").touch()
    assert hosts.attempt(words, tmp_path / "a run") == 0
    assert played.reported[6:] == ["new cluster", "start head", "start host2", "the run on head"]


def test_a_run_that_does_not_come_to_its_step_is_no_row(
    tmp_path: Path, played: type[PlayedHosts]
) -> None:
    hosts = chaos_hosts.Hosts(tmp_path / "hosts")
    with pytest.raises(AssertionError, match="it said this"):
        hosts.attempt(["echo", "it said this"], tmp_path / "a run", row_of("hosts", "host killed"))
    assert not [reported for reported in played.reported if reported.startswith("kill")]


def test_rank_0_is_where_the_progress_is_written(tmp_path: Path) -> None:
    class Here:
        def run(self, name: str, *words: str) -> "subprocess.CompletedProcess[bytes]":
            return subprocess.run(words, capture_output=True)

    with (tmp_path / "progress.jsonl").open("a"):
        assert chaos_hosts._rank_on(Here(), "here", tmp_path) == 0
    assert chaos_hosts._rank_on(Here(), "here", tmp_path) == 1
