"""The machine's checks say what to do, and the pages of the runs come up and go down."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from skillnet_platform import doctor, ui
from skillnet_platform.checks import machine as machine_checks
from skillnet_platform.tracking import backend
from skillnet_platform.tracking import server as tracking_server

ROOT = Path(__file__).parents[3]


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


def test_ui_refuses_a_port_in_use(run_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert ui.main(["--port", str(port)]) == 2
    assert "cannot listen there" in capsys.readouterr().err


def test_ui_lets_nobody_in_by_mistake(
    run_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[str] = []

    def serve(place: backend.TrackingBackend, host: str, *more: object) -> int:
        served.append(host)
        return 0

    monkeypatch.setattr(ui, "_serve", serve)
    assert ui.main(["--host", "0.0.0.0"]) == 2
    assert "skillnet tracker --auth true" in capsys.readouterr().err
    assert ui.main(["--host", "0.0.0.0", "--without_password", "--port", "0"]) == 0
    assert served == ["0.0.0.0"]


def test_no_command_line_has_a_password(
    run_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, program = tmp_path / "seen", tmp_path / "mlflow"
    program.write_text(f'#!/bin/sh\necho "$MLFLOW_BACKEND_STORE_URI" "$@" >{seen}\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other")
    uri = "postgresql://me:secret@db/mlflow"
    assert tracking_server.start_server(uri, "127.0.0.1", 5000).wait() == 0
    variable, *words = seen.read_text().split()
    assert variable == uri
    assert "secret" not in " ".join(words)
    assert words[0] == "server"


def test_ui_points_to_the_server_that_has_the_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.invalid:5000")
    assert ui.main([]) == 0
    assert "http://mlflow.invalid:5000" in capsys.readouterr().err


@pytest.mark.integration
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_ui_serves_the_runs_and_leaves_no_process(run_root: Path, number: int, code: int) -> None:
    backend.setup_backend(experiment="shown")
    process = subprocess.Popen(
        [sys.executable, "-m", "skillnet_platform.ui", "--port", "0"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "platform")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url, _, page = process.stdout.readline().strip().partition("/#/")
    assert page.startswith("experiments/")
    assert url.startswith("http://127.0.0.1:")
    request = urllib.request.Request(
        f"{url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=shown"
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert json.load(answer)["experiment"]["name"] == "shown"
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 2, "a server and its worker"
    process.send_signal(number)
    assert process.wait(30) == code
    process.stdout.close()
    # After SIGKILL it is somebody else who ends them.
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not alive
