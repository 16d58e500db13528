"""The chaos lane fails for every run that lost something, and its table shows what."""

import subprocess
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
    assert ("2 metrics (" in shown) == ("lost_metrics" in lost)
    assert ("3 metrics doubled (" in shown) == ("doubled_metrics" in lost)
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
    assert "| fault | runs: nodes/Ray/no Ray |" in lines
    assert "| worker killed | 0/1/2 |" in lines
    assert "| host killed | 1/0/0 |" in lines
    assert lines.endswith("load 1 to 1, 2026-11-25 and 2026-11-26. Lost: nothing.")


def test_rank_0_is_where_the_progress_is_written(tmp_path: Path) -> None:
    class Here:
        def run(self, name: str, *words: str) -> "subprocess.CompletedProcess[bytes]":
            return subprocess.run(words, capture_output=True)

    with (tmp_path / "progress.jsonl").open("a"):
        assert chaos_hosts._rank_on(Here(), "here", tmp_path) == 0
    assert chaos_hosts._rank_on(Here(), "here", tmp_path) == 1
