"""Bounded cache on the local disk for files of an object store, shared by a node's processes.

    <folder>/
      <sha256>                 a complete, verified file
      <sha256>.lock            locked by the process that downloads the file
      <sha256>.<bytes>.taken   space reserved by a running download
      .<sha256>.<…>.tmp        a running download
      .room                    locked while space is freed

Files are named by the hash of their content. A shard of two corpora is stored once, and an altered
shard is rejected. A process holds a shared lock on each file that it uses; the system releases the
lock when the process ends. The cache removes only unlocked files, the least recently used first.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillnet_files.commit import lock_file
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from skillnet_platform.storage import local as local_storage
from skillnet_platform.storage.locks import hold_lock

FOLDER_VARIABLE = "SKILLNET_CACHE"
LIMIT_VARIABLE = "SKILLNET_CACHE_GB"
DEFAULT_GB = 20.0
#: Number of concurrent prefetches.
STREAMS = 4
GB = 10**9

_NAME_LENGTH = 64


@dataclass(frozen=True)
class CacheKey:
    """Location, hash and size of a file in an object store.

    Args:
        uri: address of the file.
        sha256: digest of its content, in hexadecimal.
        bytes: size of the file.
    """

    uri: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        # It becomes a file name: a manifest must not lead out of the folder.
        if len(self.sha256) != _NAME_LENGTH or not set(self.sha256) <= set("0123456789abcdef"):
            raise UserError(f"{self.uri}: expected a SHA-256 in its manifest, got {self.sha256!r}")


class CacheHandle:
    """Cached file in use. The cache keeps the file until the handle is released or collected.

    Args:
        path: location of the file on the disk.
        descriptor: open file descriptor with a shared lock.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def __reduce__(self) -> str:
        # A copy would close a descriptor that may be another file by then.
        raise TypeError(f"{self.path} is open in this process; another one opens it itself")

    def release(self) -> None:
        """Allow the cache to remove the file."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.release()


class FileCache:
    """Cache of files by their hash; see the module docstring.

    Args:
        folder: on a local disk.
        limit: bytes of all files together.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self._queue: queue.SimpleQueue[CacheKey] = queue.SimpleQueue()
        self._coming: set[str] = set()
        self._refused: set[str] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        # Files and locks on the disk are shared, downloads in progress are not.
        return FileCache, (self.folder, self.limit)

    def hold(self, wanted: CacheKey) -> CacheHandle:
        """Return the file, downloaded if needed; the cache keeps it until the handle is released.

        Raises:
            UserError: the store refuses, the file is missing or altered, or the disk is full.
            StoreUnavailableError: see :func:`retry_transient`.
        """
        while True:
            held = self._take(wanted)
            if held is not None:
                return held
            # Another process may evict the file before this one locks it, hence the loop.
            self._fetch(wanted, needed=True)

    def prefetch(self, wanted: Iterable[CacheKey]) -> None:
        """Start downloads of files that are needed soon, if the limit allows.

        :meth:`hold` repeats a failed download and reports its error.
        """
        with self._lock:
            for one in wanted:
                known = one.sha256 in self._coming or one.sha256 in self._refused
                if not known and not (self.folder / one.sha256).exists():
                    self._coming.add(one.sha256)
                    self._queue.put(one)
            if self._coming and not self._threads:
                # Daemons: a prefetch must not delay the end of the process.
                self._threads = [
                    threading.Thread(target=self._work, name="prefetch", daemon=True)
                    for _ in range(STREAMS)
                ]
                for thread in self._threads:
                    thread.start()

    def _work(self) -> None:
        while True:
            one = self._queue.get()
            try:
                self._fetch(one, needed=False)
            except UserError:
                # :meth:`hold` reports the error. Without this set, each prefetched batch would
                # download an altered file again.
                self._refused.add(one.sha256)
            except Exception:  # noqa: S110
                pass  # the store may answer when the file is needed
            finally:
                self._coming.discard(one.sha256)

    def used(self) -> int:
        """Return the bytes of all files and running downloads."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with hold_lock(self.folder / ".room", self._describe_room, wait=True):
            marks = self._reserved()
            return self._taken(marks, self._files())

    def _take(self, wanted: CacheKey) -> CacheHandle | None:
        path = self.folder / wanted.sha256
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        lock_file(descriptor, shared=True, wait=True)
        try:
            mine, there = os.fstat(descriptor), path.stat()
            # Another process may have removed or replaced it before this one got the lock.
            if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
                if mine.st_size == wanted.bytes:
                    os.utime(path)  # most recently used
                    return CacheHandle(path, descriptor)
                # The file was damaged after its verified download. The caller downloads it again.
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        os.close(descriptor)
        return None

    def _fetch(self, wanted: CacheKey, needed: bool) -> None:
        """Download a missing file; without ``needed`` only if the limit allows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / wanted.sha256

        def describe(holder: str) -> str:
            return f"{wanted.uri}: waiting for {holder}, which downloads this file"

        with hold_lock(self.folder / f"{wanted.sha256}.lock", describe, wait=True):
            # Another process may have downloaded it while this one waited for the lock.
            if path.exists():
                return
            reserved = self._make_room(wanted, needed)
            if reserved is None:
                return
            try:
                # The limit of the cache says nothing about the free space of its disk.
                local_storage.require_space(path, wanted.bytes)
                directories.get_file(wanted.uri, path, wanted.sha256)
            except FileNotFoundError:
                raise UserError(
                    f"{wanted.uri}: the file is missing, although its manifest lists it. Upload "
                    "it again"
                ) from None
            finally:
                # Also after a failure: a stale mark would shrink the cache until the next sweep.
                reserved.unlink(missing_ok=True)

    def _make_room(self, wanted: CacheKey, needed: bool) -> Path | None:
        """Remove old files until a file fits, and reserve its space.

        Returns:
            Mark of the reservation. ``None`` if nothing fits and the file is not needed now.
        """
        # Two processes must not reserve the same free space.
        with hold_lock(self.folder / ".room", self._describe_room, wait=True):
            self._sweep()
            marks = self._reserved()
            files = sorted(self._files(), key=lambda file: file[2])
            excess = self._taken(marks, files) + wanted.bytes - self.limit
            # A prefetch that does not fit anyway must not remove what another one has brought.
            if needed or _subtract_unused(excess, files, remove=False) <= 0:
                excess = _subtract_unused(excess, files, remove=True)
            if excess > 0:
                if not needed:
                    return None
                # The file is needed now. A full cache must not end the run, so it exceeds its
                # limit.
                self._warn(excess)
            mark = self.folder / f"{wanted.sha256}.{wanted.bytes}.taken"
            mark.touch()
            return mark

    def _describe_room(self, holder: str) -> str:
        return f"{self.folder}: waiting for {holder}, which makes room in the cache"

    def _files(self) -> list[tuple[Path, int, float]]:
        """Return (path, bytes, time of last use) of the complete files."""
        found = []
        for path in self.folder.glob("*"):
            if len(path.name) == _NAME_LENGTH:
                with contextlib.suppress(FileNotFoundError):
                    about = path.stat()
                    found.append((path, about.st_size, about.st_mtime))
        return found

    def _taken(self, marks: dict[Path, int], files: list[tuple[Path, int, float]]) -> int:
        # A file with a mark counts once. Marks are read before files: in the other order a download
        # that ends in between would be missed.
        sizes = {mark.name.split(".")[0]: size for mark, size in marks.items()}
        return sum((sizes | {path.name: size for path, size, _ in files}).values())

    def _reserved(self) -> dict[Path, int]:
        """Return mark -> bytes of the running downloads."""
        return {path: int(path.name.split(".")[1]) for path in self.folder.glob("*.taken")}

    def _sweep(self) -> None:
        """Remove leftovers of downloads of dead processes: their locks are free."""
        for mark in self._reserved():
            sha256 = mark.name.split(".")[0]
            with (self.folder / f"{sha256}.lock").open("ab") as lock:
                if not lock_file(lock):
                    continue
                for left in self.folder.glob(f".{sha256}.*.tmp"):
                    left.unlink(missing_ok=True)
                mark.unlink(missing_ok=True)

    def _warn(self, excess: int) -> None:
        if not self._warned:
            self._warned = True
            console.print_warning(
                f"{self.folder}: the shards in use exceed the cache limit of "
                f"{local_storage.human_bytes(self.limit)} by {local_storage.human_bytes(excess)}. "
                f"Set {LIMIT_VARIABLE} higher, or training.shuffle_gb lower"
            )


def _subtract_unused(excess: int, files: list[tuple[Path, int, float]], *, remove: bool) -> int:
    """Return an excess of bytes less unused files, which are removed if ``remove``.

    Args:
        excess: bytes that do not fit.
        files: (path, bytes, time of last use), in the order of removal.
        remove: remove them.
    """
    for path, size, _ in files:
        # A full cache has many files, and each is opened.
        if excess <= 0:
            break
        if _is_unused(path, remove=remove):
            excess -= size
    return excess


def _is_unused(path: Path, *, remove: bool) -> bool:
    """Return whether no process uses a file, which is removed then if ``remove``."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        # Users of a file hold a shared lock: it must not be evicted under a memory map.
        is_unused = lock_file(descriptor)
        if is_unused and remove:
            path.unlink(missing_ok=True)
        return is_unused
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Return the cache folder: ``$SKILLNET_CACHE``, or ``cache/shards`` in the run root."""
    given = os.environ.get(FOLDER_VARIABLE)
    return (
        Path(given).expanduser().absolute()
        if given
        else local_storage.run_root() / "cache" / "shards"
    )


def cache_limit() -> int:
    """Return the limit of the cache in bytes: ``$SKILLNET_CACHE_GB`` in GB, else 20 GB.

    Raises:
        UserError: the variable is not a positive number.
    """
    given = os.environ.get(LIMIT_VARIABLE)
    try:
        size = float(given) if given else DEFAULT_GB
    except ValueError:
        size = -1.0
    if not 0 < size < float("inf"):
        raise UserError(f"{LIMIT_VARIABLE} is {given!r}, expected gigabytes such as 50")
    return int(size * GB)


_shared: dict[tuple[Any, ...], FileCache] = {}


def shared_cache() -> FileCache:
    """Return this process's object for the node's cache, with the limit of the environment."""
    # After a fork the threads of the parent's object do not run in the child.
    key = (cache_folder(), cache_limit(), os.getpid())
    return _shared.setdefault(key, FileCache(*key[:2]))
