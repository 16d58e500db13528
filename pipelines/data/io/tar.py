"""Tar files of external corpora, read in place from front to back within limits.

Nothing is extracted: names become keys, and links and devices are skipped. A tar may have any size
and any number of members, because no member is kept. Two kinds of tar are rejected: one that
expands to 200 times its size, and one whose names or attributes would fill the memory.
"""

import contextlib
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO

from pipelines.data.io.archive import ArchiveLimits, UnsafeArchiveError, open_with_budget
from pipelines.data.io.source_file import SourceReadError

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
