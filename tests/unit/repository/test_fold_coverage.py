"""The simulation of folds: its folds are those of the final study, and shared rows matter."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import fold_coverage
from benchmarks.fold_coverage import FoldDesign, draw_folded_study, read_folds
from benchmarks.study_coverage import measure_studies

STUDY = Path(__file__).parents[3] / "configs/studies/final.yaml"


def test_the_simulated_folds_are_those_of_the_final_study() -> None:
    study = yaml.safe_load(STUDY.read_text(encoding="utf-8"))
    folds = fold_coverage.FOLDS
    assert study["run"]["fold"] == {
        "count": folds.count,
        "validation_share": folds.validation_share,
        "reserve_part": folds.reserve_part,
    }
    systems = {name for name, settings in study["systems"].items() if settings is not None}
    assert systems == set(fold_coverage.SYSTEMS)
    for task, settings in study["run"]["tasks"].items():
        assert fold_coverage.CORPORA[task] == settings["corpus"]


def test_effects_of_a_fold_have_the_expected_variance() -> None:
    own = read_folds()["text_classification"]
    random, spread = np.random.default_rng(0), own.task.components.common
    drawn = np.array([own.draw_folds(random, spread) for _ in range(200)])
    assert drawn.shape == (200, fold_coverage.FOLDS.count)
    assert drawn.var(0).mean() == pytest.approx(own.expect_variance(spread), rel=0.1)


def test_residuals_are_those_of_the_folds_of_the_final_study() -> None:
    residuals = fold_coverage.read_residuals()
    tasks = read_folds()
    assert set(residuals) == {(name, task) for name in fold_coverage.SYSTEMS for task in tasks}
    for rest_F in residuals.values():
        assert rest_F.shape == (fold_coverage.FOLDS.count,)
        assert abs(rest_F.mean()) < 1e-12
        assert 0.003 < rest_F.std() < 0.1
    # An unknown effect of training rows is needed for false alarms.
    found = {}
    for effect in (0.0, 4.0):
        random = np.random.default_rng(0)
        design = FoldDesign(effect, has_residuals=True)
        drawn = (draw_folded_study(tasks, design, random, residuals) for _ in range(40))
        truths = {task: own.task for task, own in tasks.items()}
        rows = measure_studies(drawn, truths, fold_coverage.FOLD_PAIRS, design.name)
        assert "residuals of the study" in str(rows[0]["design"])
        found[effect] = [row["false_alarms"] for row in rows]
    assert max(found[0.0]) < 4
    assert min(found[4.0]) > 6


def test_shared_training_rows_beyond_the_assumed_effect_cause_false_alarms() -> None:
    name = "text_to_code"
    tasks = {name: read_folds()[name]}
    found = {}
    for effect in (0.0, 4.0):
        random = np.random.default_rng(0)
        drawn = (draw_folded_study(tasks, FoldDesign(effect), random) for _ in range(60))
        truths = {task: own.task for task, own in tasks.items()}
        found[effect] = measure_studies(drawn, truths, fold_coverage.FOLD_PAIRS, str(effect))[0]
    assert found[0.0]["coverage"] > 95
    assert found[0.0]["false_alarms"] < 3
    assert found[4.0]["false_alarms"] > 6
