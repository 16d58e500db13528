"""Source directory of a corpus, on a disk or behind a URI: sorted listings and open files.

Nothing is written. No file name leads out of the directory. Symbolic links may lead out of it,
because the owner of the directory created them. A :class:`SymlinkGuard` ends circular walks.
"""

import codecs
import contextlib
import gzip
import hashlib
import math
import os
import posixpath
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipelines.data.io.source_file import (
    PER_FILE_ERRORS,
    check_regular_file,
    is_remote,
    make_read_error,
    open_stream,
    query_store,
    strip_file_scheme,
)
from skillnet_platform.errors import UserError
from skillnet_platform.storage.directories import require_no_secret

#: Links that may lead into one directory. A few links that each lead to the next one twice are
#: a thousand paths to the same files.
MAX_LINKS_PER_FOLDER = 16


class SymlinkGuard:
    """Directories between the root and the position of a walk, and links into each directory."""

    def __init__(self) -> None:
        self._ancestors: list[tuple[int, int]] = []
        self._links: Counter[tuple[int, int]] = Counter()

    @contextmanager
    def enter(self, folder: str) -> Iterator[bool]:
        """Enter a local directory while the block runs; yield ``False`` if the walk is in it.

        Args:
            folder: path of the directory.

        Raises:
            UserError: too many links lead to the directory.
            OSError: see ``os.stat``.
        """
        info = os.stat(folder)  # noqa: PTH116 - called for many folders
        identity = info.st_dev, info.st_ino
        if identity in self._ancestors:
            yield False
            return
        if os.path.islink(folder):  # noqa: PTH114 - the same
            self._links[identity] += 1
            if self._links[identity] > MAX_LINKS_PER_FOLDER:
                raise UserError(
                    f"{folder}: more than {MAX_LINKS_PER_FOLDER} links lead to this directory, and "
                    "its files would be read through each of them; remove the links"
                )
        self._ancestors.append(identity)
        try:
            yield True
        finally:
            self._ancestors.pop()


#: Errors of a compressed file that is truncated or damaged, raised while it is read.
DAMAGE_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
#: A longer line is not a line of a corpus.
MAX_LINE_BYTES = 64 * 2**20
#: More consecutive empty lines are not text of a corpus.
MAX_EMPTY_LINES = 2**20


class OversizedInputError(EOFError):
    """A file has a line, or a run of empty lines, that seems to have no end.

    It belongs to ``DAMAGE_ERRORS``, so the rest of the file is not read. Its text is short, because
    rows are counted by it.
    """


@dataclass(frozen=True)
class DirectoryEntry:
    """Entry of a directory: its name, and its size in bytes if it is a file."""

    name: str
    size: int | None

    @property
    def is_folder(self) -> bool:
        """Whether the entry is a directory."""
        return self.size is None


class SourceDirectory:
    """Directory or single file of a corpus, by path or URI.

    Args:
        uri: local path, or any URI that fsspec or pyarrow opens ("s3://bucket/tnews").

    Raises:
        UserError: it does not exist, no driver opens the URI, or its path is not UTF-8.
    """

    def __init__(self, uri: str) -> None:
        self.remote = is_remote(uri)
        require_no_secret(uri)
        uri = uri if self.remote else str(Path(strip_file_scheme(uri)).expanduser().absolute())
        self.uri = uri.rstrip("/") if len(uri) > 1 else uri
        if to_printable(self.uri) != self.uri:
            raise UserError(
                f"{to_printable(self.uri)}: the path is not UTF-8, and a manifest cannot name it; "
                "rename the directory, or create a link to it"
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
        """Last part of its path."""
        return posixpath.basename(self.uri)

    def path(self, relative: str) -> str:
        """Return the path or URI of a relative path; "" is the directory itself.

        Raises:
            ValueError: the path is absolute or leads out of the directory.
        """
        parts = relative.replace("\\", "/").split("/")
        if relative.startswith(("/", "\\")) or "://" in relative or ".." in parts:
            raise ValueError("a path that leads out of the folder")
        if "\0" in relative:
            raise ValueError("a path with a null character")
        clean = "/".join(part for part in parts if part not in ("", "."))
        return f"{self.uri}/{clean}" if clean else self.uri

    def exists(self, relative: str) -> bool:
        """Return whether a file or directory exists at a relative path."""
        return self._exists(self.path(relative))

    def find_form(self, relative: str) -> str | None:
        """Return a relative path in the Unicode form in which the disk has it, None without one.

        macOS writes "é" as two characters (NFD), and metadata often as one (NFC).

        Args:
            relative: path of a file or directory, in any form.
        """
        forms = (relative, *(unicodedata.normalize(form, relative) for form in ("NFC", "NFD")))
        return next((form for form in dict.fromkeys(forms) if self.exists(form)), None)

    def entries(self, relative: str = "") -> list[DirectoryEntry]:
        """Return the entries of a directory, sorted by name, without hidden ones.

        Raises:
            FileNotFoundError, NotADirectoryError: there is no such directory.
            UserError: no permission to read it, or its disk fails.
        """
        try:
            return self._scan(relative)
        except PermissionError:
            raise UserError(f"{self.path(relative)}: no permission to read this folder") from None

    def walk(self, relative: str = "", depth: int = 16) -> Iterator[DirectoryEntry]:
        """Yield all files below a directory in order, named by their path from this directory.

        Links are followed, except into a directory that contains them.

        Args:
            relative: path of the directory to start in.
            depth: levels of directories below it.
        """
        yield from self._walk(relative, depth, SymlinkGuard())

    def folders(self, relative: str = "", depth: int = 4) -> Iterator[str]:
        """Yield a directory and all directories below it, parents first.

        Args:
            relative: path of the directory to start in.
            depth: levels of directories below it.
        """
        yield from self._folders(relative, depth, SymlinkGuard())

    def _walk(self, relative: str, depth: int, guard: SymlinkGuard) -> Iterator[DirectoryEntry]:
        with self._enter(relative, guard) as is_entered:
            for entry in self._scan_if_readable(relative) if is_entered else ():
                below = f"{relative}/{entry.name}" if relative else entry.name
                if not entry.is_folder:
                    yield DirectoryEntry(below, entry.size)
                elif depth > 0:
                    yield from self._walk(below, depth - 1, guard)

    def _folders(self, relative: str, depth: int, guard: SymlinkGuard) -> Iterator[str]:
        with self._enter(relative, guard) as is_entered:
            if not is_entered:
                return
            yield relative
            for entry in self._scan_if_readable(relative) if depth > 0 else ():
                if entry.is_folder:
                    below = f"{relative}/{entry.name}" if relative else entry.name
                    yield from self._folders(below, depth - 1, guard)

    @contextlib.contextmanager
    def _enter(self, relative: str, guard: SymlinkGuard) -> Iterator[bool]:
        """Enter a directory unless the walk is in it; stores have no links, so enter any."""
        with contextlib.ExitStack() as stack:
            entered = True
            if not self.remote:
                # A missing directory has no entries.
                with contextlib.suppress(OSError):
                    entered = stack.enter_context(guard.enter(self.path(relative)))
            yield entered

    def _scan_if_readable(self, relative: str) -> list[DirectoryEntry]:
        """Return the entries of a directory, or none if it cannot be read."""
        try:
            return self._scan(relative)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return []

    def _scan(self, relative: str) -> list[DirectoryEntry]:
        folder = self.path(relative)
        if self.remote:
            listed = query_store(folder, _list_remote)
        else:
            try:
                with os.scandir(folder) as entries:
                    listed = [_make_entry(entry) for entry in entries]
            except PER_FILE_ERRORS:
                raise
            except OSError as error:
                raise make_read_error(folder, error) from None
        return sorted((e for e in listed if not e.name.startswith(".")), key=lambda e: e.name)

    def open(self, relative: str = "") -> IO[bytes]:
        """Open a file for sequential reading; decompress it if its name ends in ``.gz``.

        Raises:
            UserError: there is no such file, or no permission to read it.
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
        """Yield the lines of a file, see :func:`iter_lines`.

        Args:
            relative: path of the file.
            ends: keep the line endings.

        Raises:
            EOFError, zlib.error, BadGzipFile: ``DAMAGE_ERRORS``: a compressed file is truncated or
                damaged, or a line has no end.
            SourceReadError, StoreUnavailableError: see
                :func:`pipelines.data.io.source_file.open_stream`.
        """
        with self.open(relative) as stream:
            yield from iter_lines(stream, ends)

    def digest(self, relative: str) -> str:
        """Return the SHA-256 of a file's stored bytes, without decompression."""
        with open_stream(self.path(relative)) as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def _exists(self, path: str) -> bool:
        if not self.remote:
            return os.path.exists(path)  # noqa: PTH110 - called for many files
        try:
            # Not ``exists``: most clients also return False when the store does not answer.
            query_store(path, lambda system, plain: system.info(plain))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def iter_lines(
    stream: IO[bytes], ends: bool = False, before: int = 0, size: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a stream with their numbers, from 1.

    Empty lines and a byte order mark are left out.

    Args:
        stream: stream to read.
        ends: keep the line endings. A line without one is the last and may be truncated.
        before: number of lines before the position of the stream.
        size: bytes to read, up to the end of a line; None reads all.

    Raises:
        OversizedInputError: a line, or a run of empty lines, seems to have no end.
    """
    number, empty, left = before, 0, math.inf if size is None else size
    while left > 0 and (line := stream.readline(MAX_LINE_BYTES + 1)):
        if len(line) > MAX_LINE_BYTES:
            raise OversizedInputError("a line longer than 64 MiB")
        number += 1
        left -= len(line)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        line = line if ends else line.strip(b"\r\n")
        if line.strip():
            empty = 0
            yield number, line
        elif (empty := empty + 1) > MAX_EMPTY_LINES:
            raise OversizedInputError("a flood of empty lines")


def to_printable(name: str) -> str:
    """Return a file name with all characters that UTF-8 cannot encode escaped by backslashes.

    A disk takes any bytes as a name, but messages and manifests are UTF-8.
    """
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def digest_listing(entries: Iterable[DirectoryEntry]) -> tuple[int, int, str]:
    """Return number of files, bytes, and SHA-256 of all names and sizes.

    The digest shows that media were added or replaced. Their content is not read: for a large
    corpus that would take as long as preparing it.
    """
    files, total, digest = 0, 0, hashlib.sha256()
    for entry in entries:
        files, total = files + 1, total + (entry.size or 0)
        digest.update(f"{entry.name}\0{entry.size}\n".encode("utf-8", "surrogateescape"))
    return files, total, digest.hexdigest()


def _list_remote(system: Any, folder: str) -> list[DirectoryEntry]:
    return [
        DirectoryEntry(
            posixpath.basename(about["name"].rstrip("/")),
            None if about["type"] == "directory" else int(about["size"] or 0),
        )
        for about in system.ls(folder, detail=True)
        if about["name"].rstrip("/") != folder.rstrip("/")
    ]


def _make_entry(entry: "os.DirEntry[str]") -> DirectoryEntry:
    try:
        return DirectoryEntry(entry.name, None if entry.is_dir() else entry.stat().st_size)
    except OSError:  # a link to nothing or to itself: reading it reports the error
        return DirectoryEntry(entry.name, 0)
