"""References to media, and reading them where and when their bytes are needed.

A corpus of the user's own does not carry pictures, recordings and clips through the tasks that
read its rows: ``Corpus.rows`` yields *references*, a few words each, in a raw column of the type
``MEDIA``; ``Corpus.transform`` calls ``read_media`` on a block's column and decodes one file after
the other, on workers in parallel. A reference names

* a file: ``MediaRef("/corpora/clips/a.mp4")``, or by any URI that fsspec or pyarrow opens;
* a range of bytes of one, such as a member of an uncompressed tar: ``MediaRef(tar, 512, 9_310)``;
* a member of a compressed tar, which has no ranges: ``MediaRef(tar_gz, member="S0002/a.wav")``.
  Rows in the order of the archive are read front to back; where a block ends in the midst of
  one, the next block of the same process goes on from there.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from pipelines.io import prefetch
from pipelines.io.prefetch import OrderedPrefetcher
from pipelines.io.source_file import (
    PER_FILE_ERRORS,
    is_remote,
    make_read_error,
    open_stream,
    query_store,
    strip_file_scheme,
)
from pipelines.io.tar import TarReader, TarReadError
from skillnet_platform.storage import human_bytes

#: Type of a raw column of references: ``pa.field("media", MEDIA)``. A null is a row without any.
MEDIA = pa.struct(
    [
        pa.field("path", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("member", pa.string()),
    ]
)
#: Larger files are set aside unless a corpus says otherwise.
MAX_MEDIA_BYTES = 256 * 2**20
#: What a local file's own name or kind is to blame for; anything else is its disk's failing.
_OF_THE_NAME = {errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO, errno.EILSEQ}


@dataclass(frozen=True)
class MediaRef:
    """Where the bytes of a picture, recording or clip lie.

    Args:
        path: an absolute local path, or a URI.
        offset: first byte, from 0; none is the start.
        length: number of bytes; none is all of them.
        member: name in the tar archive ``path``, instead of ``offset``.
    """

    path: str
    offset: int | None = None
    length: int | None = None
    member: str | None = None

    def row(self) -> dict[str, Any]:
        """The value for a column of the type ``MEDIA``."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else self.path


@dataclass(frozen=True)
class MediaReadError:
    """Stands for bytes that could not be had. ``reason`` is short: rows are counted by it."""

    reason: str


def read_media(
    references: pa.Array | pa.ChunkedArray | Iterable[dict[str, Any] | None],
    max_bytes: int = MAX_MEDIA_BYTES,
) -> Iterator[bytes | MediaReadError]:
    """The bytes of each reference, in order and one at a time, so that memory holds one file.

    The next ones are read ahead: see :mod:`pipelines.io.prefetch`. Of files in a store those that
    wait are held, 32 MiB of them.

    Args:
        references: a column of the type ``MEDIA``, or its values.
        max_bytes: a longer file is not read.

    Yields:
        The bytes, or why this row has none: missing, empty, too large, cut short, not a file.

    Raises:
        UserError, StoreUnavailable: a disk that fails, or a store that is away for longer than
            ``$SKILLNET_STORE_PATIENCE``: that is not the row's fault.
    """
    values = references.to_pylist() if hasattr(references, "to_pylist") else references
    wanted = [_reference(value) for value in values]
    with _archives() as archives, _fetched(wanted, max_bytes) as fetched:
        for number, reference in enumerate(wanted):
            _tell(wanted, number + prefetch.ADVISED_FILES)
            if reference is None:
                yield MediaReadError("no media file")
                continue
            try:
                if reference.member is not None:
                    data = archives.read(reference, max_bytes)
                elif is_remote(reference.path):
                    data = fetched.next_result()
                else:
                    data = _read(reference, max_bytes)
            except _Refused as problem:
                yield MediaReadError(str(problem))
                continue
            yield data if data else MediaReadError("an empty file")


def _reference(value: dict[str, Any] | None) -> MediaRef | None:
    return None if value is None or value.get("path") is None else MediaRef(**value)


@contextlib.contextmanager
def _fetched(wanted: list[MediaRef | None], max_bytes: int) -> Iterator[OrderedPrefetcher[bytes]]:
    """The bytes of those that lie in a store by themselves or as ranges, in order."""
    remote = [r for r in wanted if r is not None and r.member is None and is_remote(r.path)]

    def fetch(number: int, grant: Callable[[int], None]) -> bytes:
        return _read_remote(remote[number], max_bytes, grant)

    ahead = OrderedPrefetcher(len(remote), fetch)
    try:
        yield ahead
    finally:
        ahead.close()


def _tell(wanted: list[MediaRef | None], number: int) -> None:
    """Have the kernel read a local file that is wanted soon."""
    reference = wanted[number] if number < len(wanted) else None
    if reference is not None and reference.member is None and not is_remote(reference.path):
        prefetch.advise_kernel(
            strip_file_scheme(reference.path), reference.offset or 0, reference.length
        )


class _Refused(Exception):
    """Why one row has no bytes."""


def _read(reference: MediaRef, max_bytes: int) -> bytes:
    try:
        return _read_local(reference, max_bytes)
    except (FileNotFoundError, NotADirectoryError):
        raise _Refused("the media file is missing") from None
    except PermissionError:
        raise _Refused("no permission to read the media file") from None
    except OSError as problem:
        if problem.errno not in _OF_THE_NAME:
            raise make_read_error(reference.path, problem) from None
        raise _Refused(f"the media file cannot be read ({problem.strerror})") from None
    except ValueError as problem:  # a null character
        raise _Refused(f"the media file cannot be read ({problem})") from None


def _read_local(reference: MediaRef, max_bytes: int) -> bytes:
    path = strip_file_scheme(reference.path)
    about = os.stat(path)  # noqa: PTH116 - a hot path
    if not stat.S_ISREG(about.st_mode):
        raise _Refused("not a regular file")  # opening a named pipe would wait for ever
    start = reference.offset or 0
    length = about.st_size - start if reference.length is None else reference.length
    _limit(length, max_bytes)
    with open(path, "rb", buffering=0) as stream:  # noqa: PTH123 - a hot path
        stream.seek(start)
        data = _exactly(stream, length)
    if len(data) < length:
        raise _Refused("cut short: the file ends before the media")
    return data


def _exactly(stream: IO[bytes], length: int) -> bytes:
    """Up to ``length`` bytes: an unbuffered file may give fewer at once."""
    parts = [stream.read(length)]
    while (left := length - sum(map(len, parts))) > 0 and parts[-1]:
        parts.append(stream.read(left))
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_remote(reference: MediaRef, max_bytes: int, grant: Callable[[int], None]) -> bytes:
    start = reference.offset or 0

    def read(system: Any, path: str) -> tuple[int, bytes]:
        length = reference.length
        try:
            if length is None:
                length = int(system.info(path)["size"]) - start
            _limit(length, max_bytes)
            grant(length)
            data = system.cat_file(path, start=start, end=start + length) if length > 0 else b""
        except (FileNotFoundError, IsADirectoryError):
            raise _Refused("the media file is missing") from None
        except PermissionError:
            raise _Refused("no permission to read the media file") from None
        return length, data

    wanted, data = query_store(reference.path, read)
    if len(data) < wanted:
        raise _Refused("cut short: the file ends before the media")
    return data


class _Archives:
    """Reads members of compressed tars front to back, keeping one archive open."""

    def __init__(self) -> None:
        self.path = ""
        self.state: tuple[int, ...] = ()
        self.archive: TarReader | None = None
        self.stream: IO[bytes] | None = None

    def read(self, reference: MediaRef, max_bytes: int) -> bytes:
        """The bytes of a member; one that lies further back is looked for from the start."""
        fresh = reference.path != self.path or self.archive is None
        for _ in range(1 if fresh else 2):
            try:
                if fresh:
                    self._open(reference.path)
                data = self._next(reference.member, max_bytes)
            except FileNotFoundError:
                raise _Refused("the archive is missing") from None
            except TarReadError as problem:
                self.close()
                raise _Refused(str(problem)) from None
            except PER_FILE_ERRORS as problem:
                self.close()
                raise _Refused(f"the archive cannot be opened ({problem.strerror})") from None
            if data is not None:
                return data
            fresh = True
        self.close()
        raise _Refused("not in its archive")

    def is_current(self) -> bool:
        """Whether the open archive is still the file of its name; of a store that is assumed."""
        return self.archive is not None and self.state == _state(self.path)

    def _open(self, path: str) -> None:
        self.close()
        self.path, self.state, self.stream = path, _state(path), open_stream(path)
        self.archive = TarReader(path, self.stream)

    def _next(self, member: str | None, max_bytes: int) -> bytes | None:
        assert self.archive is not None
        for entry in self.archive:
            if entry.name == member:
                _limit(entry.size, max_bytes)
                return self.archive.read(entry)
        return None

    def close(self) -> None:
        """Let go of the archive."""
        for opened in (self.archive, self.stream):
            if opened is not None:
                opened.close()
        self.path, self.archive, self.stream = "", None, None


#: Of this process, the archive that a block ended in: the next block mostly goes on from there.
_left_open: list[_Archives] = []


@contextlib.contextmanager
def _archives() -> Iterator[_Archives]:
    """Archives for one block, with the one in which the last block ended open as it was left."""
    archives = _left_open.pop() if _left_open else _Archives()
    try:
        if not archives.is_current():
            archives.close()
        yield archives
    except BaseException:
        archives.close()
        raise
    if not _left_open:
        _left_open.append(archives)
    else:  # of another thread
        archives.close()


def _state(path: str) -> tuple[int, ...]:
    """What tells that a local file was replaced."""
    if is_remote(path):
        return ()
    try:
        about = Path(strip_file_scheme(path)).stat()
    except OSError:
        return (-1,)
    return about.st_ino, about.st_size, about.st_mtime_ns


def _limit(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise _Refused(f"a media file larger than {human_bytes(max_bytes)}")
