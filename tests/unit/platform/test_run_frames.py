"""Runs are read as DataFrames, also while they are written."""

from pathlib import Path

import pytest

import skillnet_platform
from skillnet_platform.errors import UserError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SKILLNET_HOME", str(tmp_path))
    run = tmp_path / "first"
    run.mkdir()
    (run / "config.yaml").write_text("name: first\ntraining: {steps: 40, lr: 0.1}\nseed: 3\n")
    (run / "progress.jsonl").write_text(
        '{"time": 1.0, "step": 0, "losses": ""}\n'
        '{"time": 2.0, "step": 20, "metrics": {"a/loss": 2.5}}\n'
        '{"time": 3.0, "step": 40, "metrics": {"a/loss": 1.5}}\n'
        '{"time": 4.0, "step": 40, "metrics": {"a/accuracy": 0.5}}\n{"time": 5.'
    )
    return tmp_path


def test_configuration_metrics_and_evaluation_are_frames(root: Path) -> None:
    run = skillnet_platform.load_run("first")
    settings = dict(run.configuration.itertuples(index=False))
    assert settings == {"name": "first", "training.steps": 40, "training.lr": 0.1, "seed": 3}
    assert run.metrics["step"].tolist() == [20, 40]
    assert run.metrics["a/loss"].tolist() == [2.5, 1.5]
    assert run.metrics["a/accuracy"].iloc[-1] == 0.5
    assert run.evaluation.empty
    (root / "first" / "evaluation.csv").write_text("task,metric,value,low,high\na,x,1,0.5,\n")
    evaluation = skillnet_platform.load_run(root / "first").evaluation
    assert evaluation["low"].tolist() == [0.5]


def test_unknown_run_is_named(root: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'first'"):
        skillnet_platform.load_run("frist")
