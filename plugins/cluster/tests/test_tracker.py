"""The tracker's pages come up, no password is seen, and no process outlives the command."""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from skillnet_cluster import tracker
from skillnet_platform import tracking
from skillnet_platform.tracking.backend import sqlite_path
from tests.helpers.processes import start_python
from tests.helpers.sockets import listening, reachable
from tests.helpers.tracked_runs import where

ROOT = Path(__file__).parents[3]

#: A server with a child, both of which say who they are.
SERVER = "echo $$; sleep 1000 & echo $!; wait"
STARTS = f"""
import os, time
from skillnet_cluster import tracker
from skillnet_platform import tracking
with tracker.running_server(["sh", "-c", {SERVER!r}], os.environ):
    os.write(1, b"in\\n")  # print may write the line in two parts
    time.sleep(1000)
"""


def test_a_killed_process_leaves_no_server() -> None:
    with subprocess.Popen([sys.executable, "-c", STARTS], stdout=subprocess.PIPE) as process:
        # The server may print before its watcher knows of it; the watcher confirms by "in".
        said = {process.stdout.readline().strip() for _ in range(3)}
        try:
            below = [psutil.Process(int(number)) for number in said - {b"in"}]
        finally:
            process.kill()
        _, alive = psutil.wait_procs(below, timeout=300)
        assert not alive


def test_a_server_that_does_not_listen_is_killed_and_so_is_what_it_left(monkeypatch):
    monkeypatch.setattr(tracker, "END_S", 0.5)
    deaf = "trap '' TERM; sleep 1000 & echo $!; wait; sleep 1000"
    with tracker.running_server(["sh", "-c", deaf], os.environ, stdout=subprocess.PIPE) as server:
        # By a pipe: capfd's file, read while it is being written, loses what comes in between.
        child = psutil.Process(int(server.stdout.readline()))
    server.stdout.close()
    assert server.returncode is not None
    _, alive = psutil.wait_procs([child], timeout=300)
    assert not alive


def test_a_port_in_use_is_refused(run_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert tracker.main(["--port", str(port)]) == 2
    assert "cannot listen there" in capsys.readouterr().err


def test_no_command_line_has_a_password(run_root, tmp_path, monkeypatch):
    seen, program = tmp_path / "seen", tmp_path / "mlflow"
    program.write_text(f'#!/bin/sh\necho "$MLFLOW_BACKEND_STORE_URI" "$@" >{seen}\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other")
    uri = "postgresql://me:secret@db/mlflow"
    words = tracker.server_command("127.0.0.1", 5000)
    subprocess.run(words, env=tracker.server_environment(uri), check=True)
    variable, *words = seen.read_text().split()
    assert variable == uri
    assert "secret" not in " ".join(words)
    assert words[0] == "server"


def test_another_server_of_this_shell_is_named(run_root, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.invalid:5000")
    assert sqlite_path(tracker.resolve_store(None)) == run_root / "mlflow.db"
    assert "http://mlflow.invalid:5000" in capsys.readouterr().err


@pytest.mark.integration
@pytest.mark.long
def test_the_pages_show_the_runs_and_leave_no_process(run_root: Path) -> None:
    with tracking.start_run("shown", None, where("skillnet")) as run:
        run.text("kept", "note.txt")
    process = start_python("-m", "skillnet_cluster.tracker", "--port", "0")
    url, _, page = process.stdout.readline().strip().partition("/#/")
    assert page.startswith("experiments/")
    assert url.startswith("http://127.0.0.1:")
    sockets = listening(process.pid)
    assert sockets
    assert reachable(sockets) == []
    request = urllib.request.Request(
        f"{url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=skillnet"
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        assert json.load(answer)["experiment"]["name"] == "skillnet"
    file = f"{url}/get-artifact?path=note.txt&run_uuid={run.run_id}"
    with urllib.request.urlopen(file, timeout=300) as answer:
        assert answer.read() == b"kept"
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 2, "a server and its worker"
    process.kill()
    process.wait(30)
    process.stdout.close()
    # It is somebody else who ends them. The pages in test_sockets end by SIGTERM.
    _, alive = psutil.wait_procs(below, timeout=300)
    assert not alive
