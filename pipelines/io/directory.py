"""A folder of the user's, on a disk or behind a URI: what is in it, in an order that is always
the same, and its files opened. Nothing is written, and no name leads out of it; links do, which
whoever laid the folder wanted so."""

import codecs
import contextlib
import gzip
import hashlib
import os
import posixpath
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipelines.io.source_file import (
    PER_FILE_ERRORS,
    check_regular_file,
    is_remote,
    make_read_error,
    open_stream,
    query_store,
    strip_file_scheme,
)
from pipelines.io.symlink_guard import SymlinkGuard
from skillnet_platform.errors import UserError

#: What a compressed file that is cut short or damaged raises while it is read.
DAMAGE_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
#: A line of more bytes is no line of a corpus.
MAX_LINE_BYTES = 64 * 2**20
#: More empty lines one after the other are no text of a corpus.
MAX_EMPTY_LINES = 2**20


class OversizedInputError(EOFError):
    """What no honest file has, and what would be read for ever or take all memory.

    It counts as ``DAMAGED``: the file is not read on. Its text is short, for rows are counted by
    it.
    """


@dataclass(frozen=True)
class DirectoryEntry:
    """Something in a folder: its name, and its size in bytes if it is a file."""

    name: str
    size: int | None

    @property
    def is_folder(self) -> bool:
        """Whether it holds others."""
        return self.size is None


class SourceDirectory:
    """A folder, or one file, by path or URI.

    Args:
        uri: a local path, or any URI that fsspec or pyarrow opens ("s3://bucket/tnews").

    Raises:
        UserError: it does not exist, nobody opens such a URI, or its path is not UTF-8.
    """

    def __init__(self, uri: str) -> None:
        self.remote = is_remote(uri)
        uri = uri if self.remote else str(Path(strip_file_scheme(uri)).expanduser().absolute())
        self.uri = uri.rstrip("/") if len(uri) > 1 else uri
        if to_printable(self.uri) != self.uri:
            raise UserError(
                f"{to_printable(self.uri)}: the path is not UTF-8, so that no manifest can name it; "
                "rename the folder, or make a link to it"
            )
        if not self._exists(self.uri):
            raise UserError(f"{uri}: no such file or folder")
        if self.remote:
            self.is_file = (
                query_store(self.uri, lambda system, path: system.info(path))["type"] == "file"
            )
        else:
            check_regular_file(self.uri)
            self.is_file = Path(self.uri).is_file()

    @property
    def name(self) -> str:
        """The last part of its path."""
        return posixpath.basename(self.uri)

    def path(self, relative: str) -> str:
        """Path or URI of what stands at ``relative`` below the folder ("" is the folder itself).

        Raises:
            ValueError: an absolute path, or one that leads out of the folder.
        """
        parts = relative.replace("\\", "/").split("/")
        if relative.startswith(("/", "\\")) or "://" in relative or ".." in parts:
            raise ValueError("a path that leads out of the folder")
        if "\0" in relative:
            raise ValueError("a path with a null character")
        clean = "/".join(part for part in parts if part not in ("", "."))
        return f"{self.uri}/{clean}" if clean else self.uri

    def exists(self, relative: str) -> bool:
        """Whether there is such a file or folder."""
        return self._exists(self.path(relative))

    def entries(self, relative: str = "") -> list[DirectoryEntry]:
        """What is in a folder, sorted by name; hidden files are passed over.

        Raises:
            FileNotFoundError, NotADirectoryError: there is no such folder.
            UserError: it may not be read, or its disk fails.
        """
        try:
            return self._scanned(relative)
        except PermissionError:
            raise UserError(f"{self.path(relative)}: no permission to read this folder") from None

    def walk(self, relative: str = "", depth: int = 16) -> Iterator[DirectoryEntry]:
        """All files below a folder, in order; each one's name is its path from this place.

        Links are followed, but not into a folder that they stand in.
        """
        yield from self._walk(relative, depth, SymlinkGuard())

    def folders(self, relative: str = "", depth: int = 4) -> Iterator[str]:
        """The folder itself and all below it, down to a depth; each before those inside it."""
        yield from self._folders(relative, depth, SymlinkGuard())

    def _walk(self, relative: str, depth: int, trail: SymlinkGuard) -> Iterator[DirectoryEntry]:
        with self._entered(relative, trail) as entered:
            for entry in self._seen(relative) if entered else ():
                below = f"{relative}/{entry.name}" if relative else entry.name
                if not entry.is_folder:
                    yield DirectoryEntry(below, entry.size)
                elif depth > 0:
                    yield from self._walk(below, depth - 1, trail)

    def _folders(self, relative: str, depth: int, trail: SymlinkGuard) -> Iterator[str]:
        with self._entered(relative, trail) as entered:
            if not entered:
                return
            yield relative
            for entry in self._seen(relative) if depth > 0 else ():
                if entry.is_folder:
                    below = f"{relative}/{entry.name}" if relative else entry.name
                    yield from self._folders(below, depth - 1, trail)

    @contextlib.contextmanager
    def _entered(self, relative: str, trail: SymlinkGuard) -> Iterator[bool]:
        """Whether a walk may go into a folder; of stores, which have no links, into any."""
        with contextlib.ExitStack() as stack:
            entered = True
            if not self.remote:
                # One that is not there has nothing in it.
                with contextlib.suppress(OSError):
                    entered = stack.enter_context(trail.enter(self.path(relative)))
            yield entered

    def _seen(self, relative: str) -> list[DirectoryEntry]:
        """What a walk sees in a folder; nothing in one that it may not read."""
        try:
            return self._scanned(relative)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return []

    def _scanned(self, relative: str) -> list[DirectoryEntry]:
        folder = self.path(relative)
        if self.remote:
            found = query_store(folder, _listed)
        else:
            try:
                with os.scandir(folder) as each:
                    found = [_entry(entry) for entry in each]
            except PER_FILE_ERRORS:
                raise
            except OSError as problem:
                raise make_read_error(folder, problem) from None
        return sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)

    def open(self, relative: str = "") -> IO[bytes]:
        """Open a file to be read front to back; one whose name ends in ``.gz`` is unpacked.

        Raises:
            UserError: there is no such file.
        """
        path = self.path(relative)
        try:
            stream = open_stream(path)
        except PermissionError:
            raise UserError(f"{path}: no permission to read it") from None
        except IsADirectoryError:
            raise UserError(f"{path}: a folder; expected a file") from None
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path}: no such file") from None
        return gzip.GzipFile(fileobj=stream) if path.endswith(".gz") else stream  # type: ignore[return-value]

    def lines(self, relative: str = "", ends: bool = False) -> Iterator[tuple[int, bytes]]:
        """Lines of a file, see :func:`iter_lines`.

        Raises:
            EOFError, zlib.error, BadGzipFile: ``DAMAGED``: a compressed file ends or breaks, or
                a line has no end.
            SourceFails, StoreUnavailable: see :func:`source_files.open_stream`.
        """
        with self.open(relative) as stream:
            yield from iter_lines(stream, ends)

    def digest(self, relative: str) -> str:
        """SHA-256 of a file as it lies there, not unpacked."""
        with open_stream(self.path(relative)) as stream:
            found = hashlib.sha256()
            while block := stream.read(1 << 20):
                found.update(block)
        return found.hexdigest()

    def _exists(self, path: str) -> bool:
        if not self.remote:
            return os.path.exists(path)  # noqa: PTH110 - called for many files
        try:
            # Not ``exists``: of most clients it says no, too, when the store does not answer.
            query_store(path, lambda system, plain: system.info(plain))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def iter_lines(stream: IO[bytes], ends: bool = False) -> Iterator[tuple[int, bytes]]:
    """Lines of a stream with their numbers, from 1; empty ones and a byte order mark are left
    out. With ``ends`` a line keeps its own: what has none stands last, and may be cut short.

    Raises:
        Flood: a line, or a run of empty ones, seems to have no end.
    """
    number = empty = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise OversizedInputError("a line longer than 64 MiB")
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        line = line if ends else line.strip(b"\r\n")
        if line.strip():
            empty = 0
            yield number, line
        elif (empty := empty + 1) > MAX_EMPTY_LINES:
            raise OversizedInputError("a flood of empty lines")


def to_printable(name: str) -> str:
    """A file's name for messages and files of ours: what is no Unicode is spelt with backslashes.

    A disk takes any bytes for a name; those that are not UTF-8 cannot be written anywhere else.
    """
    return name.encode("utf-8", "backslashreplace").decode()


def digest_listing(entries: Iterable[DirectoryEntry]) -> tuple[int, int, str]:
    """(files, bytes, SHA-256) of names and sizes: what tells that media were added or replaced.

    Their content is not read: of a large corpus that would take as long as preparing it.
    """
    files, total, found = 0, 0, hashlib.sha256()
    for entry in entries:
        files, total = files + 1, total + (entry.size or 0)
        found.update(f"{entry.name}\0{entry.size}\n".encode("utf-8", "surrogateescape"))
    return files, total, found.hexdigest()


def _listed(system: Any, folder: str) -> list[DirectoryEntry]:
    return [
        DirectoryEntry(
            posixpath.basename(about["name"].rstrip("/")),
            None if about["type"] == "directory" else int(about["size"] or 0),
        )
        for about in system.ls(folder, detail=True)
        if about["name"].rstrip("/") != folder.rstrip("/")
    ]


def _entry(entry: "os.DirEntry[str]") -> DirectoryEntry:
    try:
        return DirectoryEntry(entry.name, None if entry.is_dir() else entry.stat().st_size)
    except OSError:  # a link to nothing, or to itself: reading it will say so
        return DirectoryEntry(entry.name, 0)
