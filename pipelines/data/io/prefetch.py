"""Prefetch of media files: the next files of a block are read while the current one is decoded.

Decoding a file takes about ten milliseconds. Finding it takes one on a disk and thirty in an
object store, and sequential requests would wait each time.

* For files on a disk, the kernel is advised and reads them into its cache. Nothing is held here.
* From an object store, threads fetch several objects at once, in the order of their use. Besides
  the next object, at most ``MAX_WAITING_BYTES`` are held.

Source: ours.
"""

import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

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
