"""The tracker goes away in the middle of a run, or before its end: every metric arrives, once."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.runs.progress_log import read_metric_history
from skillnet_platform import tracking
from skillnet_platform.tracking import backend
from tests.chaos.fault_injection import VARIABLE
from tests.chaos.tracking_server import Server
from tests.helpers.waiting import wait_until
from tests.integration.test_faults import STEPS, config_for, start_run, steps_of

pytestmark = [pytest.mark.integration, pytest.mark.long]

#: Seconds without a tracker; `make chaos` waits a minute.
OUTAGE_S = float(os.environ.get("SKILLNET_TEST_OUTAGE_S", "3"))
PATIENCE_S = 300.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "server.db")
    made.start()
    yield made
    made.stop()


def start(config: FinetuneConfig, root: Path, home: Path, *steps: int) -> "subprocess.Popen[str]":
    """Start a run that stops after each of ``steps`` until the test has acted."""
    orders = json.dumps([{"step": step, "kind": "hold"} for step in steps])
    return start_run(config, root, **{"SKILLNET_HOME": str(home), VARIABLE: orders})


def arrived(config: FinetuneConfig, run: Path) -> None:
    """Check that the tracker has each metric of the run at each of its steps, once."""
    reported = read_metric_history(run / "progress.jsonl")
    assert steps_of(run) == list(range(1, STEPS + 1))
    run_id = json.loads((run / "run.json").read_text(encoding="utf-8"))["run_id"]
    client = backend.create_client(str(config.tracking.uri))
    for name, points in reported.items():
        found = client.get_metric_history(run_id, name)
        assert sorted((point.step, point.value) for point in found) == points, name
    assert client.get_run(run_id).info.status == "FINISHED"


def test_away_for_a_while(data: Path, tmp_path: Path, run_root: Path, server: Server) -> None:
    config = config_for(data, tmp_path, "a-while")
    config.tracking.uri = server.uri
    run = tmp_path / "a-while"
    process = start(config, tmp_path, run_root, 3, 8)
    gone, back = (run / "faults" / name for name in ("0-hold-3", "1-hold-8"))
    wait_until(gone.exists, PATIENCE_S, process=process)
    server.stop()
    gone.unlink()
    wait_until(back.exists, PATIENCE_S, process=process)
    assert len(list((run_root / "spool").glob("*.jsonl"))) == 1, "records wait on the disk"
    time.sleep(OUTAGE_S)
    server.start()
    back.unlink()
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    assert said.count("does not answer") == 1
    assert "the tracker answers again" in said
    arrived(config, run)
    assert list((run_root / "spool").iterdir()) == []


@pytest.mark.slow("test_tracker_away.py::test_away_for_a_while")
def test_away_at_the_end(data: Path, tmp_path: Path, run_root: Path, server: Server) -> None:
    config = config_for(data, tmp_path, "the-end")
    config.tracking.uri = server.uri
    run = tmp_path / "the-end"
    process = start(config, tmp_path, run_root, 3)
    gone = run / "faults" / "0-hold-3"
    wait_until(gone.exists, PATIENCE_S, process=process)
    server.stop()
    gone.unlink()
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    assert json.loads((run / "result.json").read_text())["step"] == STEPS
    waiting = list((run_root / "spool").glob("*.jsonl"))
    assert waiting
    assert str(waiting[0]) in said
    server.start()
    # What the next run of this machine does first.
    assert tracking.send_leftover_spools(server.uri) > 0
    assert tracking.send_leftover_spools(server.uri) == 0
    arrived(config, run)
    assert list((run_root / "spool").iterdir()) == []
