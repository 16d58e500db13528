"""A tracker's sqlite file that cannot be used is named at once; its artifacts are beside it."""

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from skillnet_platform.errors import UserError
from skillnet_platform.tracking import backend, spool
from skillnet_platform.tracking.artifact_folder import DatabaseFolderArtifacts
from skillnet_platform.tracking.backend import require_database

LOCATION = f"{backend.ARTIFACT_SCHEME}:/mlartifacts"


@pytest.fixture(params=["garbage", "folder"])
def unusable(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "mlflow.db"
    if request.param == "garbage":
        path.write_bytes(b"garbage" * 1000)
    else:
        path.mkdir()
    return path


def test_an_unusable_database_is_named_at_once(unusable: Path) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"^{unusable}: .*database.*\. Move it away"):
        backend.create_client(f"sqlite:///{unusable}")
    assert time.monotonic() - start < 60, "MLflow's own retries take longer"


def test_a_database_that_cannot_be_created_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_database(tmp_path / "new/mlflow.db")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match=f"{tmp_path} is not writable"):
        require_database(tmp_path / "new/mlflow.db")


def test_a_database_that_another_process_locks_is_usable(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as other:
        other.execute("CREATE TABLE t (a)")
        require_database(path)
        other.execute("BEGIN EXCLUSIVE")
        require_database(path)


def test_artifacts_are_beside_the_database_of_the_tracker(
    run_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mlflow.db").touch()

    def folder(tracker: str, location: str = LOCATION) -> Path:
        return Path(DatabaseFolderArtifacts(location, tracker).artifact_dir)

    assert folder(f"sqlite:///{elsewhere}/mlflow.db") == elsewhere / "mlartifacts"
    with pytest.raises(
        MlflowException, match="beside the sqlite database of another machine"
    ) as caught:
        folder("http://tracker:5000")
    assert not spool.is_away(caught.value), "the record is refused and does not wait"
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{elsewhere}/mlflow.db")
    assert folder("http://tracker:5000", f"{LOCATION}/run") == elsewhere / "mlartifacts/run"
    monkeypatch.delenv("MLFLOW_BACKEND_STORE_URI")
    run_root.mkdir(exist_ok=True)
    (run_root / "mlflow.db").touch()
    assert folder("http://127.0.0.1:5000") == run_root / "mlartifacts", "a server of this machine"
    for hostile in ("database-folder:/../x", f"{LOCATION}/../../x"):
        with pytest.raises(MlflowException, match="leads out"):
            folder("http://127.0.0.1:5000", hostile)
