"""Tars of the user's corpora, read in place, front to back, behind limits.

Nothing is extracted: names are compared and told, links and devices are passed over. A tar may be
of any size and have any number of members, for none of them is kept. What is refused is what no
honest one does: to expand to 200 times its size, or to have a name or an attribute that is a
flood of bytes, which Python would take into memory.
"""

import contextlib
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO

from pipelines.io.archive import ArchiveLimits, UnsafeArchiveError, open_with_budget
from pipelines.io.source_file import SourceReadError

#: ``member`` is the reader's to say.
TAR_LIMITS = ArchiveLimits(total=2**62, members=2**62)
TRUNCATED_ARCHIVE = "the archive is cut short or damaged"


class TarReadError(Exception):
    """Why a tar cannot be read on: short, for rows are counted by it."""


class TarReader:
    """The regular files of a tar, plain or compressed by gzip or bzip2.

    Args:
        path: path or URI, for messages.
        file: opened, and able to seek. It stays open.
        ranges: the tar is plain, and members are to be found by their place in it: what lies
            between their heads is passed over rather than read.

    Raises:
        BadTar: it is damaged, or no honest tar; here and while it is read.
    """

    def __init__(self, path: str, file: IO[bytes], ranges: bool = False) -> None:
        with _told():
            self._meter = open_with_budget(path, file, TAR_LIMITS)
            mode = "r:" if ranges else "r|"
            self._tar = tarfile.open(fileobj=self._meter, mode=mode)  # type: ignore[call-overload]  # noqa: SIM115

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """The members that were not yet passed."""
        while True:
            with _told():
                entry = self._tar.next()
            if entry is None:
                return
            self._tar.members = []  # type: ignore[attr-defined]  # it would keep all it has seen
            # To pass over a member of a compressed tar is to read it.
            self._meter.allow(entry.size + TAR_LIMITS.headers)
            if entry.isreg():
                yield entry

    def read(self, entry: tarfile.TarInfo) -> bytes:
        """The bytes of the member that came last."""
        with _told():
            found = self._tar.extractfile(entry)
            assert found is not None, "a regular file has content"
            return found.read()

    def close(self) -> None:
        """Let go of it; the file stays open."""
        self._tar.close()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except UnsafeArchiveError as problem:
        raise TarReadError(f"the archive is refused: {problem.why}") from None
    except SourceReadError:
        raise
    except RecursionError:  # tarfile takes headers of headers one inside the other
        raise TarReadError("the archive is refused: headers without end") from None
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError):
        raise TarReadError(TRUNCATED_ARCHIVE) from None
