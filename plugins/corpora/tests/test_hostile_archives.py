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


def irregular(kind: bytes) -> bytes:
    """Return a tar with a member of another type."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as out:
        entry = tarfile.TarInfo("passwd.json")
        entry.type, entry.linkname = kind, "/etc/passwd"
        out.addfile(entry)
    return target.getvalue()


def zip_member(name: str, method: int = zipfile.ZIP_STORED, attributes: int = 0) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as out:
        member = zipfile.ZipInfo(name)
        member.external_attr, member.compress_type = attributes, method
        out.writestr(member, b"x" * 500)
    return target.getvalue()


def encrypted() -> bytes:
    data = bytearray(zipped({"member": b"x"}))
    for place, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        struct.pack_into("<H", data, data.index(place) + offset, 1)
    return bytes(data)


def huge_member() -> bytes:
    entry = tarfile.TarInfo("huge")
    entry.size = 2**40
    return entry.tobuf() + bytes(1024)


OUTSIDE = "leads outside of the archive"
NAMES = ("../x", "a/../../x", "/etc/passwd", "..", "\\x", "a\\..\\..\\x", "C:/x", "//host/x")
NULL = zipped({"good.json_/evil": b"1"}).replace(b"good.json_/evil", b"good.json\0/evil")
TYPES = {
    "link": (tarfile.SYMTYPE, tarfile.LNKTYPE),
    "device or pipe": (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),
}
#: What is wrong -> the archive, and the reason. The bombs are 50 MB of zeros in 50 KB.
ATTACKS: dict[str, tuple[bytes, str]] = {
    **{
        f"{pack.__name__} {name}": (pack({"good": b"1", name: b"2"}), OUTSIDE)
        for pack in (zipped, tarred)
        for name in NAMES
    },
    "a null character": (NULL, OUTSIDE),
    **{
        f"tar type {kind.decode()}": (irregular(kind), f"'passwd.json' is a {what}")
        for what, kinds in TYPES.items()
        for kind in kinds
    },
    "link in a zip": (zip_member("link", attributes=0o120777 << 16), "'link' is a link or a dev"),
    **{f"bomb {p.__name__}": (p({"0": bytes(50 * 2**20)}), "expands to") for p in (zipped, tarred)},
    "huge": (huge_member(), "1099511627776 bytes in 'huge'"),
    "bzip2": (zip_member("member", zipfile.ZIP_BZIP2), f"compression method {zipfile.ZIP_BZIP2}"),
    "lzma": (zip_member("member", zipfile.ZIP_LZMA), f"compression method {zipfile.ZIP_LZMA}"),
    "encrypted": (encrypted(), "'member' is encrypted"),
}


@pytest.mark.parametrize("kind", ATTACKS)
def test_hostile_archive_is_rejected(tmp_path: Path, kind: str) -> None:
    refused(tmp_path, *ATTACKS[kind])


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
def test_limits_of_members_are_kept(tmp_path: Path, small: None, pack) -> None:
    for files, why in (
        ({"long": bytes(range(256)) * 20}, "5120 bytes in 'long', more than"),
        ({str(n): bytes(range(250)) * 8 for n in range(16)}, "more than"),
        ({str(n): b"" for n in range(21)}, "members"),
    ):
        refused(tmp_path, pack(files), why)
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


def test_valid_archive_with_a_high_ratio_is_read(tmp_path: Path) -> None:
    lines = b'{"label": 1, "sentence": "the same words again"}\n' * 20_000
    for pack in (zipped, tarred):
        assert read(tmp_path, pack({"lines.json": lines})) == [("lines.json", lines)]
