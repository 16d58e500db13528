"""A bounded cache on the local disk for files of a store, shared by all processes of a host.

    <folder>/
      <sha256>                 a whole, verified file
      <sha256>.lock            held by the process that downloads it
      <sha256>.<bytes>.taken   space that a download on its way will take
      .<sha256>.<…>.tmp        a download on its way
      .room                    held while space is made

Files are named by their content: the same shard of two corpora is kept once, and an altered one
cannot get in. A process that uses a file holds a shared lock on it, which the system takes back
when the process ends; only files without one are removed, those not used for longest first.
"""

import contextlib
import fcntl
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from skillnet_platform.storage import local as local_storage

FOLDER_VARIABLE = "SKILLNET_CACHE"
LIMIT_VARIABLE = "SKILLNET_CACHE_GB"
DEFAULT_GB = 20.0
#: Downloads ahead of need at once.
STREAMS = 4
GB = 10**9

_NAME_LENGTH = 64


@dataclass(frozen=True)
class CacheKey:
    """A file of a store and what it has to be.

    Args:
        uri: where it is.
        sha256: of its content, in hexadecimal.
        bytes: its size.
    """

    uri: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        # It becomes a file's name: a manifest must not lead elsewhere.
        if len(self.sha256) != _NAME_LENGTH or not set(self.sha256) <= set("0123456789abcdef"):
            raise UserError(f"{self.uri}: its manifest gives no SHA-256 but {self.sha256!r}")


class CacheHandle:
    """A cached file in use; it stays until this is released or collected.

    Args:
        path: the file.
        descriptor: opened, with a shared lock.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def release(self) -> None:
        """Let the cache remove the file when it needs the space."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.release()


class FileCache:
    """See the head of this file.

    Args:
        folder: on a local disk.
        limit: bytes that the files may take together.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self._queue: queue.SimpleQueue[CacheKey] = queue.SimpleQueue()
        self._coming: set[str] = set()
        self._refused: set[str] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._warned = False

    def hold(self, wanted: CacheKey) -> CacheHandle:
        """The file, downloaded unless it is there, and kept until the result is released.

        Raises:
            UserError: the store refuses, has no such file or another one; the disk is full.
            StoreUnavailableError: see :func:`retry_transient`.
        """
        while True:
            held = self._take(wanted)
            if held is not None:
                return held
            self._fetch(wanted, needed=True)

    def prefetch(self, wanted: Iterable[CacheKey]) -> None:
        """Start downloads of files that will be wanted soon, if there is room for them.

        What goes wrong is told by :meth:`hold`, which tries again.
        """
        with self._lock:
            for one in wanted:
                known = one.sha256 in self._coming or one.sha256 in self._refused
                if not known and not (self.folder / one.sha256).exists():
                    self._coming.add(one.sha256)
                    self._queue.put(one)
            if self._coming and not self._threads:
                # Daemons: what is fetched ahead must not keep a process that has ended from going.
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
                # Whoever needs the file asks again, and is told. Until then an altered one would
                # be downloaded for each batch that looks ahead.
                self._refused.add(one.sha256)
            except Exception:  # noqa: S110
                pass  # the store may be back when the file is needed
            finally:
                self._coming.discard(one.sha256)

    def used(self) -> int:
        """Bytes of all files, and of those on their way."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / ".room"):
            marks = self._reserved()
            return self._taken(marks, self._files())

    def _take(self, wanted: CacheKey) -> CacheHandle | None:
        path = self.folder / wanted.sha256
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        try:
            mine, there = os.fstat(descriptor), path.stat()
            # It may have been removed, and even fetched again, before the lock was ours.
            if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
                if mine.st_size == wanted.bytes:
                    os.utime(path)  # used now: the last to be removed
                    return CacheHandle(path, descriptor)
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        os.close(descriptor)
        return None

    def _fetch(self, wanted: CacheKey, needed: bool) -> None:
        """Download a file unless somebody has; without ``needed`` only if there is room."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / wanted.sha256
        with _locked(self.folder / f"{wanted.sha256}.lock"):
            if path.exists():
                return
            reserved = self._make_room(wanted, needed)
            if reserved is None:
                return
            try:
                local_storage.require_space(path, wanted.bytes)
                directories.get_file(wanted.uri, path, wanted.sha256)
            except FileNotFoundError:
                raise UserError(
                    f"{wanted.uri}: this file is missing, though its manifest names it. Put it "
                    "there again"
                ) from None
            finally:
                reserved.unlink(missing_ok=True)

    def _make_room(self, wanted: CacheKey, needed: bool) -> Path | None:
        """Remove old files until the wanted one fits; marks its space as taken.

        None if there is no room and the file is not needed now.
        """
        with _locked(self.folder / ".room"):
            self._sweep()
            marks = self._reserved()
            files = sorted(self._files(), key=lambda file: file[2])
            excess = self._taken(marks, files) + wanted.bytes - self.limit
            for path, size, _ in files:
                if excess <= 0:
                    break
                if _remove_unused(path):
                    excess -= size
            if excess > 0:
                if not needed:
                    return None
                self._warn(excess)
            mark = self.folder / f"{wanted.sha256}.{wanted.bytes}.taken"
            mark.touch()
            return mark

    def _files(self) -> list[tuple[Path, int, float]]:
        """(path, bytes, time of last use) of the whole files."""
        found = []
        for path in self.folder.glob("*"):
            if len(path.name) == _NAME_LENGTH:
                with contextlib.suppress(FileNotFoundError):
                    about = path.stat()
                    found.append((path, about.st_size, about.st_mtime))
        return found

    def _taken(self, marks: dict[Path, int], files: list[tuple[Path, int, float]]) -> int:
        # A file in place whose mark is still there counts once. Marks are read before files: a
        # download that ends between the two would be in neither the other way round.
        sizes = {mark.name.split(".")[0]: size for mark, size in marks.items()}
        return sum((sizes | {path.name: size for path, size, _ in files}).values())

    def _reserved(self) -> dict[Path, int]:
        """Bytes that downloads on their way will take."""
        return {path: int(path.name.split(".")[1]) for path in self.folder.glob("*.taken")}

    def _sweep(self) -> None:
        """Remove what downloads of dead processes left: nobody holds their locks."""
        for mark in self._reserved():
            sha256 = mark.name.split(".")[0]
            with (self.folder / f"{sha256}.lock").open("a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                for left in self.folder.glob(f".{sha256}.*.tmp"):
                    left.unlink(missing_ok=True)
                mark.unlink(missing_ok=True)

    def _warn(self, excess: int) -> None:
        if not self._warned:
            self._warned = True
            console.warn(
                f"{self.folder}: the shards in use take {local_storage.human_bytes(excess)} more than "
                f"the cache's limit of {local_storage.human_bytes(self.limit)}; going on over it. Set "
                "storage.cache_gb higher, or training.shuffle_gb lower"
            )


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process uses it; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cache_folder() -> Path:
    """Where the cache is: ``$SKILLNET_CACHE``, or ``cache/shards`` under the run root."""
    given = os.environ.get(FOLDER_VARIABLE)
    return (
        Path(given).expanduser().absolute()
        if given
        else local_storage.run_root() / "cache" / "shards"
    )


def cache_limit() -> int:
    """Bytes of the cache: ``$SKILLNET_CACHE_GB`` in 10^9 bytes, else 20.

    Raises:
        UserError: the variable holds no size.
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


def shared_cache(gigabytes: float | None = None) -> FileCache:
    """This process's face of the host's cache.

    Args:
        gigabytes: its limit; none takes the environment's.
    """
    limit = cache_limit() if gigabytes is None else int(gigabytes * GB)
    key = (cache_folder(), limit, os.getpid())
    return _shared.setdefault(key, FileCache(cache_folder(), limit))
