"""Media references, and reading of media bytes where and when they are needed.

An external corpus does not carry images, audio and videos through the tasks that read its rows.
``Corpus.rows`` yields small *references* in a raw column of the type ``MEDIA``.
``Corpus.transform`` calls ``read_media`` on the column of a block and decodes one file after the
other, on parallel workers. A reference names one of these:

* a file: ``MediaRef("/corpora/videos/a.mp4")``, or any URI that fsspec or pyarrow opens;
* a range of bytes, such as a member of an uncompressed tar: ``MediaRef(tar, 512, 9_310)``;
* a member of a compressed tar, which has no ranges: ``MediaRef(tar_gz, member="S0002/a.wav")``;
* a row of a column of a Parquet file: ``MediaRef(parquet, member="image", row_number=17)``.

Rows in the order of a compressed tar or a Parquet file are read front to back. If a block ends
inside such a file, the next block of the same process continues there.

The next files of a block are read while the current one is decoded. Decoding a file takes about ten
milliseconds. Finding it takes one on a disk and thirty in an object store, and sequential requests
would wait each time.

* For files on a disk, the kernel is advised and reads them into its cache. Nothing is held here.
* From an object store, threads fetch several objects at once, in the order of their use. Besides
  the next object, at most ``MAX_WAITING_BYTES`` are held.

The columns of a Parquet file are compressed in row groups, so its media have no byte ranges.
:class:`ParquetCells` reads them by column and row.
"""

import contextlib
import errno
import os
import stat
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import IO, Any, Generic, TypeVar

import pyarrow as pa

from pipelines.data.io.archive import TarReader, TarReadError
from pipelines.data.io.source_file import (
    PER_FILE_ERRORS,
    NotRegularFileError,
    identify_source,
    is_remote,
    make_read_error,
    open_stream,
    query_store,
    strip_file_scheme,
)
from skillnet.modality import list_modalities
from skillnet_platform.storage import human_bytes

#: Rows in memory at once. Each can hold a video, and one dictionary entry can fill all of them.
CELLS_PER_BATCH = 4
#: Part of ``struct<bytes, path>`` that holds the content of the file.
BYTES_PART = "bytes"


class CellReadError(ValueError):
    """A media of a Parquet file cannot be read; rows are counted by the text."""


class ParquetCells:
    """Reader of the media in one column that keeps its Parquet file open.

    Rows in ascending order are read front to back, a few at a time. An earlier row is found from
    the start of its row group.
    """

    def __init__(self) -> None:
        self._stream: IO[bytes] | None = None
        self.close()

    def read(self, path: str, column: str, row: int) -> bytes:
        """Return the bytes of one media.

        Args:
            path: path or URI of the Parquet file.
            column: column of the media: binary, or a struct with the part ``bytes``.
            row: number of its row in the file, from 0.

        Raises:
            CellReadError: the file is damaged, or has no such row or value.
            SourceReadError, StoreUnavailableError: the disk or the store fails.
        """
        try:
            if (path, column) != self._opened:
                self._open(path, column)
            cell = self._find(row)
        except PER_FILE_ERRORS as error:
            self.close()
            raise CellReadError(f"the Parquet file cannot be opened ({error.strerror})") from None
        # A failing disk or store raises neither of these.
        except (pa.ArrowException, OSError, UnicodeDecodeError, LookupError):
            self.close()
            raise CellReadError("the Parquet file is damaged") from None
        if cell is None:
            raise CellReadError("no media file")
        return cell

    def is_current(self) -> bool:
        """Return whether the open file is still the file of its path; assumed for stores."""
        return self._file is not None and self._state == identify_source(self._opened[0])

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        self._opened: tuple[str, str] = ("", "")
        self._state: tuple[int, ...] = ()
        self._file: Any = None
        # Number of the first row of each row group, and of the row after the last group.
        self._starts: list[int] = []
        # The row group that is read, the number of the first cell in memory, and the cells.
        self._group, self._start = -1, 0
        self._cells: list[bytes | None] = []
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def _open(self, path: str, column: str) -> None:
        import pyarrow.parquet as pq

        self.close()
        self._state, self._stream = identify_source(path), open_stream(path)
        self._file, self._opened = pq.ParquetFile(self._stream), (path, column)
        groups = range(self._file.metadata.num_row_groups)
        sizes = (self._file.metadata.row_group(group).num_rows for group in groups)
        self._starts = list(accumulate(sizes, initial=0))

    def _find(self, row: int) -> bytes | None:
        group = bisect_right(self._starts, row) - 1
        if group != self._group or row < self._start:
            column = self._opened[1]
            nested = pa.types.is_struct(self._file.schema_arrow.field(column).type)
            leaf = f"{column}.{BYTES_PART}" if nested else column
            self._batches = self._file.iter_batches(CELLS_PER_BATCH, [group], [leaf])
            self._group, self._start, self._cells = group, self._starts[group], []
        while row >= self._start + len(self._cells):
            self._start += len(self._cells)
            batch = next(self._batches, None)
            if batch is None:
                raise LookupError(row)
            # The full check reads every offset; following a damaged one ends the process.
            batch.validate(full=True)
            (values,) = batch.columns
            is_nested = pa.types.is_struct(values.type)
            self._cells = (values.field(BYTES_PART) if is_nested else values).to_pylist()
        return self._cells[row - self._start]


Result = TypeVar("Result")

#: Files on a disk that the kernel is advised of, and bytes of each file.
ADVISED_FILES, ADVISED_BYTES = 2, 8 * 2**20
#: Objects of a store that are fetched at once.
MAX_FETCHES = 8
#: Bytes that wait to be used, besides the next object.
MAX_WAITING_BYTES = 32 * 2**20


class PrefetchClosedError(Exception):
    """The prefetcher was closed while a fetch waited for memory."""


def advise_kernel(path: str, offset: int, length: int | None) -> None:
    """Advise the kernel to read a part of a local file soon. Errors are left to the reader.

    Args:
        path: local file.
        offset: first byte.
        length: number of bytes; ``None`` for the rest of the file.
    """
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return
    try:
        # Opening a device can have an effect, and a named pipe waits for a writer.
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - a hot path
            return
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return
    try:
        advise(file, offset, min(length or ADVISED_BYTES, ADVISED_BYTES), os.POSIX_FADV_WILLNEED)
    except (OSError, OverflowError):
        pass
    finally:
        os.close(file)


class OrderedPrefetcher(Generic[Result]):
    """Results of a function of 0, 1, 2 …, computed ahead by threads and returned in order.

    Args:
        count: number of results.
        fetch: computes the result of an index. Its second argument is a function that it calls
            with the number of bytes that it will hold, and that returns when there is room.
        streams: results that are computed at once.
        held: bytes that may wait, besides the next result.
        ahead: results that are computed or wait; at least ``streams``.
        initializer: called by each thread when it starts.
    """

    def __init__(
        self,
        count: int,
        fetch: Callable[[int, Callable[[int], None]], Result],
        streams: int = MAX_FETCHES,
        held: int = MAX_WAITING_BYTES,
        ahead: int = 0,
        initializer: Callable[[], None] | None = None,
    ) -> None:
        self._count, self._fetch, self._max_held = count, fetch, held
        self._room = threading.Condition()
        self._sizes: dict[int, int] = {}
        self._next = 0
        self._closed = False
        self._pool = ThreadPoolExecutor(streams, "prefetch", initializer)
        self._waiting: deque[Future[Result]] = deque()
        self._submitted = 0
        for _ in range(max(streams, ahead)):
            self._submit()

    def next_result(self) -> Result:
        """Return the next result, or raise the exception of its function."""
        future = self._waiting.popleft()
        try:
            return future.result()
        finally:
            with self._room:
                self._sizes.pop(self._next, None)
                self._next += 1
                self._room.notify_all()
            self._submit()

    def __iter__(self) -> Iterator[Result]:
        for _ in range(self._count):
            yield self.next_result()

    def close(self, wait: bool = False) -> None:
        """Drop the results of running fetches, which end in the background or are waited for."""
        with self._room:
            self._closed = True
            self._room.notify_all()
        self._pool.shutdown(wait, cancel_futures=True)

    def _submit(self) -> None:
        if self._submitted < self._count:
            index = self._submitted
            self._submitted += 1
            self._waiting.append(self._pool.submit(self._run, index))

    def _run(self, index: int) -> Result:
        return self._fetch(index, lambda size: self._wait_for_room(index, size))

    def _wait_for_room(self, index: int, size: int) -> None:
        with self._room:
            self._sizes.pop(index, None)  # of an earlier attempt of the same fetch
            # The next result never waits, so at least one fetch always makes progress.
            self._room.wait_for(
                lambda: (
                    self._closed
                    or index == self._next
                    or sum(self._sizes.values()) + size <= self._max_held
                )
            )
            if self._closed:
                raise PrefetchClosedError
            self._sizes[index] = size


#: Type of a raw column of references: ``pa.field("media", MEDIA)``. A null is a row without any.
MEDIA = pa.struct(
    [
        pa.field("path", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("member", pa.string()),
        pa.field("row_number", pa.int64()),
    ]
)
#: Rows with larger files are rejected, unless a corpus sets another limit.
MAX_MEDIA_BYTES = 256 * 2**20
#: Errors that the name or kind of a local file causes. Other errors are those of its disk.
_NAME_ERRORS = {errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO, errno.EILSEQ}


@dataclass(frozen=True)
class MediaRef:
    """Location of the bytes of an image, audio or video.

    Args:
        path: an absolute local path, or a URI.
        offset: first byte, from 0; ``None`` is the start.
        length: number of bytes; ``None`` is the rest of the file.
        member: name in the tar archive ``path``, or column of the Parquet file ``path``, instead of
            ``offset``.
        row_number: number of the row in a Parquet file, from 0.
    """

    path: str
    offset: int | None = None
    length: int | None = None
    member: str | None = None
    row_number: int | None = None

    def row(self) -> dict[str, Any]:
        """Return the value for a column of the type ``MEDIA``."""
        return asdict(self)

    def __str__(self) -> str:
        if self.row_number is not None:
            return f"{self.path}: {self.member}, row {self.row_number + 1}"
        return f"{self.path}/{self.member}" if self.member else self.path


@dataclass(frozen=True)
class MediaReadError:
    """Value in place of bytes that could not be read. Rows are counted by its short reason."""

    reason: str


def read_media(
    references: pa.Array | pa.ChunkedArray | Iterable[dict[str, Any] | None],
    max_bytes: int = MAX_MEDIA_BYTES,
) -> Iterator[bytes | MediaReadError]:
    """Yield the bytes of each reference in order, one at a time, so memory holds one file.

    The next files are prefetched, see :mod:`pipelines.data.io.media`. Prefetched files of a
    store take at most 32 MiB.

    Args:
        references: column of the type ``MEDIA``, or its values.
        max_bytes: longer files are not read.

    Yields:
        The bytes, or the reason why this row has none: the file is missing, empty, too large,
        truncated, or not a regular file.

    Raises:
        UserError, StoreUnavailableError: a disk fails, or a store is unavailable for longer than
            ``$SKILLNET_STORE_PATIENCE``. No row causes these errors.
    """
    values = references.to_pylist() if hasattr(references, "to_pylist") else references
    wanted = [_parse_reference(value) for value in values]
    with (
        _take_reader(_TarCache) as archives,
        _take_reader(ParquetCells) as cells,
        _prefetch_remote(wanted, max_bytes) as fetched,
    ):
        for number, reference in enumerate(wanted):
            _advise(wanted, number + ADVISED_FILES)
            if reference is None:
                yield MediaReadError("no media file")
                continue
            try:
                if reference.row_number is not None:
                    data = _read_cell(cells, reference, max_bytes)
                elif reference.member is not None:
                    data = archives.read(reference, max_bytes)
                elif is_remote(reference.path):
                    data = fetched.next_result()
                else:
                    data = _read(reference, max_bytes)
            except _RejectedError as error:
                yield MediaReadError(str(error))
                continue
            yield data if data else MediaReadError("an empty file")


def _parse_reference(value: dict[str, Any] | None) -> MediaRef | None:
    return None if value is None or value.get("path") is None else MediaRef(**value)


@contextlib.contextmanager
def _prefetch_remote(
    wanted: list[MediaRef | None], max_bytes: int
) -> Iterator[OrderedPrefetcher[bytes]]:
    """Prefetch in order the references to objects, or ranges of objects, of a store."""
    remote = [r for r in wanted if r is not None and r.member is None and is_remote(r.path)]

    def fetch(number: int, allow: Callable[[int], None]) -> bytes:
        return _read_remote(remote[number], max_bytes, allow)

    ahead = OrderedPrefetcher(len(remote), fetch)
    try:
        yield ahead
    finally:
        ahead.close()


def _advise(wanted: list[MediaRef | None], number: int) -> None:
    """Advise the kernel to read a local file that is used soon."""
    reference = wanted[number] if number < len(wanted) else None
    if reference is not None and reference.member is None and not is_remote(reference.path):
        advise_kernel(strip_file_scheme(reference.path), reference.offset or 0, reference.length)


class _RejectedError(Exception):
    """Reason why one row has no bytes."""


def _read(reference: MediaRef, max_bytes: int) -> bytes:
    try:
        return _read_local(reference, max_bytes)
    except (FileNotFoundError, NotADirectoryError):
        raise _RejectedError("the media file is missing") from None
    except PermissionError:
        raise _RejectedError("no permission to read the media file") from None
    except OSError as error:
        if error.errno not in _NAME_ERRORS:
            raise make_read_error(reference.path, error) from None
        raise _RejectedError(f"the media file cannot be read ({error.strerror})") from None
    except ValueError as error:  # a null character
        raise _RejectedError(f"the media file cannot be read ({error})") from None


def _read_local(reference: MediaRef, max_bytes: int) -> bytes:
    path = strip_file_scheme(reference.path)
    info = os.stat(path)  # noqa: PTH116 - a hot path
    if not stat.S_ISREG(info.st_mode):
        raise _RejectedError("not a regular file")  # opening a named pipe would block
    start = reference.offset or 0
    length = info.st_size - start if reference.length is None else reference.length
    _check_size(length, max_bytes)
    with open(path, "rb", buffering=0) as stream:  # noqa: PTH123 - a hot path
        stream.seek(start)
        data = _read_exactly(stream, length)
    if len(data) < length:
        raise _RejectedError("cut short: the file ends before the media")
    return data


def _read_exactly(stream: IO[bytes], length: int) -> bytes:
    """Read up to ``length`` bytes: an unbuffered file may return fewer at once."""
    parts = [stream.read(length)]
    while (left := length - sum(map(len, parts))) > 0 and parts[-1]:
        parts.append(stream.read(left))
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_remote(reference: MediaRef, max_bytes: int, allow: Callable[[int], None]) -> bytes:
    start = reference.offset or 0

    def read(system: Any, path: str) -> tuple[int, bytes]:
        length = reference.length
        try:
            if length is None:
                length = int(system.info(path)["size"]) - start
            _check_size(length, max_bytes)
            allow(length)
            data = system.cat_file(path, start=start, end=start + length) if length > 0 else b""
        except (FileNotFoundError, IsADirectoryError):
            raise _RejectedError("the media file is missing") from None
        except PermissionError:
            raise _RejectedError("no permission to read the media file") from None
        return length, data

    wanted, data = query_store(reference.path, read)
    if len(data) < wanted:
        raise _RejectedError("cut short: the file ends before the media")
    return data


def _read_cell(cells: ParquetCells, reference: MediaRef, max_bytes: int) -> bytes:
    try:
        data = cells.read(reference.path, reference.member or "", reference.row_number or 0)
    except (CellReadError, NotRegularFileError) as error:
        raise _RejectedError(str(error)) from None
    _check_size(len(data), max_bytes)
    return data


class _TarCache:
    """Reader of compressed tars from front to back that keeps one archive open."""

    def __init__(self) -> None:
        self.path = ""
        self.state: tuple[int, ...] = ()
        self.archive: TarReader | None = None
        self.stream: IO[bytes] | None = None

    def read(self, reference: MediaRef, max_bytes: int) -> bytes:
        """Return the bytes of a member. A member before the position is found from the start."""
        fresh = reference.path != self.path or self.archive is None
        for _ in range(1 if fresh else 2):
            try:
                if fresh:
                    self._open(reference.path)
                data = self._find_next(reference.member, max_bytes)
            except FileNotFoundError:
                raise _RejectedError("the archive is missing") from None
            except NotRegularFileError:
                raise _RejectedError("the archive is not a regular file") from None
            except TarReadError as error:
                self.close()
                raise _RejectedError(str(error)) from None
            except PER_FILE_ERRORS as error:
                self.close()
                raise _RejectedError(f"the archive cannot be opened ({error.strerror})") from None
            if data is not None:
                return data
            fresh = True
        self.close()
        raise _RejectedError("not in its archive")

    def is_current(self) -> bool:
        """Return whether the open archive is still the file of its path; assumed for stores."""
        return self.archive is not None and self.state == identify_source(self.path)

    def _open(self, path: str) -> None:
        self.close()
        self.path, self.state, self.stream = path, identify_source(path), open_stream(path)
        self.archive = TarReader(path, self.stream)

    def _find_next(self, member: str | None, max_bytes: int) -> bytes | None:
        assert self.archive is not None
        for entry in self.archive:
            if entry.name == member:
                _check_size(entry.size, max_bytes)
                return self.archive.read(entry)
        return None

    def close(self) -> None:
        """Close the archive."""
        for handle in (self.archive, self.stream):
            if handle is not None:
                handle.close()
        self.path, self.archive, self.stream = "", None, None


#: Reader -> its state after the last block of this process: the next block mostly continues it.
_cached: dict[type, Any] = {}
Reader = TypeVar("Reader", _TarCache, ParquetCells)


@contextlib.contextmanager
def _take_reader(kind: type[Reader]) -> Iterator[Reader]:
    """Provide a reader for one block, in the state in which the last block left it."""
    reader = _cached.pop(kind, None) or kind()
    try:
        if not reader.is_current():
            reader.close()
        yield reader
    except BaseException:
        reader.close()
        raise
    # Another thread may have cached its reader.
    if _cached.setdefault(kind, reader) is not reader:
        reader.close()


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise _RejectedError(f"a media file larger than {human_bytes(max_bytes)}")


def find_signature(data: bytes) -> tuple[str, str] | None:
    """Return (modality, format) of a media file, or None if its first bytes are unknown.

    Args:
        data: its first 16 bytes, or more.
    """
    for modality in list_modalities():
        for signature in modality.signatures:
            if signature.matches(data):
                return modality.name, signature.format
    return None


def describe_bytes(data: bytes) -> str:
    """Return the size of a file and its format if known, as ``"4,364 bytes, JPEG"``."""
    found = find_signature(data)
    return f"{len(data):,} bytes, {found[1]}" if found else f"{len(data):,} bytes"
