"""Writing: the old or the whole new, never half; and a full disk said in one message."""

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from skillnet_files import commit
from skillnet_platform import storage
from skillnet_platform.errors import UserError
from tests.helpers.processes import start_python

ROOT = Path(__file__).parents[3]
#: A command in a PID namespace of its own, as in a container: its process has the id 1.
CONTAINER = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
#: Replaces a directory as on NFS, and sleeps between the two renames.
REPLACE = """
import sys, time
from pathlib import Path
from skillnet_files import commit
commit.exchange_paths = lambda one, other: False
rename = Path.rename
def rename_or_sleep(source, target):
    if source.name == "new":
        print("ready", flush=True)
        time.sleep(600)
    rename(source, target)
Path.rename = rename_or_sleep
commit.commit_directory(sys.argv[1], sys.argv[2])
"""


def test_run_root_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SKILLNET_HOME")
    assert storage.run_root() == tmp_path / "runs"
    monkeypatch.setenv("SKILLNET_HOME", "elsewhere")
    assert storage.run_root() == tmp_path / "elsewhere"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    storage.write_json(path, {"old": "é"})
    with pytest.raises(KeyError), storage.atomic_write(path, "w") as stream:
        stream.write("half")
        raise KeyError
    assert storage.read_json(path) == {"old": "é"}
    assert os.listdir(tmp_path) == ["a.json"]


def test_staging_commits_on_success_only(tmp_path: Path) -> None:
    final = tmp_path / "corpus"
    with pytest.raises(RuntimeError), storage.staging_directory(final) as aside:
        (aside / "part").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with storage.staging_directory(final) as aside:
            (aside / "part").write_text(text)
        assert (final / "part").read_text() == text
        assert os.listdir(tmp_path) == ["corpus"]


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    final = tmp_path / "corpus"
    code = (
        "import sys, time; from skillnet_platform import storage\n"
        f"with storage.staging_directory({str(final)!r}) as aside:\n"
        "    (aside / 'part').write_text('half'); print('ready', flush=True); time.sleep(60)"
    )
    process = start_python("-c", code, until="ready")
    with storage.staging_directory(tmp_path / "corpus2"):
        pass
    assert len(list(tmp_path.glob(".corpus.*"))) == 1, "a living writer is left alone"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not final.exists()
    with storage.staging_directory(final) as aside:
        (aside / "part").write_text("whole")
    assert sorted(os.listdir(tmp_path)) == ["corpus", "corpus2"]


@pytest.mark.parametrize("namespace", [(), CONTAINER], ids=["same", "other PID namespace"])
def test_killed_between_the_two_renames_the_old_one_comes_back(
    tmp_path: Path, namespace: tuple[str, ...]
) -> None:
    if namespace and subprocess.run([*namespace, "true"], check=False).returncode:
        pytest.skip("PID namespaces cannot be used here")
    for name in ("corpus[1]", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text(name)
    final = tmp_path / "corpus[1]"
    words = ("-c", REPLACE, tmp_path / "new", final)
    with start_python(*words, until="ready", before=namespace) as process:
        storage.restore_replaced(final)
        assert not final.exists(), "a living writer is left alone"
        process.kill()
        # The writer is a child of the killed process: the pipe ends when it has died.
        process.stdout.read()
    # The first write to a folder removes leftovers, and the old directory is none.
    storage.write_json(tmp_path / "other.json", {})
    with pytest.raises(RuntimeError), storage.staging_directory(final):
        raise RuntimeError
    assert (final / "part").read_text() == "corpus[1]"
    assert sorted(os.listdir(tmp_path)) == ["corpus[1]", "new", "other.json"]


def test_a_commit_removes_what_a_killed_one_has_replaced(tmp_path: Path) -> None:
    for name in ("corpus", ".corpus.sn-0123456789abcdef.old.tmp", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    storage.commit_directory(tmp_path / "new", tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    assert (tmp_path / "corpus" / "a").read_text() == "new"


def test_a_directory_that_cannot_be_replaced_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "exchange_paths", lambda one, other: False)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a").write_text("old")
    with pytest.raises(FileNotFoundError):
        storage.commit_directory(tmp_path / "missing", tmp_path / "corpus")
    assert (tmp_path / "corpus" / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["corpus"]


@pytest.mark.parametrize(
    "problem",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("x: No space left on device")],
)
def test_a_full_disk_is_one_message(tmp_path: Path, problem: Exception) -> None:
    with pytest.raises(UserError) as caught, storage.disk_guard(tmp_path / "x", needed=5 * 2**30):
        raise problem
    message = str(caught.value)
    assert str(tmp_path / "x") in message
    assert "5.0 GiB (5368709120 bytes)" in message
    assert "SKILLNET_HOME" in message


def test_other_errors_pass_the_guard(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), storage.disk_guard(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_room_is_asked_for_before_a_long_write(tmp_path: Path) -> None:
    storage.require_space(tmp_path / "not" / "there", 1)
    with pytest.raises(UserError, match="the disk is full"):
        storage.require_space(tmp_path, 2**60)


def test_json_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(UserError, match=r"m\.json: not a JSON file"):
        storage.read_json(tmp_path / "m.json")
    with pytest.raises(UserError, match=r"n\.json: no such file"):
        storage.read_json(tmp_path / "n.json")


def test_processes_are_distinguished_from_ended_ones() -> None:
    assert storage.process_is_alive(os.getpid())
    with start_python("-c", "") as process:
        process.wait()
    assert not storage.process_is_alive(process.pid)


def test_a_place_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "x.json"
    with pytest.raises(UserError, match=r"x\.json: cannot be written \(Not a directory\)"):
        storage.write_json(place, {})
    with (
        pytest.raises(UserError, match=r"x\.json: cannot be written \(Not a directory\)"),
        storage.staging_directory(place),
    ):
        raise AssertionError("nothing can be made there")
