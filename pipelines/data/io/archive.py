"""Tar archives from untrusted sources, and the limits of all archives; nothing is ever extracted.

A tar of an external corpus is read from front to back; links and devices are skipped. It may have
any size and any number of members, because no member is kept. Two kinds of tar are rejected: one
that expands to 200 times its size, and one whose names or attributes would fill the memory.
"""

import bz2
import contextlib
import gzip
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipelines.data.io.source_file import SourceReadError
from skillnet_platform.errors import UserError


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
