"""A tracking server on PostgreSQL: many write at once, the database goes away, and none is lost."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from skillnet_platform import store, tracker, tracking
from skillnet_platform.errors import UserError
from skillnet_platform.tracking import Tracker, TrackingConfig
from tests import postgres
from tests.ports import free_port

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
TRIALS = 10


def has_postgres() -> bool:
    try:
        postgres.owner()
    except KeyError:
        return False
    return postgres.programs() is not None


needs_postgres = pytest.mark.skipif(
    not has_postgres(), reason="needs PostgreSQL: apt-get install postgresql"
)


@contextlib.contextmanager
def served(*words: str, home: Path) -> Iterator[str]:
    """``skillnet tracker`` for the length of a block; its address."""
    port = words[words.index("--port") + 1] if "--port" in words else str(free_port())
    command = [sys.executable, "-m", "skillnet_platform.tracker", "--port", port]
    log = (home / "tracker.log").open("w")
    process = subprocess.Popen(
        [*command, "--workers", "1", *words],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
            "SKILLNET_HOME": str(home),
        },
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    uri = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 600
        while True:
            assert process.poll() is None, (home / "tracker.log").read_text()
            with contextlib.suppress(UserError):
                store.require_answer(uri)
                break
            assert time.monotonic() < end, (home / "tracker.log").read_text()
            time.sleep(0.2)
        yield uri
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


def test_a_tracker_that_is_killed_leaves_nobody_and_is_there_again_by_the_same_command(
    run_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flask_wtf", reason="needs Flask-WTF: pip install '.[tracker]'")
    where = TrackingConfig(system_metrics=False)
    words = ("--auth", "true", "--port", str(free_port()))
    with served(*words, home=run_root) as uri:
        password = (run_root / "tracker/admin-password").read_text().strip()
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        where.uri = uri
        with tracking.start("before", None, where) as run:
            run.metrics({"loss": 1.0}, 1)
        (mine,) = [
            each
            for each in psutil.Process().children()
            if "skillnet_platform.tracker" in each.cmdline()
        ]
        server = [each for each in mine.children(recursive=True) if each.name() != "sh"]
        assert server
        mine.kill()
        _, alive = psutil.wait_procs(server, timeout=120)
        assert not alive, "the server ends with the command that started it"
    with served(*words, home=run_root) as again:
        assert again == uri
        assert (run_root / "tracker/admin-password").read_text().strip() == password
        assert steps_of(run) == [(1, 1.0)]


def steps_of(tracker: Tracker, name: str = "loss") -> list[tuple[int, float]]:
    found = store.client(tracker.uri).get_metric_history(tracker.run_id, name)
    return sorted((point.step, point.value) for point in found)


@needs_postgres
def test_ten_write_at_once_and_the_database_restarts_under_load(run_root: Path) -> None:
    database = postgres.Postgres()
    where = TrackingConfig(experiment="load", system_metrics=False)
    try:
        with served("--store", database.uri, home=run_root) as uri:
            where.uri = uri
            with tracking.start("sweep", None, where) as parent:
                trials = [tracking.child(parent, f"trial-{n}") for n in range(TRIALS)]
                halfway = threading.Barrier(TRIALS + 1)
                told = 24

                def write(number: int) -> None:
                    mine = trials[number]
                    for step in range(told):
                        if step == told // 3:
                            halfway.wait(300)
                        mine.metrics({"loss": number + step / 100, "other": step}, step)
                    mine.tags({"seed": number})

                threads = [threading.Thread(target=write, args=(n,)) for n in range(TRIALS)]
                for thread in threads:
                    thread.start()
                halfway.wait(300)
                database.stop()
                time.sleep(1)
                database.start()
                for thread in threads:
                    thread.join(300)
                end = time.monotonic() + 300
                while any(not trial.flush() for trial in trials):
                    assert time.monotonic() < end, "what waited was not sent"
                    time.sleep(0.5)
                for number, trial in enumerate(trials):
                    expected = [(step, number + step / 100) for step in range(told)]
                    assert steps_of(trial) == expected, "all of it, once"
                    assert len(steps_of(trial, "other")) == told
                    run = store.client(uri).get_run(trial.run_id)
                    assert run.data.tags["seed"] == str(number)
                    trial.end()
                assert list((run_root / "spool").glob("*.rejected")) == []
            client = store.client(uri)
            below = client.search_runs([parent.experiment_id], max_results=100)
            assert len(below) == TRIALS + 1
            assert {run.info.status for run in below} == {"FINISHED"}
            again = store.setup(uri, "load")
            assert again.experiment_id == parent.experiment_id
    finally:
        database.close()


def test_a_call_without_credentials_is_rejected(
    run_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flask_wtf", reason="needs Flask-WTF: pip install '.[tracker]'")
    import requests

    with served("--auth", "true", home=run_root) as uri:
        call = f"{uri}/api/2.0/mlflow/experiments/search"
        for credentials in (None, ("admin", "password1234"), ("nobody", "")):
            answer = requests.post(call, json={"max_results": 1}, auth=credentials, timeout=30)
            assert answer.status_code == 401, credentials
        assert requests.get(f"{uri}/", timeout=30).status_code == 401
        kept = run_root / "tracker"
        assert {path.name: path.stat().st_mode & 0o777 for path in kept.iterdir()} == {
            "auth.ini": 0o600,
            "admin-password": 0o600,
            "session-key": 0o600,
        }
        with pytest.raises(UserError, match="MLFLOW_TRACKING_USERNAME"):
            store.setup(uri)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        password = (kept / "admin-password").read_text().strip()
        assert password not in (run_root / "tracker.log").read_text()
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        where = TrackingConfig(uri=uri, system_metrics=False)
        with tracking.start("with a password", None, where) as run:
            run.metrics({"loss": 1.0}, 1)
            run.text("hello", "notes.txt")
            # A password that is changed meanwhile holds records up, and loses none.
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another one")
            run.metrics({"loss": 2.0}, 2)
            assert not run.flush()
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
            assert run.flush()
        assert steps_of(run) == [(1, 1.0), (2, 2.0)]
        names = [each.path for each in store.client(uri).list_artifacts(run.run_id)]
        assert names == ["notes.txt"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "give --auth true"),
        (["--host", "192.0.2.1"], "give --auth true"),
        (["--store", "http://127.0.0.1:1"], "give the database"),
        (["--store", "postgresql://x@/x?host=/nowhere"], "--store postgresql"),
    ],
)
def test_what_is_refused(
    words: list[str], said: str, run_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "nowhere" in words[1]:
        pytest.importorskip("psycopg")
    assert tracker.main(["--port", "0", *words]) == 2
    assert said in capsys.readouterr().err


def test_no_password_in_a_message() -> None:
    hide: Any = tracker._without_password
    assert hide("postgresql://me:secret@db/runs") == "postgresql://me:…@db/runs"
    assert hide("postgresql://me@db/runs") == "postgresql://me@db/runs"
    assert hide("sqlite:////x.db") == "sqlite:////x.db"
