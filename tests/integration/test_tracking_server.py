"""A tracking server: load and outages of PostgreSQL lose no record, and nobody sees a password."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipelines import finetune
from skillnet_cluster import tracker
from skillnet_platform import config as configuration
from skillnet_platform import tracking
from skillnet_platform.errors import UserError
from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.storage import directories
from skillnet_platform.tracking import Tracker, TrackingConfig, backend
from tests.helpers import postgres, tracked_trials
from tests.helpers.object_store import ObjectStore, in_environment
from tests.helpers.ports import free_port
from tests.helpers.processes import start_python
from tests.helpers.readable_corpora import write_corpora
from tests.helpers.small_corpora import small_config
from tests.helpers.tracked_trials import PATIENCE_S, STEPS
from tests.helpers.waiting import wait_for_answer, wait_until

pytestmark = pytest.mark.integration

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
    log = (home / "tracker.log").open("w")
    process = start_python(
        *("-m", "skillnet_cluster.tracker", "--port", port, *words),
        variables={"SKILLNET_HOME": str(home)},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_for_answer(f"{uri}/health", 600, (home / "tracker.log").read_text, process=process)
        yield uri
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


def steps_of(tracker: Tracker, name: str = "loss") -> list[tuple[int, float]]:
    found = backend.create_client(tracker.uri).get_metric_history(tracker.run_id, name)
    return sorted((point.step, point.value) for point in found)


@pytest.mark.slow("test_spool.py::test_a_run_outlives_its_tracker_and_nothing_is_lost")
@needs_postgres
def test_ten_trials_record_at_once_and_the_database_restarts_under_load(
    run_root: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = postgres.Postgres()
    kept = f"{object_store.uri}/mlflow"
    where = TrackingConfig(experiment="load", system_metrics=False)
    halfway, away = (tracked_trials.CONTEXT.Barrier(TRIALS + 1) for _ in range(2))
    processes = []
    try:
        monkeypatch.setenv("MLFLOW_ARTIFACTS_DESTINATION", kept)
        with served("--store", database.uri, home=run_root) as uri:
            where.uri = uri
            with tracking.start_run("sweep", None, where) as parent:
                trials = [tracking.start_child_run(parent, f"trial-{n}") for n in range(TRIALS)]
                processes = tracked_trials.start(trials, run_root, halfway, away)
                halfway.wait(PATIENCE_S)
                database.stop()
                away.wait(PATIENCE_S)
                wait_until(lambda: len(spools(run_root)) == TRIALS, PATIENCE_S)  # the records wait
                database.start()
                for process in processes:
                    process.join(PATIENCE_S)
                assert [process.exitcode for process in processes] == [0] * TRIALS
                for trial in trials:
                    trial.end()
                wait_until(lambda: all(trial.flush() for trial in trials), PATIENCE_S, pause=0.2)
            assert list((run_root / "spool").iterdir()) == [], "nothing waits or was refused"
            client = backend.create_client(uri)
            below = client.search_runs([parent.experiment_id], max_results=100)
            assert len(below) == TRIALS + 1
            assert {run.info.status for run in below} == {"FINISHED"}
            for number, trial in enumerate(trials):
                assert_recorded(number, trial, f"{kept}/{parent.experiment_id}")
            again = backend.setup_backend(uri, "load")
            assert again.experiment_id == parent.experiment_id
    finally:
        for process in processes:
            process.kill()
        database.close()


def assert_recorded(number: int, trial: Tracker, folder: str) -> None:
    """Check that the server has each record of the trial once, and its files in the store."""
    reported = [tracked_trials.values(number, step) for step in range(STEPS)]
    for name in reported[0]:
        expected = [(step, values[name]) for step, values in enumerate(reported)]
        assert steps_of(trial, name) == expected
    client = backend.create_client(trial.uri)
    run = client.get_run(trial.run_id)
    assert run.data.tags["seed"] == str(number)
    setting, report = tracked_trials.setting(number), tracked_trials.report(number)
    flat = configuration.flatten_tree(setting)
    assert run.data.params == {key: str(value) for key, value in flat.items()}
    files = {"config.yaml": setting, "reports/trial.json": report}
    mine = f"{folder}/{trial.run_id}/artifacts"
    assert {each.name for each in directories.list_files(mine)} == set(files)
    for name, content in files.items():
        assert yaml.safe_load(directories.read_bytes(f"{mine}/{name}")) == content
    # The server reads and writes the store: clients have no keys of it.
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    with in_environment({}):
        path = client.download_artifacts(trial.run_id, "reports/trial.json")
    assert json.loads(Path(path).read_text(encoding="utf-8")) == report


def spools(run_root: Path) -> list[Path]:
    return list((run_root / "spool").glob("*.jsonl"))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and home of a server with authentication."""
    pytest.importorskip("flask_wtf", reason="needs Flask-WTF: pip install '.[tracker]'")
    home = tmp_path_factory.mktemp("guarded")
    with served("--auth", "true", home=home) as uri:
        yield uri, home


def test_a_call_without_credentials_is_rejected(
    guarded: tuple[str, Path], run_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import requests

    uri, home = guarded
    call = f"{uri}/api/2.0/mlflow/experiments/search"
    for credentials in (None, ("admin", "password1234"), ("nobody", "")):
        answer = requests.post(call, json={"max_results": 1}, auth=credentials, timeout=300)
        assert answer.status_code == 401, credentials
    assert requests.get(f"{uri}/", timeout=300).status_code == 401
    kept = home / "tracker"
    assert {path.name: path.stat().st_mode & 0o777 for path in kept.iterdir()} == {
        "auth.ini": 0o600,
        "admin-password": 0o600,
        "session-key": 0o600,
    }
    with pytest.raises(UserError, match="MLFLOW_TRACKING_USERNAME"):
        backend.setup_backend(uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    password = (kept / "admin-password").read_text().strip()
    assert password not in (home / "tracker.log").read_text()
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    where = TrackingConfig(uri=uri, system_metrics=False)
    with tracking.start_run("with a password", None, where) as run:
        run.metrics({"loss": 1.0}, 1)
        run.text("hello", "notes.txt")
        # A password that is changed meanwhile holds records up, and loses none.
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another one")
        run.metrics({"loss": 2.0}, 2)
        assert not run.flush()
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        assert run.flush()
    assert steps_of(run) == [(1, 1.0), (2, 2.0)]
    names = [each.path for each in backend.create_client(uri).list_artifacts(run.run_id)]
    assert names == ["notes.txt"]


def holders(folder: Path, secret: str) -> list[str]:
    """The files below a folder that hold a text, or are named by it."""
    found = []
    for path in folder.rglob("*"):
        in_file = path.is_file() and secret.encode() in path.read_bytes()
        if in_file or secret in path.name:
            found.append(str(path.relative_to(folder)))
    return sorted(found)


def test_no_file_no_parameter_and_no_output_of_a_run_holds_the_password(
    guarded: tuple[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri, server_home = guarded
    secret = (server_home / "tracker/admin-password").read_text().strip()
    tracker = SecretUri(uri.replace("://", f"://admin:{secret}@"))
    home = tmp_path / "runs"
    config = small_config(write_corpora(tmp_path / "data"), steps=6, log_every=1)
    config.model.vocab_size = 1200
    config.name, config.evaluate, config.tracking.register = "secretive", True, True
    path = tmp_path / "run.yaml"
    path.write_text(configuration.to_yaml(config), encoding="utf-8")
    monkeypatch.setenv("SKILLNET_HOME", str(home))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    capfd.readouterr()
    assert finetune.main(["--config", str(path), "--tracking.uri", tracker.reveal()]) == 0
    said = capfd.readouterr()
    assert secret not in said.out + said.err
    assert "other users of this machine can read command lines" in " ".join(said.err.split())
    assert holders(tmp_path, secret) == []
    assert f"uri: {tracker}" in (home / "secretive/config.yaml").read_text(encoding="utf-8")

    client = backend.create_client(tracker)
    run_id = configuration.load_yaml(home / "secretive/run.json")["run_id"]
    run = client.get_run(run_id)
    assert run.data.params["tracking.uri"] == str(tracker)
    assert secret not in repr(run.to_dictionary())
    for version in client.search_model_versions("name = 'skillnet'"):
        assert secret not in repr(dict(version))
    assert {"loss", "training/learning_rate"} & set(run.data.metrics)
    assert client.search_model_versions("name = 'skillnet'"), "the bundle is among the files"
    assert holders(server_home, secret) == ["tracker/admin-password"]
    # A URI from the written configuration needs the password again, and says so.
    capfd.readouterr()
    words = ["--config", str(home / "secretive/config.yaml"), "--run_dir", str(home)]
    assert finetune.main([*words, "--name", "again"]) == 2
    assert "Set MLFLOW_TRACKING_URI to the complete URI" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "Add --auth true"),
        (["--host", "192.0.2.1"], "Add --auth true"),
        (["--store", "http://127.0.0.1:1"], "give a database"),
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
