"""Tables about the fairness of a comparison: sizes of baselines, and gaps after more steps."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipelines.data.config.folds import FoldConfig
from skillnet_evidence.cells import TableCell
from skillnet_evidence.comparison import MEAN
from skillnet_evidence.scores import SPLIT
from skillnet_evidence.tables import build_gap_table
from skillnet_platform import config as configuration
from skillnet_studies.analysis.finished_runs import compare_runs, read_run
from skillnet_studies.report.run_tables import build_size_table, find_longer_arms
from tests.helpers.synthetic_runs import set_fold, write_run


def test_a_mismatch_of_sizes_is_listed_with_both_sizes(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / f"{label}{seed}", system, seed, options=options), label)
        for label, system, options in (
            ("skillnet", "skillnet", {}),
            ("dense", "dense", {}),
            ("dense-wide", "dense", {"ffn_dim": 400}),
            ("moe", "moe", {}),
        )
        for seed in (0, 1)
    ]
    table = build_size_table(compare_runs(runs))
    assert [row[0].text for row in table.rows] == ["dense", "dense-wide", "moe"]
    assert [row[1].text for row in table.rows] == ["activated parameters"] * 3
    assert [row[4].small for row in table.rows] == ["", "mismatch", ""]
    assert "Not the size of SkillNet, by more than 5 %: dense-wide." in table.caption
    assert not table.collapsed
    assert not build_size_table(compare_runs(runs[:2])).rows


def lengthen(run: Path, steps: int) -> None:
    """Give a synthetic run more steps."""
    tree = configuration.load_yaml(run / "config.yaml")
    tree["training"]["steps"] = steps
    (run / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    trained = json.loads((run / "trained.json").read_text())
    (run / "trained.json").write_text(json.dumps(trained | {"step": steps}))


def read_points(cell: TableCell) -> float:
    return float(cell.text.replace("−", "-"))


def test_gaps_are_shown_at_both_numbers_of_steps(tmp_path: Path) -> None:
    runs = []
    for label, skill in (("skillnet", 0.4), ("dense", 0.0)):
        for seed in (0, 1, 2):
            short = write_run(tmp_path / f"{label}{seed}", label, seed, skill)
            # With more steps both are equally good.
            long = write_run(tmp_path / f"{label}-long{seed}", label, seed, 0.5)
            lengthen(long, 36)
            runs += [read_run(short, label), read_run(long, f"{label}-long")]
    comparison = compare_runs(runs)
    assert find_longer_arms(comparison) == {"skillnet": "skillnet-long", "dense": "dense-long"}
    table = build_gap_table(comparison, find_longer_arms(comparison))
    assert table.columns[2:] == ["12 steps", "36 steps", "change"]
    assert {row[0].text for row in table.rows} == {"skillnet − dense"}
    mean = table.rows[-1]
    assert mean[1].text == "mean"
    short, long, change = (read_points(cell) for cell in mean[2:])
    assert short > long + 3
    assert change == pytest.approx(long - short, abs=0.11)
    low, high = (float(end) for end in mean[4].small.replace("−", "-").split(" to "))
    assert low < change < high < 0, "the gap closes"
    short_only = [run for run in runs if not run.label.endswith("-long")]
    comparison = compare_runs(short_only)
    assert not build_gap_table(comparison, find_longer_arms(comparison)).rows


def test_the_change_of_a_gap_is_measured_on_the_folds_that_all_arms_have(tmp_path: Path) -> None:
    runs = []
    for label, skill, folds in (
        ("skillnet", 0.4, 5),
        ("dense", 0.0, 5),
        ("skillnet-long", 0.5, 3),
        ("dense-long", 0.5, 3),
    ):
        for number in range(folds):
            run = write_run(tmp_path / f"{label}{number}", label.removesuffix("-long"), 0, skill)
            set_fold(run, FoldConfig(5, number))
            if label.endswith("-long"):
                lengthen(run, 36)
            runs.append(read_run(run, label))
    comparison = compare_runs(runs)
    table = build_gap_table(comparison, find_longer_arms(comparison))
    assert "on the replicates that all four have" in table.caption
    means = {
        label: np.mean([comparison.samples[label, MEAN, SPLIT].values[i] for i in range(3)])
        for label in comparison.systems
    }
    short, long, change = (read_points(cell) for cell in table.rows[-1][2:])
    assert short == pytest.approx(100 * (means["skillnet"] - means["dense"]), abs=0.06)
    assert long == pytest.approx(100 * (means["skillnet-long"] - means["dense-long"]), abs=0.06)
    assert change == pytest.approx(long - short, abs=0.11)
    # Each pair of systems has a fold in common, and the four have none.
    kept = {"skillnet": (0, 1), "dense": (1, 2), "skillnet-long": (0, 2)}
    rest = [run for run in runs if run.fold.number in kept.get(run.label, range(3))]
    comparison = compare_runs(rest)
    assert not build_gap_table(comparison, find_longer_arms(comparison)).rows
