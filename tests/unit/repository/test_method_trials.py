"""The comparison of method trials is paired by seed, and the kept CSVs can be summarized."""

from pathlib import Path

import pytest

from benchmarks.growing_csv import append_csv_rows, read_csv_rows
from benchmarks.method_trials import COLUMNS, find_first_step, summarize_trials

KEPT = sorted((Path(__file__).parents[3] / "benchmarks/results").glob("*-method-*.csv"))


def write_trials(path: Path) -> None:
    values = {
        ("configured", 0): (0.9, 0.3),
        ("configured", 1): (0.9, 0.5),
        ("aligned", 1): (0.4, 0.2),
    }
    for (arm, seed), pair in values.items():
        common = {"task": "t", "arm": arm, "seed": seed, "average": 0.0, "steps": 20}
        rows = [common | {"step": 10 * (n + 1), "value": v} for n, v in enumerate(pair)]
        append_csv_rows(path, COLUMNS, rows)


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    write_trials(tmp_path / "a.csv")
    rows = read_csv_rows(tmp_path / "a.csv")
    assert summarize_trials(rows, 0.4) == [
        ("configured", "0.0", "0.300, 0.500", "0.400", "0.141", "–", "20, inf"),
        ("aligned", "0.0", "0.200", "0.200", "–", "-0.300 (one seed)", "10"),
    ]
    assert find_first_step(rows[:1], 0.5) == float("inf")


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_kept_trials_can_be_summarized(path: Path) -> None:
    rows = read_csv_rows(path)
    for task in {row["task"] for row in rows}:
        assert summarize_trials([row for row in rows if row["task"] == task])
