"""Files of the user's corpora, on a disk or in a store, opened so that a disk or a store that
fails is not taken for damage of what it holds.

A store that is away is asked again for ``$SKILLNET_STORE_PATIENCE`` seconds, and a file is read on
where it broke off. Past that, ``StoreUnavailable``; a disk that fails raises ``SourceFails``.
Neither is an ``OSError``: what reads a damaged gzip, tar or JSON file catches those, and would set
rows aside.
"""

import contextlib
import io
import os
import stat
from collections.abc import Callable
from functools import lru_cache
from typing import IO, Any, TypeVar, cast

from skillnet_platform.errors import UserError
from skillnet_platform.storage.objects import S3_OPTIONS
from skillnet_platform.storage.retry import steadily

Result = TypeVar("Result")
#: Bytes read ahead of a file: each read of it passes through Python.
_AHEAD = 1 << 18
#: What says something of one file, not of the disk or the store that it lies on.
PER_FILE_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class SourceReadError(UserError):
    """A file's disk or store fails: nothing is known of the file."""


def make_read_error(path: object, problem: OSError) -> SourceReadError:
    """The message that a file cannot be read for no fault of its own."""
    why = problem.strerror or f"{type(problem).__name__}: {problem}"
    return SourceReadError(
        f"{path}: cannot be read ({why}). Its disk or mount fails, or this machine is at a limit; "
        "no row is set aside for that. Mend it, or take the file away, and run the same command "
        "again"
    )


@lru_cache(maxsize=32)
def _opened(root: str) -> Any:
    import fsspec

    options = S3_OPTIONS if root.startswith(("s3://", "s3a://")) else {}
    try:
        return fsspec.core.url_to_fs(root, **options)[0]
    except (ImportError, ValueError) as problem:
        import pyarrow as pa
        from fsspec.implementations.arrow import ArrowFSWrapper
        from pyarrow.fs import FileSystem

        try:
            return ArrowFSWrapper(FileSystem.from_uri(root)[0])
        except (pa.ArrowInvalid, OSError):
            raise UserError(f"{root}: cannot be opened ({problem})") from None


def open_filesystem(uri: str) -> Any:
    """The fsspec file system of a URI.

    fsspec's own driver is taken where it is installed, else that of pyarrow (S3, GCS, HDFS).

    Raises:
        UserError: nobody opens such a URI.
    """
    scheme, _, rest = uri.partition("://")
    return _opened(f"{scheme}://{rest.split('/', 1)[0]}")


def query_store(uri: str, action: Callable[[Any, str], Result]) -> Result:
    """Ask the store of a URI, patiently: ``action`` gets its file system and the path in it.

    Raises:
        FileNotFoundError: there is no such object.
        UserError, StoreUnavailable: see :func:`remote_errors.steadily`.
    """
    system = open_filesystem(uri)
    path = str(system._strip_protocol(uri))

    def once() -> tuple[Result | None, Exception | None]:
        try:
            return action(system, path), None
        except FileNotFoundError as problem:  # an answer: nothing is refused, and none is away
            return None, problem

    try:
        found, missing = steadily(uri, once)
    except PER_FILE_ERRORS:
        raise
    except OSError as problem:
        raise make_read_error(uri, problem) from problem
    if missing is not None:
        raise missing
    return cast("Result", found)


def is_remote(path: str) -> bool:
    """Whether it is a URI of something else than a local file."""
    scheme, mark, _ = path.partition("://")
    return bool(mark) and scheme not in ("file", "local")


def strip_file_scheme(path: str) -> str:
    """A local path without the scheme that it may carry."""
    return path.partition("://")[2] if "://" in path else path


def check_regular_file(path: str) -> None:
    """UserError if a local file is a named pipe, a device or a socket: it would be waited for, or
    read, without end."""
    about = os.stat(path)  # noqa: PTH116 - called for many files
    if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
        raise UserError(f"{path}: a pipe, device or socket; expected a regular file")


def open_stream(path: str) -> IO[bytes]:
    """Open a local file or a URI to be read.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: there is no such file, or it is not
            ours to read.
        SourceFails, StoreUnavailable: its disk or its store fails, now or while it is read.
        UserError: nobody opens such a URI; or it is no regular file.
    """
    if is_remote(path):
        return io.BufferedReader(_InStore(path), _AHEAD)
    try:
        check_regular_file(strip_file_scheme(path))
        return io.BufferedReader(_OnDisk(strip_file_scheme(path)), _AHEAD)
    except PER_FILE_ERRORS:
        raise
    except OSError as problem:
        raise make_read_error(path, problem) from None


class _OnDisk(io.FileIO):
    """A file of a disk that may fail."""

    def readinto(self, buffer: Any) -> int:  # type: ignore[override]
        try:
            return super().readinto(buffer) or 0
        except OSError as problem:
            raise make_read_error(self.name, problem) from None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except OSError as problem:
            raise make_read_error(self.name, problem) from None

    def readall(self) -> bytes:
        try:
            return super().readall() or b""
        except OSError as problem:
            raise make_read_error(self.name, problem) from None


class _InStore(io.RawIOBase):
    """A file of a store. After an error it is opened anew: a client's state may be broken."""

    def __init__(self, uri: str) -> None:
        self._uri, self._at = uri, 0
        self._size: int | None = None
        self._file: Any = None
        query_store(uri, self._open)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size is None:
            raise SourceReadError(
                f"{self._uri}: its store does not tell its size; copy it elsewhere"
            )
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size or 0}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        try:
            data = query_store(self._uri, lambda system, path: self._read(system, path, len(view)))
        except PER_FILE_ERRORS as problem:
            raise make_read_error(self._uri, problem) from None
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, system: Any, path: str, count: int) -> bytes:
        if self._file is None:
            self._open(system, path)
        try:
            if self._file.tell() != self._at:
                self._file.seek(self._at)
            return bytes(self._file.read(count))
        except BaseException:
            self._drop()
            raise

    def _open(self, system: Any, path: str) -> None:
        self._file = system.open(path, "rb")
        size = getattr(self._file, "size", None)
        if callable(size):  # pyarrow's
            size = size()
        if self._size is not None and size != self._size:
            raise SourceReadError(
                f"{self._uri}: it was replaced while it was read; run the same command again"
            )
        self._size = size

    def _drop(self) -> None:
        file, self._file = getattr(self, "_file", None), None
        if file is not None:
            with contextlib.suppress(Exception):  # of a connection that is broken already
                file.close()
