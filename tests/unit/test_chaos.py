"""The chaos lane fails for every run that lost something, and its table shows what."""

from pathlib import Path

import pytest

from benchmarks import chaos
from benchmarks.chaos import Row, append
from benchmarks.chaos_table import table


@pytest.mark.parametrize(
    ("lost", "code"),
    [
        ({}, 0),
        ({"equal_weights": False}, 1),
        ({"lost_metrics": 2}, 1),
        ({"doubled_metrics": 3}, 1),
    ],
)
def test_a_run_that_lost_something_fails_the_lane(
    lost: dict[str, int], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(chaos.INSIDE, "1")
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # the lane sets them for its children
    for name in ("headings", "drawings"):
        (tmp_path / "data" / name).mkdir(parents=True)
    output = tmp_path / "chaos.csv"
    told = {"equal_weights": True, **lost}
    for seed in (0, 1):
        values = told if seed == 0 else {"equal_weights": True}
        row = Row("2026-11-25", "a machine", 1.0, "ranks", seed, 0, "worker killed", "rank 0", 3)
        for name, value in values.items():
            setattr(row, name, value)
        append(output, row)
    words = ["--launcher", "ranks", "--runs", "1", "--output", str(output)]
    words += ["--data", str(tmp_path / "data"), "--folder", str(tmp_path / "runs")]
    assert chaos.main([*words, "--seed", "0"]) == code, "also when it was run before"
    assert chaos.main([*words, "--seed", "1"]) == 0
    lost_and_doubled = f"| {lost.get('lost_metrics', 0)} / {lost.get('doubled_metrics', 0)} |"
    assert lost_and_doubled in table(chaos.read(output))
