"""Faults to order happen where and when they were ordered, once; a notice to leave is heard."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.training import fault_injection, preemption
from skillnet_platform.errors import UserError


def ordered(
    monkeypatch: pytest.MonkeyPatch, run: Path, rank: int, *each: dict[str, object]
) -> fault_injection.Faults | None:
    monkeypatch.setenv(fault_injection.VARIABLE, json.dumps(each))
    return fault_injection.ordered(run, rank)


def test_nothing_is_done_unless_it_is_ordered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(fault_injection.VARIABLE, raising=False)
    assert fault_injection.ordered(tmp_path, 0) is None
    assert fault_injection.environment() == {}


def test_a_fault_happens_once_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = {"rank": 1, "step": 3, "kind": "raise"}
    other = ordered(monkeypatch, tmp_path, 0, fault)
    mine = ordered(monkeypatch, tmp_path, 1, fault)
    assert other is not None
    assert mine is not None
    for step in range(5):
        other.at(step)
    mine.at(2)
    with pytest.raises(RuntimeError, match="after step 3"):
        mine.at(3)
    mine.at(3)
    again = ordered(monkeypatch, tmp_path, 1, fault)
    assert again is not None
    again.at(3)
    fresh = ordered(monkeypatch, tmp_path / "another", 1, fault)
    assert fresh is not None
    with pytest.raises(RuntimeError):
        fresh.at(3)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("{", "SKILLNET_FAULTS"),
        ('{"step": 1, "kind": "kil"}', "kil"),
        ('{"step": 1, "kind": "kill", "victim": "me"}', "victim 'me'"),
        ('{"step": 1, "kind": "kill", "when": 2}', "when"),
        ("[1]", "SKILLNET_FAULTS"),
    ],
)
def test_what_is_no_fault_is_refused(
    told: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fault_injection.VARIABLE, told)
    with pytest.raises(UserError, match=said):
        fault_injection.ordered(tmp_path, 0)


def test_one_bit_of_the_newest_checkpoint_is_turned_over(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "a").write_bytes(bytes(10))
        (folder / "b").write_bytes(bytes(30))
    path, position = fault_injection.flip_bit(tmp_path, 0.5)
    assert (path, position) == (tmp_path / "step-00000002" / "b", 10)
    content = path.read_bytes()
    assert len(content) == 30
    assert bin(int.from_bytes(content)).count("1") == 1
    assert content[10]
    assert not any((tmp_path / "step-00000001" / "b").read_bytes())


def test_a_large_disk_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_injection, "LARGEST_DISK", 0)
    with pytest.raises(UserError, match="fill only a disk of less"):
        fault_injection.fill_disk(tmp_path)


def test_a_signal_is_a_notice_and_the_second_one_ends(tmp_path: Path) -> None:
    file = tmp_path / preemption.FILE
    file.touch()  # of a run before this one
    with preemption.listen_in_driver(preemption.FileStopSignal(file)):
        assert not preemption.stop_requested()
        assert not file.exists()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.stop_requested()
        wait_until(file.exists)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert not preemption.stop_requested()
    assert not file.exists()


def test_the_drivers_file_is_a_notice(tmp_path: Path) -> None:
    file = tmp_path / preemption.FILE
    with preemption.listen_in_driver(), preemption.watch_stop_signal(preemption.FileStopSignal(file)):
        assert not preemption.stop_requested()
        file.touch()
        wait_until(preemption.stop_requested)


def wait_until(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not there():
        assert time.monotonic() < end
        time.sleep(0.01)


class Unreachable:
    """A sign in a store that is away."""

    def set(self) -> None:
        raise ConnectionError("the head does not answer")

    def clear(self) -> None:
        pass

    def is_set(self) -> bool:
        raise ConnectionError("the head does not answer")


def test_workers_that_cannot_be_told_are_spoken_of(capsys: pytest.CaptureFixture[str]) -> None:
    with preemption.listen_in_driver(Unreachable()), preemption.watch_stop_signal(Unreachable()):
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.stop_requested()
    assert "could not be told to leave (the head does not answer)" in capsys.readouterr().err


def test_ctrl_c_is_ours_again_after_a_fit() -> None:
    before = signal.getsignal(signal.SIGINT)
    with preemption.listen_in_driver():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is before
