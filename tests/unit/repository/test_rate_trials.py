"""The trials of benchmarks.rate_trials are those of the study, but for the rate."""

import json
from pathlib import Path

import pytest

from benchmarks.rate_trials import (
    COLUMNS,
    build_rate_trials,
    list_study_scores,
    main,
    tabulate_scores,
)
from skillnet_platform.errors import UserError

FINAL = Path(__file__).parents[3] / "lab/results/final"


def read_kept_settings(label: str) -> dict[float, dict]:
    lines = map(json.loads, (FINAL / "tuning.jsonl").read_text("utf-8").splitlines())
    return {
        line["settings"]["training.lr"]: line["settings"] | {"steps": line["step"]}
        for line in lines
        if line["name"].startswith(f"{label}-r")
    }


def test_a_rate_of_the_study_has_the_trial_of_the_study() -> None:
    kept = read_kept_settings("specialist")[4e-3]
    trials = build_rate_trials(FINAL, "specialist", [4e-3, 8e-3])
    assert [(t.config.seed, t.config.fold.number) for t in trials] == 2 * [(1000, 0), (1001, 1)]
    same, higher = trials[0], trials[2]
    assert {**same.settings, "steps": same.config.training.steps} == kept
    assert higher.settings == same.settings | {"training.lr": 8e-3}
    assert higher.config.training.lr == 8e-3
    # The study chose a rate per task, which would hide the rate of the trial.
    assert all(task.lr is None for task in higher.config.tasks.values() if task is not None)
    assert higher.splits == ("validation",)


def test_rates_of_the_pretraining_have_its_trials() -> None:
    trials = build_rate_trials(
        FINAL, "skillnet-pretrained", [2e-3, 4e-3], stage="pretraining_rates"
    )
    assert [(t.config.seed, t.config.fold.number) for t in trials] == 2 * [(1000, 0), (1001, 1)]
    same, higher = trials[0], trials[2]
    lines = map(json.loads, (FINAL / "tuning.jsonl").read_text("utf-8").splitlines())
    kept = {line["name"]: line["settings"] for line in lines}
    assert same.settings == kept["skillnet-pretrained-p2-seed1000"]
    assert higher.settings == same.settings | {"pretraining.training.lr": 4e-3}
    assert higher.pretrain is not None
    assert higher.pretrain.training.lr == 4e-3
    assert higher.config.training.lr == same.config.training.lr
    scores = list_study_scores(FINAL, "skillnet-pretrained", "pretraining_rates")
    assert {row["rate"] for row in scores} == {5e-4, 1e-3, 2e-3}
    with pytest.raises(UserError, match="skillnet has no pretraining; leave --pretraining out"):
        build_rate_trials(FINAL, "skillnet", [4e-3], stage="pretraining_rates")


def test_a_wrong_system_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no system 'dense'; there are skillnet, "):
        build_rate_trials(FINAL, "dense", [8e-3])
    with pytest.raises(SystemExit) as stop:
        main([str(FINAL), "moe-pretrained", "--rates", "8e-3", "--output", "none.csv"])
    assert stop.value.code == 2
    assert "moe-pretrained starts from a pretraining" in capsys.readouterr().err


def test_the_table_has_the_study_first_and_means_over_seeds() -> None:
    study = list_study_scores(FINAL, "specialist")
    assert {row["rate"] for row in study} == {2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3}
    common = {"system": "specialist", "task": "speech_recognition", "source": "repeated"}
    repeated = [common | {"rate": "0.008", "seed": s, "score": s / 10} for s in (1, 3)]
    only = [row for row in study if row["task"] == "speech_recognition"]
    header, table = tabulate_scores([*repeated, *only])
    assert header == ["rate", "trials", "speech_recognition"]
    # 61.86 and 68.21 in tuning.jsonl.
    assert table[-4:-2] == [("0.004", "study", "65.0"), ("0.008", "repeated", "20.0")]
    # The study's scores rise up to its largest rate; the lower score above it gives a top.
    assert table[-2] == ("chosen", "study", "4.0e-03")
    assert 1e-3 < float(table[-1][2]) < 4e-3
    assert set(common) < set(COLUMNS)
