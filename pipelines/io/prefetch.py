"""What a block reads next is asked for while its last file is decoded.

Decoding a file takes about ten milliseconds. A disk takes one to find it, a store thirty, and who
asks for one after the other waits for each:

* of files on a disk the kernel is told ahead, and reads them into its cache; nothing is held here;
* of objects in a store several are fetched at once, by threads, in the order in which they are
  asked for; beside the one whose turn it is no more bytes of them are held than ``HELD``.

Ours.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Result = TypeVar("Result")

#: Files of a disk that the kernel is told of ahead, and how much of each.
ADVISED_FILES, ADVISED_BYTES = 2, 8 * 2**20
#: Objects of a store that are on their way at once.
MAX_FETCHES = 8
#: Bytes that wait to be asked for, beside the object whose turn it is.
MAX_WAITING_BYTES = 32 * 2**20


class PrefetchClosedError(Exception):
    """Nobody asks for this any more."""


def advise_kernel(path: str, offset: int, length: int | None) -> None:
    """Have the kernel read a part of a local file soon; whoever reads it sees what is wrong."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return
    try:
        # Without waiting: it may be a pipe.
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
    """Results of a function for the numbers 0, 1, 2 …, worked out ahead by threads.

    Args:
        count: of results.
        fetch: works out that of a number. It calls what it gets as its second argument with the
            bytes that it is about to hold; that returns when there is room for them.
        streams: results in the making at once.
        held: bytes that may wait, beside the one whose turn it is.
    """

    def __init__(
        self,
        count: int,
        fetch: Callable[[int, Callable[[int], None]], Result],
        streams: int = MAX_FETCHES,
        held: int = MAX_WAITING_BYTES,
    ) -> None:
        self._count, self._fetch, self._most = count, fetch, held
        self._room = threading.Condition()
        self._sizes: dict[int, int] = {}
        self._next = 0
        self._closed = False
        self._pool = ThreadPoolExecutor(streams, "read-ahead")
        self._waiting: deque[Future[Result]] = deque()
        self._submitted = 0
        for _ in range(streams):
            self._submit()

    def next_result(self) -> Result:
        """The next result, or what its function raised."""
        future = self._waiting.popleft()
        try:
            return future.result()
        finally:
            with self._room:
                self._sizes.pop(self._next, None)
                self._next += 1
                self._room.notify_all()
            self._submit()

    def close(self) -> None:
        """Let those in the making end by themselves; what they give is for nobody."""
        with self._room:
            self._closed = True
            self._room.notify_all()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self) -> None:
        if self._submitted < self._count:
            number = self._submitted
            self._submitted += 1
            self._waiting.append(self._pool.submit(self._one, number))

    def _one(self, number: int) -> Result:
        return self._fetch(number, lambda size: self._grant(number, size))

    def _grant(self, number: int, size: int) -> None:
        with self._room:
            self._sizes.pop(number, None)  # a try before this one
            # The one that is asked for next never waits, so there is always one that goes on.
            self._room.wait_for(
                lambda: (
                    self._closed
                    or number == self._next
                    or sum(self._sizes.values()) + size <= self._most
                )
            )
            if self._closed:
                raise PrefetchClosedError
            self._sizes[number] = size
