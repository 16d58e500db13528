"""The directory of Ray's sessions belongs to one user, and nobody else can enter it."""

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from skillnet_platform.cluster.connect import (
    DIRECTORY_VARIABLE,
    _warn_about_shared_sessions,
    prepare_session_directory,
)
from skillnet_platform.errors import UserError
from skillnet_platform.storage.local import is_private, private_directory

OTHER_UID = 54321
ADVICE = "Choose another"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory like ``/tmp``: writable by all, sticky."""
    directory = tmp_path / "shared"
    directory.mkdir()
    directory.chmod(0o1777)
    return directory


def test_a_new_directory_is_open_to_its_user_only_at_any_umask(shared: Path) -> None:
    before = os.umask(0)
    try:
        made = private_directory(shared / "own", ADVICE)
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o7777 == 0o700
    assert private_directory(shared / "own", ADVICE) == made
    assert is_private(made)
    assert is_private(made / "."), "an entry of a private directory is private"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to create a directory of another user")
def test_a_directory_that_another_user_planted_is_refused(shared: Path) -> None:
    planted = shared / "own"
    planted.mkdir(mode=0o700)
    os.chown(planted, OTHER_UID, OTHER_UID)
    with pytest.raises(UserError, match=rf"^{planted}: belongs to another user \(uid {OTHER_UID}"):
        private_directory(planted, ADVICE)


def test_a_link_a_file_and_an_open_directory_are_refused(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (shared / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"/link: is a symbolic link. {ADVICE}.$"):
        private_directory(shared / "link", ADVICE)
    (shared / "file").touch()
    with pytest.raises(UserError, match="/file: is not a directory"):
        private_directory(shared / "file", ADVICE)
    (shared / "open").mkdir()
    (shared / "open").chmod(0o755)
    with pytest.raises(UserError, match=r"/open: is open to other users \(mode 0755\)"):
        private_directory(shared / "open", ADVICE)
    with pytest.raises(UserError, match=r"/missing/own: cannot be created \(No such file"):
        private_directory(shared / "missing/own", ADVICE)


def test_a_parent_in_which_others_can_rename_is_refused(shared: Path) -> None:
    shared.chmod(0o777)
    with pytest.raises(UserError, match=f"who may write to {shared}"):
        private_directory(shared / "own", ADVICE)


def test_sessions_of_ray_lie_in_the_temporary_directory_of_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as base:  # a short path, unlike `tmp_path`
        monkeypatch.setenv(DIRECTORY_VARIABLE, base)
        own = Path(base) / f"skillnet-{os.geteuid()}"
        assert prepare_session_directory() == own
        assert own.stat().st_mode & 0o7777 == 0o700
        monkeypatch.setenv(DIRECTORY_VARIABLE, str(own))
        assert prepare_session_directory() == own, "Ray's processes use the same directory"


def test_sessions_of_ray_need_a_short_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("long" * 10)
    long.mkdir()
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert prepare_session_directory() == Path(f"/tmp/skillnet-{os.geteuid()}")
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(long))
    with pytest.raises(UserError, match=r"RAY_TMPDIR=.*: too long for Ray's sockets"):
        prepare_session_directory()


def test_a_driver_warns_about_a_cluster_whose_sessions_are_open(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    private = private_directory(shared / "own", ADVICE)
    (private / "ray").mkdir(mode=0o777)
    for sessions in (private / "ray", Path("/tmp")):
        context = SimpleNamespace(get_temp_dir=lambda path=sessions: str(path))
        _warn_about_shared_sessions(SimpleNamespace(get_runtime_context=lambda c=context: c))
    printed = capsys.readouterr().err
    assert printed.startswith("warning: /tmp: other users of this node can take over")
    assert str(private) not in printed
