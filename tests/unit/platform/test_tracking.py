"""Runs record what made them, and end the way they ended."""

import json
import os
import signal
import sqlite3
import time
from dataclasses import dataclass, field
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from sqlalchemy import create_engine

from skillnet_platform import tracking
from skillnet_platform.errors import UserError
from skillnet_platform.tracking import Tracker, TrackingConfig, backend
from skillnet_platform.tracking.spool import OperationSpool
from tests.helpers.ports import free_port
from tests.helpers.processes import fork_context
from tests.helpers.tracked_runs import artifacts_of, history, run_of, where


@dataclass
class Settings:
    steps: int = 10
    sizes: tuple[int, int] = (1, 2)
    nested: dict[str, str] = field(default_factory=lambda: {"文": "字"})


def test_a_run_that_the_tracker_does_not_have_is_not_resumed(tmp_path: Path) -> None:
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"run_id": "0" * 32}))
    with (
        pytest.raises(UserError, match=r"cannot resume the run 0+.* remove that file"),
        tracking.start_run("lost", None, where(), record=record),
    ):
        raise AssertionError("it continued")


@pytest.mark.parametrize("reported", ["[]", "3", "{}", '{"run_id": 7}', '{"run_id": ""}', "{"])
def test_a_damaged_record_of_a_run_is_named(reported: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert tracking.read_run_id(path) is None
    path.write_text('{"run_id": "abc"}')
    assert tracking.read_run_id(path) == "abc"
    path.write_text(reported)
    with pytest.raises(UserError, match=r"run\.json"):
        tracking.read_run_id(path)


def test_a_run_records_what_made_it() -> None:
    manifest = {
        "digest": "ab" * 32,
        "splits": {"train": {"rows": 7}},
        "schema": {"text": "string"},
        "sources": [{"file": "x.zip", "sha256": "00"}],
        "quarantine": {"empty": 2},
    }
    with tracking.start_run(
        "my run", Settings(), where(), tags={"seed": 3}, description="**what** it is"
    ) as tracker:
        tracker.metrics({"text_to_image/loss": 2.0, "lr": 1e-3}, step=1)
        tracker.metrics({"text_to_image/loss": 1.0}, step=2)
        tracker.inputs({"headings": manifest})
        tracker.dict({"confusion": [[1, 2]]}, "evaluation/headings.json")
        tracker.text("hello", "notes.txt")
    run = run_of(tracker)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "my run"
    assert run.data.tags["seed"] == "3"
    assert run.data.tags["mlflow.note.content"] == "**what** it is"
    assert run.data.params == {"steps": "10", "sizes": "[1, 2]", "nested.文": "字"}
    assert history(tracker, "text_to_image/loss") == [(1, 2.0), (2, 1.0)]
    (given,) = run.inputs.dataset_inputs
    assert given.dataset.name == "headings"
    assert manifest["digest"].startswith(given.dataset.digest)  # type: ignore[attr-defined]
    assert json.loads(given.dataset.profile)["rows"] == {"train": 7}
    assert run.data.tags["corpus.headings"] == manifest["digest"]
    kept = artifacts_of(tracker)
    assert json.loads((kept / "evaluation/headings.json").read_text()) == {"confusion": [[1, 2]]}
    assert "steps: 10" in (kept / "config.yaml").read_text()


def test_a_figure_is_kept_as_a_picture() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    with tracking.start_run("figure", None, where()) as tracker:
        tracker.figure(figure, "plots/loss.png")
    kept = artifacts_of(tracker) / "plots/loss.png"
    assert kept.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("problem", "status", "failure"),
    [
        (RuntimeError("loss is nan at step 7"), "FAILED", "RuntimeError: loss is nan at step 7"),
        (UserError("no such corpus"), "FAILED", "UserError: no such corpus"),
        (KeyboardInterrupt(), "KILLED", None),
        (SystemExit(1), "FAILED", None),
        (SystemExit(0), "FINISHED", None),
    ],
)
def test_a_run_ends_as_it_ended(problem: BaseException, status: str, failure: str | None) -> None:
    with pytest.raises(type(problem)), tracking.start_run("ends", None, where()) as tracker:
        raise problem
    run = run_of(tracker)
    assert run.info.status == status
    assert run.data.tags.get("failure") == failure


def record_until_killed(root: Path, opened: "SimpleQueue[str]") -> None:
    os.environ["SKILLNET_HOME"] = str(root)
    with tracking.start_run("child", None, TrackingConfig(system_metrics=False)) as tracker:
        opened.put(tracker.run_id)
        # A signal that comes just before a sleep is handled after it, so each sleep is short.
        while True:
            time.sleep(0.1)


@pytest.mark.integration
def test_no_run_of_an_ended_process_stays_running(run_root: Path) -> None:
    place = backend.setup_backend()
    ids = {}
    forks = fork_context()
    opened = forks.SimpleQueue()
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
        process = forks.Process(target=record_until_killed, args=(run_root, opened))
        process.start()
        ids[name] = opened.get()
        assert process.pid is not None
        os.kill(process.pid, name)
        process.join(300)
        assert not process.is_alive()
    client = backend.create_client(place.uri)
    assert client.get_run(ids[signal.SIGTERM]).info.status == "KILLED"
    assert client.get_run(ids[signal.SIGHUP]).info.status == "KILLED"
    assert client.get_run(ids[signal.SIGKILL]).info.status == "RUNNING"
    with tracking.start_run("next", None, TrackingConfig(system_metrics=False)) as tracker:
        closed = client.get_run(ids[signal.SIGKILL])
        assert closed.info.status == "KILLED"
        assert closed.data.tags["failure"] == "the process was killed"
        assert client.get_run(tracker.run_id).info.status == "RUNNING", "its own run continues"


def test_rank_zero_writes_by_id_and_leaves_the_end_to_the_driver() -> None:
    with tracking.start_run("worker", None, where()) as tracker:
        Tracker(tracker.run_id, tracker.uri).metrics({"a/loss": 1.0}, step=5)
        assert run_of(tracker).info.status == "RUNNING"
    assert history(tracker, "a/loss") == [(5, 1.0)]


def test_a_resumed_run_continues_and_says_what_changed(tmp_path: Path) -> None:
    record = tmp_path / "run.json"
    with tracking.start_run("first", Settings(), where(), record=record) as first:
        first.metrics({"loss": 2.0}, step=1)
    with tracking.start_run("again", Settings(steps=20), where(), record=record) as second:
        second.metrics({"loss": 1.0}, step=2)
    run = run_of(first)
    assert second.run_id == first.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params["steps"] == "10"
    assert run.data.tags["changed.steps"] == "20"
    assert history(first, "loss") == [(1, 2.0), (2, 1.0)]


def test_a_resumed_run_removes_what_a_killed_upload_left(tmp_path: Path) -> None:
    record = tmp_path / "run.json"
    with tracking.start_run("first", None, where(), record=record) as first:
        first.text("whole", "folder/kept.txt")
    folder = artifacts_of(first) / "folder"
    # As a kill does it: MLflow has written its own file and not renamed it.
    staging, partial, _ = LocalArtifactRepository(str(folder))._create_staging_artifact("lost.txt")
    os.close(staging)
    with tracking.start_run("again", None, where(), record=record):
        pass
    assert not Path(partial).exists()
    assert [path.name for path in folder.iterdir()] == ["kept.txt"]


def test_children_stand_below_their_parent() -> None:
    with (
        tracking.start_run("sweep", None, where()) as parent,
        tracking.start_run("trial", None, where(), parent=parent.run_id) as trial,
    ):
        pass
    assert run_of(trial).data.tags["mlflow.parentRunId"] == parent.run_id


def test_the_machine_is_recorded_along() -> None:
    config = TrackingConfig(experiment="tests", system_metrics=True)
    with tracking.start_run("system", None, config) as tracker:
        pass
    assert run_of(tracker).data.metrics["system/system_memory_usage_megabytes"] > 0


def test_a_full_disk_ends_the_measurement_of_the_machine_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def send(spool: OperationSpool, operation: dict[str, object]) -> None:
        raise UserError("spool.jsonl: the disk is full (0 bytes free)")

    config = TrackingConfig(experiment="tests", system_metrics=True)
    with (
        pytest.raises(UserError, match="the disk is full"),
        tracking.start_run("full", None, config) as tracker,
    ):
        monkeypatch.setattr(OperationSpool, "send", send)
        tracker.metrics({"loss": 1.0}, 1)
    shown = capsys.readouterr().err
    assert shown.count("system metrics end: spool.jsonl: the disk is full") == 1
    assert "Traceback" not in shown


def test_very_long_values_are_shortened_not_lost_runs() -> None:
    with tracking.start_run("long", {"a": "x" * 9000}, where(), tags={"b": "y" * 9000}) as tracker:
        pass
    run = run_of(tracker)
    assert len(run.data.params["a"]) == tracking.LONGEST_PARAMETER
    assert len(run.data.tags["b"]) == tracking.LONGEST_TAG


@pytest.mark.parametrize("uri", ["file:///tmp/runs", "./mlruns"])
def test_file_stores_are_refused(uri: str) -> None:
    with pytest.raises(UserError, match="no longer keeps runs in plain files"):
        backend.resolve_uri(uri)


def test_the_default_store_is_in_the_run_root(
    run_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert backend.resolve_uri() == f"sqlite:///{run_root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9/")
    assert backend.resolve_uri() == "http://127.0.0.1:9"
    assert backend.resolve_uri("sqlite:////x/y.db") == "sqlite:////x/y.db"


@pytest.mark.parametrize("name", ["50%25 of", "a?b=c", "a#b", "a b", "文字 ü", "a@b:c", "a+b&c"])
def test_every_name_of_a_folder_may_hold_the_database(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "roots" / name
    monkeypatch.setenv("SKILLNET_HOME", str(root))
    uri = backend.resolve_uri()
    assert backend.resolve_uri(uri) == uri
    assert backend.sqlite_path(uri) == root / "mlflow.db"
    root.mkdir(parents=True)
    # SQLAlchemy and MLflow make what they misread beside the folder.
    create_engine(uri.reveal()).connect().close()
    assert [path.name for path in root.iterdir()] == ["mlflow.db"]
    assert list(root.parent.iterdir()) == [root]


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("sqlite:////tmp/a?b/x.db", "Write %3F"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite://tmp/x.db", "names no file"),
    ],
)
def test_a_uri_that_names_no_database_file_is_refused(uri: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        backend.resolve_uri(uri)


def test_a_server_that_is_not_there_is_said_at_the_start() -> None:
    with (
        pytest.raises(UserError, match="no MLflow server answers there"),
        tracking.start_run("x", None, where(uri=f"http://127.0.0.1:{free_port()}")),
    ):
        pass


def test_a_deleted_experiment_is_named() -> None:
    place = backend.setup_backend(experiment="deleted")
    backend.create_client(place.uri).delete_experiment(place.experiment_id)
    with pytest.raises(UserError, match="'deleted' was deleted"):
        backend.setup_backend(experiment="deleted")


def find_experiment(root: Path, answers: "SimpleQueue[str]") -> None:
    os.environ["SKILLNET_HOME"] = str(root)
    answers.put(backend.setup_backend().experiment_id)


@pytest.mark.integration
def test_two_processes_may_meet_an_empty_store(run_root: Path) -> None:
    (run_root / "mlflow.db").unlink()
    forks = fork_context()
    answers = forks.SimpleQueue()
    processes = [forks.Process(target=find_experiment, args=(run_root, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert answers.get() == answers.get()


def test_an_error_of_the_database_is_raised_without_a_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A table that is gone, in place of a disk that is full: both end the same call."""
    uri = backend.sqlite_uri(tmp_path / "mlflow.db")
    backend.setup_backend(uri)
    client = backend.create_client(uri)
    run = client.create_run("0")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("DROP TABLE params")
    with pytest.raises(MlflowException, match="no such table"):
        client.log_param(run.info.run_id, "steps", 1)
    assert "Traceback" not in capfd.readouterr().err
