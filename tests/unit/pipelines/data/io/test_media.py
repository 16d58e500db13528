"""Media references: bytes are read in order, and unreadable files state the reason."""

import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from pipelines.data.io import media
from pipelines.data.io.archive import ArchiveLimits
from pipelines.data.io.media import MEDIA, MediaReadError, MediaRef, read_media
from skillnet_platform.errors import UserError
from skillnet_platform.storage.retry import StoreUnavailableError
from tests.helpers.archive_files import tarred


def read(*references: MediaRef, max_bytes: int = media.MAX_MEDIA_BYTES) -> list[bytes | str]:
    """Return the bytes or the reason of each reference."""
    column = pa.array([reference.row() for reference in references], MEDIA)
    return [
        found.reason if isinstance(found, MediaReadError) else found
        for found in read_media(column, max_bytes)
    ]


def test_files_and_ranges_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "b").write_bytes(b"b")
    a, b = str(tmp_path / "a"), f"file://{tmp_path / 'b'}"
    found = read(MediaRef(a, 2, 3), MediaRef(b), MediaRef(a), MediaRef(a, 8))
    assert found == [b"234", b"b", b"0123456789", b"89"]


def test_a_member_of_a_plain_tar_is_a_range(tmp_path: Path) -> None:
    path = tmp_path / "clips.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (("x.jpg", b"xx" * 500), ("y.jpg", b"y")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    with tarfile.open(path) as archive:
        ranges = [MediaRef(str(path), e.offset_data, e.size) for e in archive]
    assert read(*reversed(ranges)) == [b"y", b"xx" * 500]


def test_members_of_a_compressed_tar_are_read_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "S0002.tar.gz"
    path.write_bytes(tarred({f"S0002/{n}.wav": bytes([n]) * 9 for n in range(1, 6)}))
    names = ["S0002/2.wav", "S0002/4.wav", "S0002/1.wav", "S0002/9.wav", "S0002/5.wav"]
    found = read(*(MediaRef(str(path), member=name) for name in names))
    assert found == [b"\2" * 9, b"\4" * 9, b"\1" * 9, "not in its archive", b"\5" * 9]


def flooded(folder: Path) -> Path:
    """Return a tar of 30 KB with a good member and one whose name is 30 MB long."""
    target, path = io.BytesIO(), folder / "flood.tar.gz"
    with tarfile.open(fileobj=target, mode="w:gz") as out:
        good = tarfile.TarInfo("good.wav")
        good.size = 4
        out.addfile(good, io.BytesIO(b"good"))
        entry = tarfile.TarInfo("././@LongLink")
        entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 30 * 2**20
        out.addfile(entry, io.BytesIO(b"a" * entry.size))
    path.write_bytes(target.getvalue())
    return path


def test_hostile_tar_rejects_its_rows_and_needs_no_memory(tmp_path, monkeypatch):
    path = flooded(tmp_path)
    monkeypatch.setattr(
        "pipelines.data.io.archive.TAR_LIMITS", ArchiveLimits(2**62, 2**62, 2**62, 2000)
    )
    tracemalloc.start()
    try:
        found = read(MediaRef(str(path), member="good.wav"), MediaRef(str(path), member="bad.wav"))
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()
    flood = "a name or an attribute of a member is a flood of bytes"
    assert found == [b"good", f"the archive is refused: {flood}"]


def test_tar_that_expands_without_end_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(tarred({"zeros.wav": bytes(50 * 2**20), "after.wav": b"1"}))
    (found,) = read(MediaRef(str(path), member="after.wav"))
    assert str(found).startswith("the archive is refused: expands to more than")


def test_unreadable_media_state_their_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "large").write_bytes(b"1" * 2000)
    (tmp_path / "cut.tar.gz").write_bytes(tarred({"a": os.urandom(5000)})[:-2000])
    os.mkfifo(tmp_path / "pipe")
    found = read(
        MediaRef(str(tmp_path / "none")),
        MediaRef(str(tmp_path / "large" / "none")),
        MediaRef(str(tmp_path / "empty")),
        MediaRef(str(tmp_path / "large")),
        MediaRef(str(tmp_path / "large"), 1990, 20),
        MediaRef(str(tmp_path / "pipe")),
        MediaRef(str(tmp_path)),
        MediaRef(str(tmp_path / "cut.tar.gz"), member="a"),
        MediaRef(str(tmp_path / "none.tar.gz"), member="a"),
        MediaRef(str(tmp_path / "large"), 0, 4),
        max_bytes=1024,
    )
    assert found == [
        "the media file is missing",
        "the media file is missing",
        "an empty file",
        "a media file larger than 1.0 KiB",
        "cut short: the file ends before the media",
        "not a regular file",
        "not a regular file",
        "a media file larger than 1.0 KiB",
        "the archive is missing",
        b"1111",
    ]
    (damaged,) = read(MediaRef(str(tmp_path / "cut.tar.gz"), member="a"))
    assert damaged == "the archive is cut short or damaged"
    assert [x.reason for x in read_media(pa.array([None], MEDIA)) if x] == ["no media file"]


@pytest.fixture
def bucket() -> str:
    """Return a folder that is only reachable by URI."""
    store = fsspec.filesystem("memory")
    store.pipe({"/bucket/a.wav": b"0123456789", "/bucket/s.tar.gz": tarred({"m.wav": b"mm"})})
    return "memory://bucket"


def test_uris_are_read_like_paths(bucket: str) -> None:
    found = read(
        MediaRef(f"{bucket}/a.wav"),
        MediaRef(f"{bucket}/a.wav", 4, 2),
        MediaRef(f"{bucket}/s.tar.gz", member="m.wav"),
        MediaRef(f"{bucket}/none.wav"),
        MediaRef(f"{bucket}/a.wav", 9, 5),
    )
    assert found == [
        b"0123456789",
        b"45",
        b"mm",
        "the media file is missing",
        "cut short: the file ends before the media",
    ]
    assert read(MediaRef(f"{bucket}/a.wav"), max_bytes=9) == ["a media file larger than 9 bytes"]


@pytest.mark.parametrize("member", [None, "m.wav"])
def test_store_failure_rejects_no_row(bucket, monkeypatch, member):
    """The store is asked again. Then preparation stops, and no row is rejected."""
    asked = []

    def broken(self: object, path: str, *more: object, **others: object) -> bytes:
        asked.append(path)
        raise TimeoutError("no answer")

    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", "1")
    for name in ("cat_file", "_open"):
        monkeypatch.setattr(f"fsspec.implementations.memory.MemoryFileSystem.{name}", broken)
    reference = MediaRef(f"{bucket}/s.tar.gz", member=member)
    with pytest.raises(
        StoreUnavailableError, match=r"s\.tar\.gz: the store did not answer for 1 s"
    ):
        read(reference)
    assert len(asked) > 1


def test_disk_failure_rejects_no_row(tmp_path: Path) -> None:
    """Reading address 0 of a process gives EIO, as a broken disk or mount does."""
    (tmp_path / "a.wav").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"a\.wav: cannot be read \(Input/output error\).*again"):
        read(MediaRef(str(tmp_path / "a.wav"), 0, 100))


def test_unknown_uri_scheme_is_reported() -> None:
    with pytest.raises(UserError, match="nowhere://x: cannot be opened"):
        read(MediaRef("nowhere://x/y"))


def test_an_archive_that_is_a_pipe_or_a_device_costs_one_row(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    names = (str(tmp_path / "pipe.tar"), "/dev/zero")
    for name in names:
        assert read(MediaRef(name, member="a.png")) == ["the archive is not a regular file"]


def test_no_device_or_pipe_is_opened_ahead_of_need(tmp_path, monkeypatch):
    """Opening a device can have an effect, such as that of a watchdog or a tape."""
    os.mkfifo(tmp_path / "pipe.png")
    opened: list[object] = []
    original = os.open

    def recording_open(path: object, *arguments: int, **options: int) -> int:
        opened.append(path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", recording_open)
    names = [str(tmp_path / "pipe.png"), "/dev/zero"] * (media.ADVISED_FILES + 1)
    assert read(*map(MediaRef, names)) == ["not a regular file"] * len(names)
    assert not {*names} & {*map(str, opened)}
