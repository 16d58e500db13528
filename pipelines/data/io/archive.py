"""Zip and tar archives from untrusted sources: read in place, and rejected if they are unsafe.

Nothing is ever extracted. Names become keys, links would be read as other files, and a small file
can hold very much data. An archive with properties that no valid corpus archive has is rejected
with one message. Real archives (wheels and npm packages) expand to at most 10 times their size,
their members to at most 27 times.

A tar of an external corpus is read from front to back; links and devices are skipped. It may have
any size and any number of members, because no member is kept. Two kinds of tar are rejected: one
that expands to 200 times its size, and one whose names or attributes would fill the memory.
"""

import bz2
import contextlib
import gzip
import io
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipelines.data.io.source_file import SourceReadError
from skillnet_platform.errors import UserError

MemberFilter = Callable[[str], bool]


@dataclass(frozen=True)
class ArchiveLimits:
    """Limits of an archive's content.

    Args:
        max_member_bytes: bytes of one member.
        max_total_bytes: bytes of all members.
        max_members: number of members.
        max_ratio: uncompressed bytes per compressed byte, of the archive and of each member.
        ratio_free_bytes: uncompressed bytes that are allowed at any ratio.
        max_header_bytes: bytes between two members of a tar: names, attributes, padding.
    """

    max_member_bytes: int = 64 * 2**20
    max_total_bytes: int = 2 * 2**30
    max_members: int = 200_000
    max_ratio: int = 200
    ratio_free_bytes: int = 2**20
    max_header_bytes: int = 2**20


class UnsafeArchiveError(UserError):
    """An archive has a property that no valid corpus archive has.

    Args:
        path: path or URI of the archive.
        why: the property.
    """

    def __init__(self, path: Path | str, why: str) -> None:
        super().__init__(
            f"{path}: unsafe archive: {why}. It was not read. Download it again from a trusted "
            "source."
        )
        self.why = why


def check_member_name(path: Path, name: str) -> None:
    """Check that a member's name does not lead out of the archive.

    Args:
        path: archive, for the message.
        name: name of the member.

    Raises:
        UnsafeArchiveError: the name is absolute or contains "..".
    """
    parts = name.replace("\\", "/").split("/")
    absolute = name.startswith(("/", "\\")) or name[1:2] == ":"
    if absolute or ".." in parts or "\0" in name:
        raise UnsafeArchiveError(path, f"the name {name!r} leads outside of the archive")


def iter_zip_members(
    path: Path, wanted: MemberFilter, limits: ArchiveLimits
) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of the wanted members of a zip.

    The complete directory is checked before the first member is read.

    Args:
        path: zip file.
        wanted: returns whether the member of a name is read.
        limits: limits of the content.

    Raises:
        UnsafeArchiveError: the archive exceeds a limit, or has links or encrypted members.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > limits.max_members:
            raise UnsafeArchiveError(
                path, f"{len(entries)} members, more than {limits.max_members}"
            )
        for entry in entries:
            _check_entry(path, entry, limits)
        total = sum(entry.file_size for entry in entries)
        packed = path.stat().st_size
        _check_amount(path, "all members", total, limits.max_total_bytes, packed, limits)
        for entry in entries:
            if not entry.is_dir() and wanted(entry.filename):
                # zipfile stops at the declared size and compares the checksum.
                data = archive.read(entry)
                if len(data) != entry.file_size:
                    sizes = f"{entry.file_size} bytes declared, {len(data)} found"
                    raise UnsafeArchiveError(
                        path, f"{entry.filename!r} lies about its size: {sizes}"
                    )
                yield entry.filename, data


def iter_tar_members(
    path: Path, wanted: MemberFilter, limits: ArchiveLimits
) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of the wanted members of a tar, plain or compressed.

    The tar is read once from front to back.

    Args:
        path: tar file.
        wanted: returns whether the member of a name is read.
        limits: limits of the content.

    Raises:
        UnsafeArchiveError: the archive exceeds a limit, or has links or devices.
    """
    with path.open("rb") as file:
        yield from iter_tar_stream(path, open_with_budget(path, file, limits), wanted, limits)


def iter_tar_stream(
    path: Path,
    budget: "ByteBudget",
    wanted: MemberFilter,
    limits: ArchiveLimits,
    skip_symlinks: bool = False,
) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of the wanted members of an uncompressed tar.

    Args:
        path: archive, for messages.
        budget: the tar, read once from front to back.
        wanted: returns whether the member of a name is read.
        limits: limits of the content.
        skip_symlinks: symbolic links are left out, as packages have them for a reason. By default
            an archive with one is rejected.

    Raises:
        UnsafeArchiveError: the archive exceeds a limit, or has links or devices.
    """
    budget.allow(limits.max_header_bytes)
    with tarfile.open(fileobj=budget, mode="r|") as archive:
        # tarfile reads headers into memory; the budget bounds how much it ever gets.
        for count, entry in enumerate(iter(archive.next, None), start=1):
            # tarfile would keep all members in memory.
            archive.members = []  # type: ignore[attr-defined]
            if count > limits.max_members:
                raise UnsafeArchiveError(path, f"more than {limits.max_members} members")
            check_member_name(path, entry.name)
            is_skipped = skip_symlinks and entry.issym()
            if not (entry.isreg() or entry.isdir() or is_skipped):
                raise UnsafeArchiveError(path, f"{entry.name!r} is {_describe_kind(entry)}")
            if entry.size > limits.max_total_bytes:
                raise UnsafeArchiveError(path, f"{entry.size} bytes in {entry.name!r}")
            budget.allow(entry.size + limits.max_header_bytes)
            if entry.isreg() and wanted(entry.name):
                if entry.size > limits.max_member_bytes:
                    size = f"{entry.size} bytes in {entry.name!r}"
                    raise UnsafeArchiveError(path, f"{size}, more than {limits.max_member_bytes}")
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
    sizes = entry.file_size, limits.max_member_bytes, entry.compress_size
    _check_amount(path, repr(entry.filename), *sizes, limits)


def _check_amount(
    path: Path, part: str, size: int, max_size: int, packed: int, limits: ArchiveLimits
) -> None:
    if size > max_size:
        raise UnsafeArchiveError(path, f"{size} bytes in {part}, more than {max_size}")
    if size > max(limits.ratio_free_bytes, packed * limits.max_ratio):
        raise UnsafeArchiveError(path, f"{part} expands to {size // max(packed, 1)} times its size")


def _describe_kind(entry: tarfile.TarInfo) -> str:
    if entry.issym() or entry.islnk():
        return "a link"
    return "a device or pipe" if entry.isdev() else "of an unknown kind"


def open_with_budget(path: Path | str, file: IO[bytes], limits: ArchiveLimits) -> "ByteBudget":
    """Open the uncompressed content of a tar within limits.

    The first bytes decide the compression, not the name.

    Args:
        path: archive, for messages.
        file: open, seekable file.
        limits: the total bytes and the ratio bound the uncompressed content.
    """
    packed = file.seek(0, io.SEEK_END)
    how = detect_compression(file)
    max_bytes = min(limits.max_total_bytes, max(limits.ratio_free_bytes, packed * limits.max_ratio))
    if how == "gzip":
        budget = ByteBudget(path, gzip.GzipFile(fileobj=file), max_bytes)
    elif how == "bzip2":
        budget = ByteBudget(path, bz2.BZ2File(file), max_bytes)
    else:
        budget = ByteBudget(path, file, max_bytes)
    budget.allow(limits.max_header_bytes)
    return budget


def detect_compression(file: IO[bytes]) -> str:
    """Return "gzip", "bzip2" or "" by the first bytes of a file, and rewind it."""
    file.seek(0)
    start = file.read(3)
    file.seek(0)
    return "gzip" if start[:2] == b"\x1f\x8b" else "bzip2" if start == b"BZh" else ""


class ByteBudget(io.RawIOBase):
    """Stream that raises an error when more bytes are read than were allowed.

    Args:
        path: archive, for messages.
        inner: stream to read.
        max_bytes: bytes that may be read from it in total.
    """

    def __init__(
        self,
        path: Path | str,
        inner: IO[bytes] | gzip.GzipFile | bz2.BZ2File | io.RawIOBase,
        max_bytes: int,
    ) -> None:
        self._path, self._inner, self._max_bytes = path, inner, max_bytes
        # ``read1`` returns the last bytes of a truncated compressed file before it raises.
        packed = isinstance(inner, gzip.GzipFile | bz2.BZ2File)
        self._read: Callable[[int], bytes] = getattr(inner, "read1" if packed else "read")
        self._allowed = self._consumed = 0

    def allow(self, count: int) -> None:
        """Allow the next ``count`` bytes to be read."""
        self._allowed = self._consumed + count

    def read(self, size: int = -1) -> bytes:
        """Read bytes, see :meth:`io.RawIOBase.read`.

        Raises:
            UnsafeArchiveError: the budget is exceeded.
        """
        data = self._read(size)
        self._consumed += len(data)
        if self._consumed > self._max_bytes:
            raise UnsafeArchiveError(self._path, f"expands to more than {self._max_bytes} bytes")
        if self._consumed > self._allowed:
            raise UnsafeArchiveError(
                self._path, "a name or an attribute of a member is a flood of bytes"
            )
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Change the position, see :meth:`io.IOBase.seek`. Skipped bytes do not count as read."""
        return self._inner.seek(offset, whence)

    def tell(self) -> int:
        """Return the position, see :meth:`io.IOBase.tell`."""
        return self._inner.tell()


#: The reader of the corpus limits the size of a member.
TAR_LIMITS = ArchiveLimits(max_total_bytes=2**62, max_members=2**62)
TRUNCATED_ARCHIVE = "the archive is cut short or damaged"


class TarReadError(Exception):
    """Reason why a tar cannot be read further. It is short, because rows are counted by it."""


class TarReader:
    """Regular files of a tar, plain or compressed with gzip or bzip2.

    Args:
        path: path or URI, for messages.
        file: open, seekable file. It stays open.
        ranges: the tar is plain, and members are located by their offsets: their content is
            skipped with a seek instead of being read.

    Raises:
        TarReadError: the tar is damaged or unsafe; here and while it is read.
    """

    def __init__(self, path: str, file: IO[bytes], ranges: bool = False) -> None:
        with _translated_errors():
            self._budget = open_with_budget(path, file, TAR_LIMITS)
            mode = "r:" if ranges else "r|"
            self._tar = tarfile.open(fileobj=self._budget, mode=mode)  # type: ignore[call-overload]  # noqa: SIM115

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """Yield the members that were not passed yet."""
        while True:
            with _translated_errors():
                entry = self._tar.next()
            if entry is None:
                return
            # tarfile would keep all members in memory.
            self._tar.members = []  # type: ignore[attr-defined]
            # A member of a compressed tar can only be skipped by reading it.
            self._budget.allow(entry.size + TAR_LIMITS.max_header_bytes)
            if entry.isreg():
                yield entry

    def read(self, entry: tarfile.TarInfo) -> bytes:
        """Return the bytes of the member that was yielded last."""
        with _translated_errors():
            stream = self._tar.extractfile(entry)
            assert stream is not None, "a regular file has content"
            return stream.read()

    def close(self) -> None:
        """Close the tar; the file stays open."""
        self._tar.close()


@contextlib.contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except UnsafeArchiveError as error:
        raise TarReadError(f"the archive is refused: {error.why}") from None
    except SourceReadError:
        raise
    except RecursionError:  # tarfile parses nested headers recursively
        raise TarReadError("the archive is refused: headers without end") from None
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError):
        raise TarReadError(TRUNCATED_ARCHIVE) from None
