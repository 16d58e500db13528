"""A tracker's sqlite file that cannot be used is named at once."""

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from skillnet_platform.errors import UserError
from skillnet_platform.tracking import backend
from skillnet_platform.tracking.database_file import require_database


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
