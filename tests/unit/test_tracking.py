"""Runs end the way they ended, and what they record survives an absent tracker."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from skillnet_platform import family, operations, serving, spool, store, tracking
from skillnet_platform.errors import UserError
from skillnet_platform.tracking import Tracker, TrackingConfig
from tests.ports import free_port

ROOT = Path(__file__).parents[2]


@dataclass
class Settings:
    steps: int = 10
    sizes: tuple[int, int] = (1, 2)
    nested: dict[str, str] = field(default_factory=lambda: {"文": "字"})


def where(experiment: str = "tests", uri: str | None = None) -> TrackingConfig:
    return TrackingConfig(uri=uri, experiment=experiment, system_metrics=False)


def run_of(tracker: Tracker) -> Any:
    return store.client(tracker.uri).get_run(tracker.run_id)


def history(tracker: Tracker, name: str) -> list[tuple[int, float]]:
    points = store.client(tracker.uri).get_metric_history(tracker.run_id, name)
    return sorted((point.step, point.value) for point in points)


def test_a_run_that_the_tracker_does_not_have_is_not_gone_on_with() -> None:
    with (
        pytest.raises(UserError, match=r"cannot go on with the run 0+ .* remove that file"),
        tracking.start("lost", None, where(), run_id="0" * 32),
    ):
        raise AssertionError("it went on")


@pytest.mark.parametrize("told", ["[]", "3", "{}", '{"run_id": 7}', '{"run_id": ""}', "{"])
def test_a_damaged_record_of_a_run_is_named(told: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert tracking.recorded(path) is None
    path.write_text('{"run_id": "abc"}')
    assert tracking.recorded(path) == "abc"
    path.write_text(told)
    with pytest.raises(UserError, match=r"run\.json"):
        tracking.recorded(path)


def test_a_run_records_what_made_it() -> None:
    manifest = {
        "digest": "ab" * 32,
        "splits": {"train": {"rows": 7}},
        "schema": {"text": "string"},
        "sources": [{"file": "x.zip", "sha256": "00"}],
        "quarantine": {"empty": 2},
    }
    with tracking.start(
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
    kept = Path(run.info.artifact_uri.removeprefix("file://"))
    assert json.loads((kept / "evaluation/headings.json").read_text()) == {"confusion": [[1, 2]]}
    assert "steps: 10" in (kept / "config.yaml").read_text()


def test_a_figure_is_kept_as_a_picture() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    with tracking.start("figure", None, where()) as tracker:
        tracker.figure(figure, "plots/loss.png")
    kept = Path(run_of(tracker).info.artifact_uri.removeprefix("file://")) / "plots/loss.png"
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
    with pytest.raises(type(problem)), tracking.start("ends", None, where()) as tracker:
        raise problem
    run = run_of(tracker)
    assert run.info.status == status
    assert run.data.tags.get("failure") == failure


def child(run_root: Path) -> "subprocess.Popen[str]":
    code = (
        "import time; from skillnet_platform import tracking\n"
        "where = tracking.TrackingConfig(system_metrics=False)\n"
        "with tracking.start('child', None, where) as tracker:\n"
        "    print(tracker.run_id, flush=True); time.sleep(60)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "platform"),
        "SKILLNET_HOME": str(run_root),
    }
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.integration
def test_no_run_of_an_ended_process_stays_running(run_root: Path) -> None:
    place = store.setup()
    ids = {}
    for name in (signal.SIGTERM, signal.SIGKILL):
        process = child(run_root)
        assert process.stdout is not None
        ids[name] = process.stdout.readline().strip()
        process.send_signal(name)
        process.wait(30)
        process.stdout.close()
    client = store.client(place.uri)
    assert client.get_run(ids[signal.SIGTERM]).info.status == "KILLED"
    assert client.get_run(ids[signal.SIGKILL]).info.status == "RUNNING"
    with tracking.start("next", None, TrackingConfig(system_metrics=False)) as tracker:
        closed = client.get_run(ids[signal.SIGKILL])
        assert closed.info.status == "KILLED"
        assert closed.data.tags["failure"] == "the process was killed"
        assert client.get_run(tracker.run_id).info.status == "RUNNING", "its own run goes on"


def test_rank_zero_writes_by_id_and_leaves_the_end_to_the_driver() -> None:
    with tracking.start("worker", None, where()) as tracker:
        Tracker.by_id(tracker.run_id, tracker.uri).metrics({"a/loss": 1.0}, step=5)
        assert run_of(tracker).info.status == "RUNNING"
    assert history(tracker, "a/loss") == [(5, 1.0)]


def test_a_resumed_run_goes_on_and_says_what_changed() -> None:
    with tracking.start("first", Settings(), where()) as first:
        first.metrics({"loss": 2.0}, step=1)
    with tracking.start("again", Settings(steps=20), where(), run_id=first.run_id) as second:
        second.metrics({"loss": 1.0}, step=2)
    run = run_of(first)
    assert second.run_id == first.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params["steps"] == "10"
    assert run.data.tags["changed.steps"] == "20"
    assert history(first, "loss") == [(1, 2.0), (2, 1.0)]


def test_children_stand_below_their_parent() -> None:
    with (
        tracking.start("sweep", None, where()) as parent,
        tracking.start("trial", None, where(), parent=parent.run_id) as trial,
    ):
        pass
    assert run_of(trial).data.tags["mlflow.parentRunId"] == parent.run_id


def test_the_machine_is_recorded_along() -> None:
    config = TrackingConfig(experiment="tests", system_metrics=True)
    with tracking.start("system", None, config) as tracker:
        pass
    assert run_of(tracker).data.metrics["system/system_memory_usage_megabytes"] > 0


def test_very_long_values_are_shortened_not_lost_runs() -> None:
    with tracking.start("long", {"a": "x" * 9000}, where(), tags={"b": "y" * 9000}) as tracker:
        pass
    run = run_of(tracker)
    assert len(run.data.params["a"]) == tracking.LONGEST_PARAMETER
    assert len(run.data.tags["b"]) == tracking.LONGEST_TAG


@pytest.mark.parametrize("uri", ["file:///tmp/runs", "./mlruns"])
def test_file_stores_are_refused(uri: str) -> None:
    with pytest.raises(UserError, match="no longer keeps runs in plain files"):
        store.resolve_uri(uri)


def test_the_default_store_is_in_the_run_root(
    run_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.resolve_uri() == f"sqlite:///{run_root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9/")
    assert store.resolve_uri() == "http://127.0.0.1:9"
    assert store.resolve_uri("sqlite:////x/y.db") == "sqlite:////x/y.db"


def test_a_server_that_is_not_there_is_said_at_the_start() -> None:
    started = time.monotonic()
    with (
        pytest.raises(UserError, match="no MLflow server answers there"),
        tracking.start("x", None, where(uri=f"http://127.0.0.1:{free_port()}")),
    ):
        pass
    assert time.monotonic() - started < 10


def test_a_deleted_experiment_is_named() -> None:
    place = store.setup(experiment="deleted")
    store.client(place.uri).delete_experiment(place.experiment_id)
    with pytest.raises(UserError, match="'deleted' was deleted"):
        store.setup(experiment="deleted")


@pytest.mark.integration
def test_many_processes_may_meet_an_empty_store(run_root: Path) -> None:
    code = "from skillnet_platform import store; print(store.setup().experiment_id)"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "platform"),
        "SKILLNET_HOME": str(run_root),
    }
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    answers = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 3
    assert len(answers) == 1


@contextlib.contextmanager
def server(database: Path, port: int) -> Iterator[str]:
    """A real MLflow server for the length of a block; then killed, not asked."""
    process = serving.start(
        f"sqlite:///{database}",
        "127.0.0.1",
        port,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(UserError):
                store.require_answer(uri)
                break
            time.sleep(0.2)
        yield uri
    finally:
        family.end(process, patience=0)


@pytest.mark.integration
def test_a_run_outlives_its_tracker_and_nothing_is_lost(
    run_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    database = run_root / "server.db"
    with contextlib.ExitStack() as stack:
        with server(database, port) as uri:
            tracker = stack.enter_context(tracking.start("spooled", None, where(uri=uri)))
            left = Tracker.by_id(tracker.run_id, uri)
            tracker.metrics({"loss": 0.0}, step=0)
        started = time.monotonic()
        for step in range(1, 200):
            tracker.metrics({"loss": float(step)}, step)
        tracker.text("kept", "notes.txt")
        left.metrics({"other": 1.0}, step=1)
        took = time.monotonic() - started
        assert took < 15, f"an absent tracker held the run up for {took:.0f} s"
        assert "does not answer" in capsys.readouterr().err
        # As if that process had ended: the next start of a run sends what it left.
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        (path,) = [p for p in spool.spool_root().glob("*.jsonl") if '"other"' in p.read_text()]
        path.rename(str(path).replace(f".{os.getpid()}-", f".{ended.pid}-"))
        with server(database, port):
            assert tracker.flush()
            assert tracker.flush()
            assert history(tracker, "loss") == [(step, float(step)) for step in range(200)]
            artifacts = store.client(uri).list_artifacts(tracker.run_id)
            assert "notes.txt" in [each.path for each in artifacts]
            assert tracking.send_left_behind(uri) == 1
            assert history(tracker, "other") == [(1, 1.0)]
            assert list(spool.spool_root().glob("*.jsonl")) == []
            stack.close()
            assert run_of(tracker).info.status == "FINISHED"


def test_a_busy_tracker_gets_time_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    apply, refused = operations.apply, 0

    def busy(client: Any, run_id: str, operation: spool.Operation) -> None:
        nonlocal refused
        if operation["kind"] == "end" and refused < 3:
            refused += 1
            raise ConnectionError("Read timed out.")
        apply(client, run_id, operation)

    monkeypatch.setattr(operations, "apply", busy)
    monkeypatch.setattr(tracking, "SETTLE_PAUSE_S", 0.01)
    with tracking.start("busy", None, where()) as tracker:
        tracker.metrics({"loss": 1.0}, step=1)
    assert refused == 3
    assert run_of(tracker).info.status == "FINISHED"
    assert list(spool.spool_root().glob(f"{tracker.run_id}.*")) == []

    # No longer than it is told to; what is left then waits for the next run.
    refused = 0
    monkeypatch.setattr(tracking, "END_PATIENCE_S", 0.0)
    with tracking.start("busier", None, where()) as tracker:
        pass
    assert run_of(tracker).info.status == "RUNNING"
    assert len(list(spool.spool_root().glob(f"{tracker.run_id}.*"))) == 1
    assert tracker.settle(0.0)
    assert run_of(tracker).info.status == "FINISHED"


def test_a_spool_cut_short_by_a_kill_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"run_id": "r", "uri": "u"}\n{"kind": "tags", "values": {}}\n{"kind": "me')
    assert spool.read(path) == ("r", [{"kind": "tags", "values": {}}])


def test_a_broken_line_costs_itself_only(tmp_path: Path) -> None:
    path, note = tmp_path / "x.jsonl", {"kind": "tags", "values": {"note": "one\u2028two\x85"}}
    lines = ['{"run_id": "r", "uri": "u"}', '{"kind": "me', json.dumps(note, ensure_ascii=False)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert spool.read(path) == ("r", [note])


def dead_process() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


@pytest.mark.parametrize("text", ["", '{"run_id": "r", "ur', "[]\n", "\x80"])
def test_a_spool_without_a_first_line_is_set_aside(
    text: str, run_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = spool.spool_root()
    folder.mkdir()
    name = f"{spool._host()}.{dead_process()}-0"
    (folder / f"broken.{name}.jsonl").write_bytes(text.encode("latin-1"))
    (folder / f"whole.{name}.jsonl").write_text('{"run_id": "whole", "uri": "u"}\n')
    (folder / "not-ours.jsonl").touch()
    assert [path.name for path in spool.left_behind("u")] == [f"whole.{name}.jsonl"]
    assert (folder / f"broken.{name}.unreadable").read_bytes() == text.encode("latin-1")
    assert f"broken.{name}.jsonl" in capsys.readouterr().err
    assert spool.left_behind("other") == []
    assert capsys.readouterr().err == "", "said once"


def test_a_full_disk_leaves_no_half_line(run_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(operation: spool.Operation) -> None:
        raise ConnectionError("away")

    def full(*arguments: Any) -> Any:
        yield
        raise UserError("the disk is full")

    kept = spool.Spool("r", "sqlite:///x.db", away)
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(spool.storage, "disk_guard", contextlib.contextmanager(full))
        kept.send({"kind": "tags", "values": {"a": "1"}})
    assert kept.path.read_text() == ""
    kept.send({"kind": "tags", "values": {"b": "2"}})
    assert spool.read(kept.path) == ("r", [{"kind": "tags", "values": {"b": "2"}}])


class Server:
    """Stands for a tracker: takes records, but some of them, or none while it is away."""

    def __init__(self) -> None:
        self.there, self.taken = False, dict[str, None]()

    def __call__(self, operation: spool.Operation) -> None:
        name = operation.get("name") or operation["path"]
        if not self.there or "bad" in name:
            problem = RuntimeError("too many 500 error responses")
            problem.error_code = "INTERNAL_ERROR"  # type: ignore[attr-defined]
            raise problem
        self.taken[name] = None


def test_a_record_that_always_fails_holds_up_no_other(
    run_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spool, "DOUBT_PAUSES_S", (0.0, 0.0))
    server = Server()
    kept = spool.Spool("r", "sqlite:///x.db", server)
    (run_root / "bad.txt").write_text("bytes that the server cannot take")
    kept.send({"kind": "tags", "name": "first"})
    kept.send({"kind": "artifact", "path": str(run_root / "bad.txt"), "folder": "notes"})
    kept.send({"kind": "tags", "name": "bad tags"})
    for _ in range(3):  # a tracker that is away takes nothing, and nothing is lost
        assert not kept.flush()
    assert (len(kept), kept.rejected) == (3, 0)
    # The last one that waits has no other to be held against.
    server.there = True
    assert not kept.flush()
    assert (list(server.taken), len(kept), kept.rejected) == (["first"], 2, 0)
    kept.send({"kind": "tags", "name": "last"})
    assert kept.flush()
    assert (list(server.taken), kept.rejected) == (["first", "last"], 2)
    aside = kept.path.with_suffix(".rejected")
    notes, tags = [json.loads(line) for line in aside.read_text().splitlines()]
    assert tags["name"] == "bad tags"
    assert Path(notes["path"]).read_text() == "bytes that the server cannot take"
    said = capsys.readouterr().err
    assert f"fails at tags: too many 500 error responses; it is set aside in {aside} (2 so" in said
    assert not kept.path.exists()


def test_a_refused_record_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    with tracking.start("refused", None, where()) as tracker:
        tracker.metrics({"bad name!\n": 1.0}, step=1)
        tracker.metrics({"good": 1.0}, step=1)
    assert "the tracker refused metrics" in capsys.readouterr().err
    assert run_of(tracker).info.status == "FINISHED"
    assert history(tracker, "good") == [(1, 1.0)]
