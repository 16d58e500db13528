"""A command dies at the event that a crash test names, for every library that writes files."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.chaos.crash_lane import choose_events, choose_kinds, describe_difference
from tests.chaos.crash_points import CrashLab, FileEvent, crash_lab, missing_compiler
from tests.helpers.waiting import wait_until

MODULES = ("numpy", "pyarrow", "safetensors.numpy", "sqlite3", "tests.unit.chaos.file_writers")
WRITERS = "tests.unit.chaos.file_writers"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrashLab]:
    if reason := missing_compiler():
        pytest.skip(reason)
    with crash_lab(tmp_path_factory.mktemp("lab"), MODULES) as made:
        yield made


@pytest.fixture
def root(lab: CrashLab) -> Path:
    shutil.rmtree(lab.root, ignore_errors=True)
    lab.root.mkdir()
    return lab.root


@pytest.mark.parametrize(
    ("writer", "kinds"),
    [
        ("python", {"mkdir", "create", "write", "fsync", "rename", "unlink"}),
        ("copies", {"create", "write"}),
        ("arrow", {"create", "write"}),
        ("safetensors", {"create", "write"}),
        ("sqlite", {"create", "write", "fsync", "unlink"}),
        ("processes", {"create", "write"}),
    ],
)
def test_events_of_every_library_are_seen(
    lab: CrashLab, root: Path, writer: str, kinds: set[str]
) -> None:
    end = lab.run([WRITERS, writer])
    assert end.code == 0, end.output
    assert kinds <= {event.kind for event in end.events}
    assert [event.number for event in end.events] == list(range(1, len(end.events) + 1))
    assert lab.run([WRITERS, "elsewhere"]).events == [], "files outside the root do not count"


def test_each_event_is_the_last_of_a_killed_command(lab: CrashLab, root: Path) -> None:
    undisturbed = lab.run([WRITERS, "python"]).events
    for number, event in enumerate(undisturbed, start=1):
        for path in sorted(root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        end = lab.run([WRITERS, "python"], kill_at=number)
        assert end.code == -9
        assert end.events == undisturbed[:number]
        renamed = any(e.kind == "rename" for e in undisturbed[: number - 1])
        assert (root / "folder" / "final").exists() == renamed, event
    assert lab.run([WRITERS, "python"], kill_at=len(undisturbed) + 1).code == 0


def test_a_killed_write_is_half_done_and_a_created_file_is_empty(lab: CrashLab, root: Path) -> None:
    events = lab.run([WRITERS, "python"]).events
    temporary = root / "folder" / "temporary"
    for kind, size in (("create", 0), ("write", 50), ("fsync", 100)):
        temporary.unlink(missing_ok=True)
        number = next(event.number for event in events if event.kind == kind)
        assert lab.run([WRITERS, "python"], kill_at=number).code == -9
        assert temporary.stat().st_size == size


def test_both_processes_of_a_killed_command_die(lab: CrashLab, root: Path) -> None:
    end = lab.run([WRITERS, "processes"], kill_at=5)
    assert (end.code, len(end.events)) == (-9, 5)
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    # A process that lives on ends by itself, and has written until then.
    wait_until(lambda: not processes_that_name(root), 60)
    assert before == {path.name: path.read_bytes() for path in root.iterdir()}


def processes_that_name(root: Path) -> list[int]:
    found = psutil.process_iter(["cmdline"])
    return [each.pid for each in found if str(root / "child") in (each.info["cmdline"] or ())]


def test_one_event_of_each_transaction_is_chosen() -> None:
    kinds = ["create", "write", "fsync", "write", "unlink"]
    database = [
        FileEvent(number, kind, f"mlflow.db{'' if kind == 'fsync' else '-journal'}")
        for number, kind in enumerate(kinds * 3, start=3)
    ]
    events = [FileEvent(1, "mkdir", "a"), FileEvent(2, "rename", "a/b"), *database]
    events.append(FileEvent(18, "unlink", "a"))
    chosen = choose_events(events, seed=0)
    assert chosen[:2] == [1, 2]
    assert chosen[-1] == 18
    assert Counter((number - 3) // 5 for number in chosen[2:-1]) == {0: 1, 1: 1, 2: 1}
    assert choose_events(events, seed=0, sample=3) == choose_events(events, seed=0, sample=3)
    low, middle, high = choose_events(events, seed=1, sample=3)
    assert 1 <= low <= 2 < middle < high <= 18


def test_a_difference_names_its_key() -> None:
    assert describe_difference({"a": 1, "b": 2}, {"a": 1, "b": 3}) == "b 2, not 3"
    assert re.match(r"\[1\], not \[\]", describe_difference([1], []))
    assert json.dumps(describe_difference("x" * 900, "y")).count("x") <= 500


def test_one_event_is_chosen_of_each_kind_and_path() -> None:
    trials = [f"swept/trials/00{number}-seed0" for number in range(2)]
    paths = [
        f"{trial}/model/.tmp{end}" for trial, end in zip(trials, ("jmV8A1", "pG2kQz"), strict=True)
    ]
    events = [FileEvent(n, "write", path) for n, path in enumerate(paths, 1)]
    events += [FileEvent(3, "fsync", paths[0]), FileEvent(4, "write", "swept/result.json")]
    first, *rest = choose_kinds(events, [1, 2, 3, 4], seed=0)
    assert first in (1, 2)
    assert rest == [3, 4]
    assert choose_kinds(events, [2, 4], seed=0) == [2, 4]
