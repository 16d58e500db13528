"""A user id without an entry in passwd and without HOME, as in many containers."""

import json
import os
from pathlib import Path

import pytest

from skillnet_platform.storage.local import prepare_user_environment
from tests.helpers.other_user import UNKNOWN_UID, run_as_unknown_user

_RUN = """
import json, os, sys
from pathlib import Path
from skillnet_platform import cluster, tracking
with tracking.start_run("unknown", {"a": 1}, tracking.TrackingConfig(system_metrics=False)) as run:
    run.metrics({"t/loss": 1.0})
found = tracking.backend.create_client(run.uri).get_run(run.run_id)
cluster.prepare_ray_environment()
facts = {
    "uid": os.getuid(),
    "status": found.info.status,
    "user": found.data.tags["mlflow.user"],
    "home": str(Path.home()),
}
print(json.dumps(facts))
"""


def test_an_unknown_user_without_home_records_runs(tmp_path: Path) -> None:
    done = run_as_unknown_user(
        _RUN, SKILLNET_HOME=str(tmp_path / "runs"), TMPDIR=str(tmp_path), HOME=None, USER=None
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    home = tmp_path / f"skillnet-{UNKNOWN_UID}/home"
    assert facts == {
        "uid": UNKNOWN_UID,
        "status": "FINISHED",
        "user": f"uid-{UNKNOWN_UID}",
        "home": str(home),
    }
    assert home.parent.stat().st_mode & 0o7777 == 0o700, "others must not plant credentials"


def test_the_environment_of_a_known_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("LOGNAME", "somebody")
    before = dict(os.environ)
    prepare_user_environment()
    assert dict(os.environ) == before
