"""Files that the user names: replaced as a whole, or written through if they are not files."""

import os
import stat
import threading
from pathlib import Path

import pytest

from skillnet_cluster import pin_nodes
from skillnet_platform.errors import UserError
from skillnet_platform.storage import open_output


def write(path: Path, text: str = "new\n") -> None:
    with open_output(path, "w") as stream:
        stream.write(text)


def test_a_replaced_output_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.touch(mode=0o600)
    write(path)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new\n", 0o600)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to create a device")
def test_a_device_stays_a_device(tmp_path: Path) -> None:
    path = tmp_path / "null"
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        write(path)
    except OSError:
        pytest.skip("devices cannot be created or used here")
    assert stat.S_ISCHR(path.lstat().st_mode)
    assert os.listdir(tmp_path) == ["null"]
    # The real one, which a command of root must not replace either.
    before = os.lstat("/dev/null")
    write(Path("/dev/null"))
    after = os.lstat("/dev/null")
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_a_link_stays_a_link_and_its_target_gets_the_text(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("much longer old text\n")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "new").symlink_to("created")
    for link, target in (("link", "target"), ("new", "created")):
        write(tmp_path / link)
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / target).read_text() == "new\n"


def test_a_pipe_stays_a_pipe_and_its_reader_gets_the_text(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(path.read_text()), daemon=True)
    reader.start()
    write(path)
    reader.join(30)
    assert read == ["new\n"]
    assert path.is_fifo()


def test_standard_output_of_a_shell_is_written_through(tmp_path: Path) -> None:
    with (tmp_path / "redirected").open("w") as stream:
        write(Path(f"/proc/self/fd/{stream.fileno()}"))
    assert (tmp_path / "redirected").read_text() == "new\n"
    assert os.listdir(tmp_path) == ["redirected"]


def test_an_output_that_cannot_be_opened_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "loop"):
        with pytest.raises(UserError, match=rf"^{path}: cannot be written"):
            write(path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")  # noqa: PTH110
def test_a_full_device_is_one_message() -> None:
    with pytest.raises(UserError, match=r"^/dev/full: "):
        write(Path("/dev/full"))


def test_a_command_writes_through_the_link_that_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "requirements.txt"
    link.symlink_to("elsewhere")
    assert pin_nodes.main([str(link)]) == 0
    assert link.is_symlink()
    assert "ray==" in (tmp_path / "elsewhere").read_text()
