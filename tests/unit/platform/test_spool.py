"""What runs record survives a tracker that is away, busy, or refuses it."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from skillnet_platform.errors import UserError
from skillnet_platform.tracking import Tracker, backend, spool
from skillnet_platform.tracking import run as tracking_run
from tests.helpers.processes import start_python
from tests.helpers.tracked_runs import history, run_of, where


def test_a_run_outlives_its_tracker_and_nothing_is_lost(
    run_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In test_tracker_away.py a server goes away."""
    monkeypatch.setattr(spool, "FIRST_PAUSE_S", 3600.0)
    apply, asked, is_away = spool.apply_operation, 0, False

    def answer(client: Any, run_id: str, operation: spool.Operation) -> None:
        nonlocal asked
        asked += 1
        if is_away:
            raise ConnectionError("no answer")
        apply(client, run_id, operation)

    monkeypatch.setattr(spool, "apply_operation", answer)
    with tracking_run.start_run("spooled", None, where()) as tracker:
        left = Tracker(tracker.run_id, tracker.uri)
        tracker.metrics({"loss": 0.0}, step=0)
        is_away, asked = True, 0
        for step in range(1, 50):
            tracker.metrics({"loss": float(step)}, step)
        tracker.text("kept", "notes.txt")
        left.metrics({"other": 1.0}, step=1)
        assert asked == 2, "each of the two asks an absent tracker once, not for each record"
        assert "does not answer" in capsys.readouterr().err
        # As if that process had ended: the next start of a run sends what it left.
        ended = dead_process()
        (path,) = [p for p in spool.spool_root().glob("*.jsonl") if '"other"' in p.read_text()]
        path.rename(str(path).replace(f".{os.getpid()}-", f".{ended}-"))
        is_away = False
        assert tracker.flush()
        assert tracker.flush()
        assert history(tracker, "loss") == [(step, float(step)) for step in range(50)]
        artifacts = backend.create_client(tracker.uri).list_artifacts(tracker.run_id)
        assert "notes.txt" in [each.path for each in artifacts]
        assert tracking_run.send_leftover_spools(tracker.uri) == 1
        assert history(tracker, "other") == [(1, 1.0)]
        assert list(spool.spool_root().glob("*.jsonl")) == []
    assert run_of(tracker).info.status == "FINISHED"


def test_a_busy_tracker_gets_time_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    apply, refused = spool.apply_operation, 0

    def busy(client: Any, run_id: str, operation: spool.Operation) -> None:
        nonlocal refused
        if operation["kind"] == "end" and refused < 3:
            refused += 1
            raise ConnectionError("Read timed out.")
        apply(client, run_id, operation)

    monkeypatch.setattr(spool, "apply_operation", busy)
    monkeypatch.setattr(tracking_run, "SETTLE_PAUSE_S", 0.01)
    with tracking_run.start_run("busy", None, where()) as tracker:
        tracker.metrics({"loss": 1.0}, step=1)
    assert refused == 3
    assert run_of(tracker).info.status == "FINISHED"
    assert list(spool.spool_root().glob(f"{tracker.run_id}.*")) == []

    # No longer than its limit; the remaining records wait for the next run.
    refused = 0
    monkeypatch.setattr(tracking_run, "END_PATIENCE_S", 0.0)
    with tracking_run.start_run("busier", None, where()) as tracker:
        pass
    assert run_of(tracker).info.status == "RUNNING"
    assert len(list(spool.spool_root().glob(f"{tracker.run_id}.*"))) == 1
    assert tracker.settle(0.0)
    assert run_of(tracker).info.status == "FINISHED"


def test_a_broken_line_and_one_cut_short_by_a_kill_cost_themselves_only(tmp_path: Path) -> None:
    path, note = tmp_path / "x.jsonl", {"kind": "tags", "values": {"note": "one\u2028two\x85"}}
    lines = ['{"run_id": "r", "uri": "u"}', '{"kind": "me', json.dumps(note, ensure_ascii=False)]
    path.write_text("\n".join([*lines, '{"kind": "me']), encoding="utf-8")
    assert spool.read_spool(path) == ("r", [note])


def dead_process() -> int:
    with start_python("-c", "") as ended:
        return ended.pid


@pytest.mark.parametrize("text", ["", '{"run_id": "r", "ur', "[]\n", "\x80"])
def test_a_spool_without_a_first_line_is_quarantined(
    text: str, run_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = spool.spool_root()
    folder.mkdir()
    name = f"{spool._host()}.{dead_process()}-0"
    (folder / f"broken.{name}.jsonl").write_bytes(text.encode("latin-1"))
    (folder / f"whole.{name}.jsonl").write_text('{"run_id": "whole", "uri": "u"}\n')
    (folder / "not-ours.jsonl").touch()
    assert [path.name for path in spool.find_leftover_spools("u")] == [f"whole.{name}.jsonl"]
    assert (folder / f"broken.{name}.unreadable").read_bytes() == text.encode("latin-1")
    assert f"broken.{name}.jsonl" in capsys.readouterr().err
    assert spool.find_leftover_spools("other") == []
    assert capsys.readouterr().err == "", "said once"


def test_the_spool_of_a_container_with_the_same_host_name_waits_until_it_is_old(
    run_root: Path,
) -> None:
    folder = spool.spool_root()
    folder.mkdir()
    host = spool._host().rpartition("~")[0]
    # The number of a process in another PID namespace says nothing here.
    path = folder / f"run.{host}~00000000.{dead_process()}-0.jsonl"
    path.write_text('{"run_id": "run", "uri": "u"}\n')
    assert spool.find_leftover_spools("u") == []
    old = time.time() - spool.UNSEEN_AGE_S - 1
    os.utime(path, (old, old))
    assert spool.find_leftover_spools("u") == [path]
    path.rename(other := folder / f"run.another-{host}~00000000.1-0.jsonl")
    assert spool.find_leftover_spools("u") == [], other


def test_a_full_disk_leaves_no_half_line(run_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(operation: spool.Operation) -> None:
        raise ConnectionError("away")

    def full(*arguments: Any) -> Any:
        yield
        raise UserError("the disk is full")

    kept = spool.OperationSpool("r", "sqlite:///x.db", away)
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(spool.storage, "disk_guard", contextlib.contextmanager(full))
        kept.send({"kind": "tags", "values": {"a": "1"}})
    assert kept.path.read_text() == ""
    kept.send({"kind": "tags", "values": {"b": "2"}})
    assert spool.read_spool(kept.path) == ("r", [{"kind": "tags", "values": {"b": "2"}}])


class StandIn:
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
    server = StandIn()
    kept = spool.OperationSpool("r", "sqlite:///x.db", server)
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
    assert f"fails at tags: too many 500 error responses; it was written to {aside} (2 so" in said
    assert not kept.path.exists()


def test_a_refused_record_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    with tracking_run.start_run("refused", None, where()) as tracker:
        tracker.metrics({"bad name!\n": 1.0}, step=1)
        tracker.metrics({"good": 1.0}, step=1)
    assert "the tracker refused metrics" in capsys.readouterr().err
    assert run_of(tracker).info.status == "FINISHED"
    assert history(tracker, "good") == [(1, 1.0)]
