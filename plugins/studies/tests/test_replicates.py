"""Replicates: runs of a fold and a seed, with the corrected variance of their mean."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.config.folds import FoldConfig
from skillnet_evidence import statistics as st
from skillnet_evidence.comparison import MEAN
from skillnet_evidence.errors import EvidenceError
from skillnet_platform.errors import UserError
from skillnet_studies.analysis.finished_runs import FinishedRun, compare_runs, label_runs, read_run
from skillnet_studies.report.report import build_report
from tests.helpers.synthetic_runs import set_fold, write_run

FOLDS = 4


def write_folds(root: Path, system: str, skill: float, folds: int = FOLDS) -> list[FinishedRun]:
    """Write runs of two seeds per fold, whose folds have test sets of different sizes."""
    runs = []
    for seed in (0, 1):
        for number in range(folds):
            folder = root / f"{system}-fold{number}-seed{seed}"
            write_run(folder, system, seed, skill, rows=120 + 10 * number)
            runs.append(read_run(set_fold(folder, FoldConfig(FOLDS, number)), system))
    return runs


def test_replicates_have_the_variance_of_nadeau_and_bengio():
    own = st.build_fold_sample({0: 0.5, 1: 0.6, 2: 0.55, 9: 0.7}, 1 / 4)
    other = st.build_fold_sample({0: 0.45, 1: 0.56, 2: 0.5}, 1 / 4)
    found = st.estimate_mean(own - other)
    differences = np.array([0.05, 0.04, 0.05])
    assert found.value == pytest.approx(differences.mean())
    assert found.std_error == pytest.approx(np.sqrt((1 / 3 + 1 / 4) * differences.var(ddof=1)))
    assert (found.dof, found.seeds) == (2, 3)
    alone = st.estimate_mean(own)
    assert alone.std_error == pytest.approx(np.sqrt(0.5 * own.values.var(ddof=1)))
    # Ten folds leave 9/10 of the other rows to training, for a tenth of them is for validation.
    assert FoldConfig(10).test_to_train == pytest.approx(0.1 / (0.9 * 0.9))
    assert np.isnan(st.estimate_mean(own.select([0])).std_error)
    equal = st.estimate_mean(own - own)
    assert equal.low < 0 < equal.high


def test_overlapping_training_sets_raise_no_false_alarms():
    """Scores of two folds of ten are correlated by a tenth, the assumption of the correction."""
    random, trials, share = np.random.default_rng(0), 2000, 0.1
    alarms = {1 / 9: 0, 0.0: 0}
    for _ in range(trials):
        common = random.normal(0, share**0.5, (2, 1))
        scores = 0.5 + 0.01 * (common + random.normal(0, (1 - share) ** 0.5, (2, 20)))
        for ratio in alarms:
            samples = [st.build_fold_sample(dict(enumerate(own)), ratio) for own in scores]
            alarms[ratio] += st.compute_p_value(samples[0] - samples[1]) <= 0.05
    assert alarms[1 / 9] / trials == pytest.approx(0.05, abs=0.015)
    # As independent numbers they would give several times the level.
    assert alarms[0.0] / trials > 0.15


def test_folds_of_one_system_are_compared_replicate_by_replicate(tmp_path: Path):
    runs = write_folds(tmp_path, "skillnet", 0.5) + write_folds(tmp_path, "specialist", 0.0)
    found = compare_runs(label_runs(runs))
    assert {label: len(own) for label, own in found.systems.items()} == {
        "skillnet": 8,
        "specialist": 8,
    }
    test = found.find_test("specialist", "skillnet", MEAN)
    assert test.difference.dof == 7
    assert test.difference.high < 0
    report = build_report(found, "x")
    assert "8 replicates each" in report.lead
    text = "\n".join([*(table.caption for table in report.tables), *report.captions.values()])
    assert "the variance is corrected for it (Nadeau & Bengio 2003)" in text
    # These are words of the other model, which crosses seeds and units.
    assert not re.search("paired by unit|over seeds|pooled|Satterthwaite", text)
    every = next(table for table in report.tables if table.title == "Every run")
    assert [cell.text for cell in every.rows[-1][:3]] == ["specialist", "3", "1"]
    with pytest.raises(UserError, match="seed 1 of fold 3 occurs twice"):
        label_runs([*runs, replace(runs[7], folder=tmp_path / "copy")])
    plain = read_run(write_run(tmp_path / "plain", "dense"), "dense")
    with pytest.raises(EvidenceError, match="different folds"):
        compare_runs([*runs, plain])
    apart = [run for run in runs if (run.fold.number > 1) == (run.label == "skillnet")]
    with pytest.raises(EvidenceError, match="and specialist have no fold and seed in common"):
        compare_runs(apart)
