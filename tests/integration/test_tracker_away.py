"""The tracker goes away in the middle of a run: every metric arrives, once."""

import json
import os
import time
from pathlib import Path

import pytest

from pipelines.training.runs.progress_log import read_metric_history
from skillnet_platform.tracking import backend
from tests.chaos.fault_injection import VARIABLE
from tests.chaos.tracking_server import Server
from tests.helpers.waiting import wait_until
from tests.integration.test_faults import STEPS, config_for, start_run, steps_of

pytestmark = [pytest.mark.integration, pytest.mark.long]

#: Seconds without a tracker; `make chaos` waits a minute.
OUTAGE_S = float(os.environ.get("SKILLNET_TEST_OUTAGE_S", "3"))
PATIENCE_S = 300.0


def test_away_for_a_while(data: Path, tmp_path: Path, run_root: Path) -> None:
    config, run = config_for(data, tmp_path, "a-while"), tmp_path / "a-while"
    server = Server(tmp_path / "server.db")
    config.tracking.uri = server.uri
    # The run stops after each of these steps until the test has acted.
    orders = json.dumps([{"step": step, "kind": "hold"} for step in (3, 8)])
    with server:
        environment = {"SKILLNET_HOME": str(run_root), VARIABLE: orders}
        process = start_run(config, tmp_path, **environment)
        gone, back = (run / "faults" / name for name in ("0-hold-3", "1-hold-8"))
        wait_until(gone.exists, PATIENCE_S, process=process)
    gone.unlink()
    wait_until(back.exists, PATIENCE_S, process=process)
    assert len(list((run_root / "spool").glob("*.jsonl"))) == 1, "records wait on the disk"
    time.sleep(OUTAGE_S)
    with server:
        back.unlink()
        said, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, said
        assert said.count("does not answer") == 1
        assert "the tracker answers again" in said
        assert steps_of(run) == list(range(1, STEPS + 1))
        run_id = json.loads((run / "run.json").read_text(encoding="utf-8"))["run_id"]
        client = backend.create_client(server.uri)
        for name, points in read_metric_history(run / "progress.jsonl").items():
            found = client.get_metric_history(run_id, name)
            assert sorted((point.step, point.value) for point in found) == points, name
        assert client.get_run(run_id).info.status == "FINISHED"
    assert list((run_root / "spool").iterdir()) == []
