"""Locks between processes, and temporary files whose writer was killed."""

import json
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from skillnet_files.commit import remove_leftovers, temporary_directory
from skillnet_platform import storage
from skillnet_platform.storage import locks
from skillnet_platform.storage.locks import LockHeldError, hold_lock
from tests.helpers.processes import run_python, start_python

#: Holds a lock or writes a file, and sleeps in the middle.
HOLD = """
import sys, time
from skillnet_platform.storage.locks import hold_lock
with hold_lock(sys.argv[1], str):
    print("ready", flush=True)
    time.sleep(600)
"""
TRY = """
import sys
from skillnet_platform.storage.locks import LockHeldError, hold_lock
try:
    with hold_lock(sys.argv[1], lambda holder: holder):
        print("free")
except LockHeldError as error:
    print("held by", " ".join(str(error).split()[:2]))
"""
WRITE = """
import sys, time
from skillnet_platform import storage
with storage.atomic_write(sys.argv[1] + "/a.json", "w") as stream:
    with storage.scratch_directory(sys.argv[1] + "/model") as folder:
        (folder / "part").write_text("half")
        stream.write("half")
        stream.flush()
        print("ready", flush=True)
        time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _no_quiet_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "QUIET_S", 0.0)


def start(program: str, path: Path) -> "subprocess.Popen[str]":
    return start_python("-c", program, path, until="ready")


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    with start(HOLD, path) as process:
        with (
            pytest.raises(LockHeldError, match=rf"^process {process.pid} on .+ \(-c .+, since 20"),
            hold_lock(path, lambda holder: holder),
        ):
            pass
        process.kill()
        process.wait()
    with hold_lock(path, str):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_holder(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        with hold_lock(path, str):
            if os.fork() == 0:
                os.write(write, str(os.getpid()).encode())
            time.sleep(600)
            os._exit(0)
    child = int(os.read(read, 20))
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    try:
        with hold_lock(path, str):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_thread_takes_its_lock_again_by_any_path_and_another_process_waits(
    tmp_path: Path,
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "root")
    with hold_lock(tmp_path / "root" / ".lock", str):
        with hold_lock(tmp_path / "link" / "." / ".lock", str, wait=True):
            pass
        # The inner block has not released the lock of the outer one.
        held = run_python("-c", TRY, tmp_path / "root" / ".lock")
        assert held.stdout == f"held by process {os.getpid()}\n"
        with ThreadPoolExecutor(1) as pool, pytest.raises(LockHeldError):
            pool.submit(try_lock, tmp_path / "root" / ".lock").result()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(try_lock, tmp_path / "root" / ".lock").result()


def try_lock(path: Path) -> None:
    with hold_lock(path, str):
        pass


def test_a_lock_file_that_its_holder_replaced_protects_nothing(tmp_path: Path) -> None:
    # A run's folder is removed by the process that held its lock and rejected the configuration.
    path = tmp_path / "run" / ".lock"
    with start(HOLD, path) as process, ThreadPoolExecutor(1) as pool:
        inode, waiting = path.stat().st_ino, threading.Event()

        def describe(holder: str) -> str:
            waiting.set()
            return holder

        def take_after_the_holder() -> int:
            with hold_lock(path, describe, wait=True):
                taken.set()
                assert done.wait(60)
                return path.stat().st_ino

        taken, done = threading.Event(), threading.Event()
        later = pool.submit(take_after_the_holder)
        assert waiting.wait(60)
        path.rename(tmp_path / "old")  # keeps the inode, which the new file must not get
        path.touch()
        process.kill()
        assert taken.wait(60)
        with pytest.raises(LockHeldError), hold_lock(path, str):
            raise AssertionError("two holders")
        done.set()
        assert later.result() == path.stat().st_ino != inode


def test_a_waiting_process_gets_the_lock_after_the_holder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with start(HOLD, tmp_path / ".lock") as process:

        def kill_holder(holder: str) -> str:
            process.kill()
            return f"waiting for {holder}"

        with hold_lock(tmp_path / ".lock", kill_holder, wait=True):
            assert f"waiting for process {process.pid}" in capsys.readouterr().err


def test_the_leftovers_of_a_killed_writer_are_removed_and_those_of_a_living_one_stay(
    tmp_path: Path,
) -> None:
    with start(WRITE, tmp_path) as writer:
        assert len(list(tmp_path.iterdir())) == 2
        assert remove_leftovers(tmp_path) == []
        writer.kill()
        writer.wait()
    (tmp_path / ".notes.tmp").write_text("of another program")
    assert len(remove_leftovers(tmp_path)) == 2
    assert [path.name for path in tmp_path.iterdir()] == [".notes.tmp"]


def test_a_writer_cleans_a_folder_at_its_first_write(tmp_path: Path) -> None:
    with start(WRITE, tmp_path) as writer:
        writer.kill()
        writer.wait()
    storage.write_json(tmp_path / "b.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


def test_threads_get_scratch_directories_of_their_own(tmp_path: Path) -> None:
    with temporary_directory(tmp_path / "x") as one, temporary_directory(tmp_path / "x") as other:
        assert one != other
    assert list(tmp_path.iterdir()) == []
