"""The machine's checks say what to do."""

import json
from pathlib import Path

import pytest

from skillnet_platform import doctor
from skillnet_platform.checks import machine as machine_checks


def test_doctor_reports_as_json(run_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--ray", "false", "finetune", "--config", "tiny", "--json"]) == 0
    reported = json.loads(capsys.readouterr().out)
    assert reported["ok"] is True
    found = {each["check"]: each for each in reported["findings"]}
    assert {"python", "torch", "ray", "cpus", "memory", "disk", "loopback"} <= set(found)
    assert str(run_root) in found["disk"]["seen"]
    assert list(run_root.iterdir()) == [], "it leaves nothing behind"


def test_doctor_fails_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SKILLNET_HOME", str(tmp_path / "file"))
    assert doctor.main(["--ray", "false"]) == 1
    text = capsys.readouterr().out
    assert "error" in text
    assert "SKILLNET_HOME" in text


def test_doctor_names_a_tracker_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (finding,) = machine_checks.check_tracker()
    assert finding.level == "error"
    assert "no MLflow server answers" in finding.seen


@pytest.mark.integration
def test_doctor_runs_a_task_and_asks_the_state_api(ray_session: object) -> None:
    findings = {each.check: each for each in machine_checks.check_ray()}
    assert findings["ray"].level == "ok", findings["ray"]
    assert "ray state api" in findings
