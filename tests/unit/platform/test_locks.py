"""Locks between processes, and temporary files whose writer was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skillnet_platform import storage
from skillnet_platform.errors import UserError
from skillnet_platform.storage.locks import LockHeldError, hold_lock
from skillnet_platform.storage.temporary import remove_leftovers, temporary_directory

#: Holds a lock or writes a file, and sleeps in the middle.
HOLD = """
import sys, time
from skillnet_platform.storage.locks import hold_lock
with hold_lock(sys.argv[1], str):
    print("ready", flush=True)
    time.sleep(600)
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


def start(program: str, path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    with start(HOLD, path) as process:
        with (
            pytest.raises(LockHeldError, match=rf"^process {process.pid} on .+ \(since 20"),
            hold_lock(path, lambda holder: holder),
        ):
            pass
        process.kill()
        process.wait()
    with hold_lock(path, str):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_stopped_holder_keeps_its_lock(tmp_path: Path) -> None:
    with start(HOLD, tmp_path / ".lock") as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(UserError), hold_lock(tmp_path / ".lock", str):
            pass
        process.kill()


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


def test_a_waiting_process_gets_the_lock_after_the_holder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with start(HOLD, tmp_path / ".lock") as process:
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {process.pid}"])
        with hold_lock(tmp_path / ".lock", lambda holder: f"waiting for {holder}", wait=True):
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
