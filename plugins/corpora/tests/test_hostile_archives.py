"""Hostile archives are rejected with one message before any member is used."""

import io
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from pipelines.data.io.archive import ArchiveLimits
from skillnet_corpora import archives
from skillnet_corpora.archives import iter_members
from skillnet_platform.errors import UserError
from tests.helpers.archive_files import tarred, zipped

#: The message of every attack. Its end names the member and the reason.
REFUSED = r"/x: unsafe archive: .*It was not read\. Download it again"


def read(folder: Path, data: bytes) -> list[tuple[str, bytes]]:
    path = folder / "x"
    path.write_bytes(data)
    try:
        return list(iter_members(path, lambda name: True))
    finally:
        assert [each.name for each in folder.iterdir()] == ["x"], "something was extracted"


def refused(folder: Path, data: bytes, why: str) -> None:
    with pytest.raises(UserError, match=REFUSED) as caught:
        read(folder, data)
    assert why in str(caught.value), caught.value


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set limits that a test reaches quickly."""
    monkeypatch.setattr(archives, "LIMITS", ArchiveLimits(5000, 30_000, 20, 50, 20_000, 12_000))


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/passwd", "..", "\\x", "a\\..\\..\\x", "C:/x", "//host/x"]
)
def test_member_name_that_leads_outside_is_rejected(tmp_path: Path, pack, name: str) -> None:
    refused(tmp_path, pack({"good": b"1", name: b"2"}), "leads outside of the archive")


def test_member_name_with_a_null_character_is_rejected(tmp_path: Path) -> None:
    data = zipped({"good.json_/evil": b"1"}).replace(b"good.json_/evil", b"good.json\0/evil")
    refused(tmp_path, data, "leads outside of the archive")


def one(kind: bytes, **fields: object) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as out:
        entry = tarfile.TarInfo("passwd.json")
        entry.type = kind
        for key, value in fields.items():
            setattr(entry, key, value)
        out.addfile(entry)
    return target.getvalue()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "'passwd.json' is a link"),
        (tarfile.LNKTYPE, "'passwd.json' is a link"),
        (tarfile.CHRTYPE, "'passwd.json' is a device or pipe"),
        (tarfile.BLKTYPE, "'passwd.json' is a device or pipe"),
        (tarfile.FIFOTYPE, "'passwd.json' is a device or pipe"),
    ],
)
def test_irregular_member_of_a_tar_is_rejected(tmp_path: Path, kind: bytes, words: str) -> None:
    refused(tmp_path, one(kind, linkname="/etc/passwd"), words)


def test_link_in_a_zip_is_rejected(tmp_path: Path) -> None:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as out:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        out.writestr(link, "/etc/passwd")
    refused(tmp_path, target.getvalue(), "'link' is a link or a device")


# -- more than it seems ----------------------------------


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_compression_bomb_is_rejected(tmp_path: Path, pack) -> None:
    """50 MB of zeros in 50 KB, with default limits."""
    data = pack({"zeros": bytes(50 * 2**20)})
    assert len(data) < 100_000
    refused(tmp_path, data, "expands to")


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_compression_bomb_is_rejected_before_it_fills_the_memory(tmp_path: Path, pack) -> None:
    path = tmp_path / "x"
    path.write_bytes(pack({"zeros": bytes(50 * 2**20)}))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="unsafe archive"):
            list(iter_members(path, lambda name: True))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # At most what a file of its size may expand to, twice: read, and joined.
    assert peak < 2 * ArchiveLimits().max_ratio * path.stat().st_size + 4 * 2**20


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_member_above_the_size_limit_is_rejected(tmp_path: Path, small: None, pack) -> None:
    refused(tmp_path, pack({"long": bytes(range(256)) * 20}), "5120 bytes in 'long', more than")


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_members_above_the_total_limit_are_rejected(tmp_path: Path, small: None, pack) -> None:
    refused(tmp_path, pack({str(n): bytes(range(250)) * 8 for n in range(16)}), "more than")


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_too_many_members_are_rejected(tmp_path: Path, small: None, pack) -> None:
    refused(tmp_path, pack({str(n): b"" for n in range(21)}), "members")
    read(tmp_path, zipped({str(n): b"" for n in range(20)}))


def test_nested_archive_is_an_ordinary_member(tmp_path: Path) -> None:
    inner = zipped({"zeros": bytes(2**20)})
    assert read(tmp_path, zipped({"inner.zip": inner})) == [("inner.zip", inner)]


# -- lies ----------------------------------


@pytest.mark.parametrize("reported", [10, 90])
def test_zip_with_a_wrong_declared_size_is_rejected(tmp_path: Path, reported: int) -> None:
    """The directory declares 10 or 90 bytes, and the stream holds 50."""
    data = bytearray(zipped({"member": b"x" * 50}))
    place = data.index(b"PK\x01\x02")
    struct.pack_into("<I", data, place + 24, reported)
    with pytest.raises(UserError, match=r"/x: (unsafe archive|cannot be read as a zip)"):
        read(tmp_path, bytes(data))


def test_tar_member_longer_than_the_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"/x: (unsafe archive|cannot be read as a zip, tar or Debian)"
    ):
        read(tmp_path, tarred({"member": bytes(3000)})[:-30])
    entry = tarfile.TarInfo("huge")
    entry.size = 2**40
    refused(tmp_path, entry.tobuf() + bytes(1024), "1099511627776 bytes in 'huge'")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_huge_member_name_is_rejected(tmp_path: Path, kind: bytes) -> None:
    """Python reads the long name of a member into memory at any declared length."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as out:
        entry = tarfile.TarInfo("././@LongLink")
        entry.type, entry.size = kind, 30 * 2**20
        out.addfile(entry, io.BytesIO(b"a" * entry.size))
    tracemalloc.start()
    try:
        refused(tmp_path, target.getvalue(), "a flood of bytes")
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_method_without_a_limit_is_rejected(tmp_path: Path, method: int) -> None:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as out:
        out.writestr("member", b"x" * 500)
    refused(tmp_path, target.getvalue(), f"compression method {method}")


def test_encrypted_member_is_rejected(tmp_path: Path) -> None:
    data = bytearray(zipped({"member": b"x"}))
    for place, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        struct.pack_into("<H", data, data.index(place) + offset, 1)
    refused(tmp_path, bytes(data), "'member' is encrypted")


def test_valid_archive_with_a_high_ratio_is_read(tmp_path: Path) -> None:
    lines = b'{"label": 1, "sentence": "the same words again"}\n' * 20_000
    for pack in (zipped, tarred):
        assert read(tmp_path, pack({"lines.json": lines})) == [("lines.json", lines)]
