"""Source files of corpora, on a disk or in a store. A failing disk or store is not bad data.

An unavailable store is asked again for ``$SKILLNET_STORE_PATIENCE`` seconds, and reading resumes
at the byte where it broke off. After that time ``StoreUnavailableError`` is raised. A failing disk
raises ``SourceReadError``. Neither is an ``OSError``: readers of damaged gzip, tar or JSON files
catch ``OSError`` and would reject rows.
"""

import contextlib
import io
import json
import os
import stat
from collections.abc import Callable
from functools import lru_cache
from typing import IO, Any, TypeVar, cast

from skillnet_platform.errors import UserError
from skillnet_platform.storage import human_bytes
from skillnet_platform.storage.directories import open_store, require_no_secret
from skillnet_platform.storage.retry import retry_transient

Result = TypeVar("Result")
#: Bytes of a buffer: each unbuffered read passes through Python.
_AHEAD = 1 << 18
#: Errors that concern one file, and not its disk or store.
PER_FILE_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class NotRegularFileError(UserError):
    """A path leads to a pipe, a device or a socket, which may block or never end."""


class SourceReadError(UserError):
    """The disk or store of a file fails. The file itself may be intact."""


def make_read_error(path: object, error: OSError) -> SourceReadError:
    """Return the error of a file that cannot be read because its disk fails.

    Args:
        path: path or URI of the file.
        error: error of the operating system.
    """
    why = error.strerror or f"{type(error).__name__}: {error}"
    return SourceReadError(
        f"{path}: cannot be read ({why}). Its disk or mount fails, or this machine reached a "
        "limit; no row was rejected for that. Fix it, or remove the file, and run the same command "
        "again"
    )


@lru_cache(maxsize=32)
def _open_filesystem(root: str) -> Any:
    try:
        return open_store(root)[0]
    except (ImportError, ValueError) as error:
        import pyarrow as pa
        from fsspec.implementations.arrow import ArrowFSWrapper
        from pyarrow.fs import FileSystem

        try:
            return ArrowFSWrapper(FileSystem.from_uri(root)[0])
        except (pa.ArrowInvalid, OSError):
            raise UserError(f"{root}: cannot be opened ({error})") from None


def open_filesystem(uri: str) -> Any:
    """Return the fsspec file system of a URI.

    fsspec's own driver is used if it is installed, else the driver of pyarrow (S3, GCS, HDFS).

    Raises:
        UserError: no driver opens such a URI.
    """
    require_no_secret(uri)
    scheme, _, rest = uri.partition("://")
    return _open_filesystem(f"{scheme}://{rest.split('/', 1)[0]}")


def query_store(uri: str, action: Callable[[Any, str], Result]) -> Result:
    """Run an action on the store of a URI, with retries while the store is unavailable.

    Args:
        uri: URI in the store.
        action: is called with the file system and the path in it.

    Returns:
        The result of ``action``.

    Raises:
        FileNotFoundError: there is no such object.
        UserError, StoreUnavailableError: see :mod:`pipelines.data.io.source_file` and
            :mod:`skillnet_platform.storage.retry`.
    """
    system = open_filesystem(uri)
    path = str(system._strip_protocol(uri))

    def once() -> tuple[Result | None, Exception | None]:
        try:
            return action(system, path), None
        except FileNotFoundError as error:  # an answer of the store: no retry
            return None, error

    try:
        result, missing = retry_transient(uri, once)
    except PER_FILE_ERRORS:
        raise
    except OSError as error:
        raise make_read_error(uri, error) from error
    if missing is not None:
        raise missing
    return cast("Result", result)


def is_remote(path: str) -> bool:
    """Return whether a path is a URI of anything but a local file."""
    scheme, mark, _ = path.partition("://")
    return bool(mark) and scheme not in ("file", "local")


def strip_file_scheme(path: str) -> str:
    """Return a local path without the scheme that it may have."""
    return path.partition("://")[2] if "://" in path else path


def identify_source(path: str) -> tuple[int, ...]:
    """Return values that change when a local file is replaced; nothing for a file of a store."""
    if is_remote(path):
        return ()
    try:
        info = os.stat(strip_file_scheme(path))  # noqa: PTH116 - called for every block
    except OSError:
        return (-1,)
    return info.st_ino, info.st_size, info.st_mtime_ns


def check_regular_file(path: str) -> None:
    """Check that a local path is not a named pipe, a device or a socket.

    Reading from one of those may block or never end.

    Raises:
        NotRegularFileError: the path is one of those.
    """
    info = os.stat(path)  # noqa: PTH116 - called for many files
    if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
        raise NotRegularFileError(f"{path}: a pipe, device or socket; expected a regular file")


def read_bounded(path: str | os.PathLike[str], max_bytes: int, allow_pipe: bool = False) -> bytes:
    """Return the content of a local file that may be hostile.

    Args:
        path: file to read.
        max_bytes: a longer file is rejected before more of it is read.
        allow_pipe: also read a pipe, which the user names on purpose, such as ``/dev/stdin``.

    Raises:
        OSError: the file is missing or cannot be read.
        NotRegularFileError: the path leads to a device, a socket or a pipe.
        UserError: the file is too large.
    """
    about = os.stat(path)  # noqa: PTH116 - also takes paths that are no Path
    kind, size = about.st_mode, about.st_size
    if not (allow_pipe and stat.S_ISFIFO(kind)):
        if allow_pipe and not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise NotRegularFileError(f"{path}: a device or socket; expected a file or a pipe")
        check_regular_file(os.fspath(path))
    data = b""
    if size <= max_bytes:
        with open(path, "rb") as stream:  # noqa: PTH123 - also takes paths that are no Path
            data = stream.read(max_bytes + 1)
    if max(size, len(data)) > max_bytes:
        raise UserError(f"{path}: larger than {human_bytes(max_bytes)}; give a smaller file")
    return data


def open_stream(path: str) -> IO[bytes]:
    """Open a local file or a URI for reading.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: there is no such file, or no
            permission to read it.
        SourceReadError, StoreUnavailableError: its disk or store fails, now or while it is read.
        NotRegularFileError: the path leads to a pipe, device or socket.
        UserError: no driver opens the URI.
    """
    if is_remote(path):
        return io.BufferedReader(_StoreFile(path), _AHEAD)
    try:
        check_regular_file(strip_file_scheme(path))
        return io.BufferedReader(_LocalFile(strip_file_scheme(path)), _AHEAD)
    except PER_FILE_ERRORS:
        raise
    except OSError as error:
        raise make_read_error(path, error) from None


class _LocalFile(io.FileIO):
    """Local file whose disk may fail."""

    def readinto(self, buffer: Any) -> int:  # type: ignore[override]
        try:
            return super().readinto(buffer) or 0
        except OSError as error:
            raise make_read_error(self.name, error) from None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except OSError as error:
            raise make_read_error(self.name, error) from None

    def readall(self) -> bytes:
        try:
            return super().readall() or b""
        except OSError as error:
            raise make_read_error(self.name, error) from None


class _StoreFile(io.RawIOBase):
    """File of a store. It is opened again after an error, because the client may be broken."""

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
                f"{self._uri}: its store does not report its size; copy it elsewhere"
            )
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size or 0}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        try:
            data = query_store(self._uri, lambda system, path: self._read(system, path, len(view)))
        except PER_FILE_ERRORS as error:
            raise make_read_error(self._uri, error) from None
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._close_file()
        super().close()

    def _read(self, system: Any, path: str, count: int) -> bytes:
        if self._file is None:
            self._open(system, path)
        try:
            if self._file.tell() != self._at:
                self._file.seek(self._at)
            return bytes(self._file.read(count))
        except BaseException:
            self._close_file()
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

    def _close_file(self) -> None:
        file, self._file = getattr(self, "_file", None), None
        if file is not None:
            with contextlib.suppress(Exception):  # the connection may be broken already
                file.close()


def format_json_line(line: dict[str, Any]) -> str:
    """Return an object as one line. Characters that UTF-8 cannot encode are escaped."""
    text = json.dumps(line, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"
