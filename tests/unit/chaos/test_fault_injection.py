"""Fault injection happens at the given rank and step, and once in a run."""

import json
from pathlib import Path

import pytest

from skillnet_platform.errors import UserError
from tests.chaos import fault_injection


def started(run: Path, rank: int, *faults: dict[str, object]) -> fault_injection.FaultInjection:
    """The callback of a rank after the start of its training."""
    callback = fault_injection.FaultInjection(fault_injection.parse_faults(json.dumps(faults)))
    callback.on_train_start(run, rank)
    return callback


def test_no_variable_means_no_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fault_injection.VARIABLE, raising=False)
    assert fault_injection.faults_of_environment() == []
    monkeypatch.setenv(fault_injection.VARIABLE, '{"step": 1, "kind": "kill"}')
    assert len(fault_injection.faults_of_environment()) == 1


def test_fault_happens_once_in_a_run(tmp_path: Path) -> None:
    fault: dict[str, object] = {"rank": 1, "step": 3, "kind": "raise"}
    other, mine = started(tmp_path, 0, fault), started(tmp_path, 1, fault)
    for step in range(5):
        other.on_step_start(step)
    mine.on_step_start(2)
    with pytest.raises(RuntimeError, match="after step 3"):
        mine.on_step_start(3)
    mine.on_step_start(3)
    started(tmp_path, 1, fault).on_step_start(3)
    with pytest.raises(RuntimeError):
        started(tmp_path / "another", 1, fault).on_step_start(3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "SKILLNET_FAULTS"),
        ('{"step": 1, "kind": "kil"}', "kil"),
        ('{"step": 1, "kind": "kill", "victim": "me"}', "victim 'me'"),
        ('{"step": 1, "kind": "kill", "when": 2}', "when"),
        ("[1]", "SKILLNET_FAULTS"),
    ],
)
def test_invalid_fault_is_rejected(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fault_injection.parse_faults(text)


def test_one_bit_of_the_newest_checkpoint_is_inverted(tmp_path: Path) -> None:
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


def test_large_disk_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_injection, "LARGEST_DISK", 0)
    with pytest.raises(UserError, match="fill only a disk of less"):
        fault_injection.fill_disk(tmp_path)
