"""Guard of decoders: a row that cannot be decoded costs only itself.

Decoders reject input that is too large before they decode it. A decoder in C can still hang or end
its process, where no exception is raised:

* ``decode_each`` gives a row ``DECODE_TIMEOUT_S``. A decoder that returns to Python regularly, as
  PyAV does between frames, is stopped by a signal, and the row is rejected.
* A decoder that does not return is ended by the kernel, with its worker, after twice that CPU time.
* ``DecodeAttempts`` records on disk which row is decoded. Ray retries a block whose worker died.
  A row that was being decoded when two workers died is rejected.

The guard takes two microseconds per row.
"""

import contextlib
import mmap
import shutil
import signal
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from skillnet_platform.errors import UserError
from skillnet_platform.storage.retry import StoreUnavailableError

Value = TypeVar("Value")
Result = TypeVar("Result")

#: Seconds of wall time that decoding one row may take.
DECODE_TIMEOUT_S = 60.0
#: A row that was being decoded when this number of workers died is rejected.
MAX_CRASHES = 2
TOO_SLOW = f"decoding took longer than {DECODE_TIMEOUT_S:.0f} seconds"
NO_TIME_LEFT = "the time of the request is over. Send its rows in several requests"
CRASHES_WORKER = f"decoding ended {MAX_CRASHES} workers"
TOO_LARGE = "decoding needs more memory than there is"


class DecodeTimeoutError(BaseException):
    """Raised inside a decoder when its time is up. It is not an ``Exception``: nobody catches it.

    Decoders and their wrappers catch ``Exception`` and would continue.
    """


class WorkBudget:
    """Time that a request's work in threads may take; another thread may stop the work.

    Args:
        seconds: from now.
        stopped: event of the work, or None for a new one.
    """

    def __init__(self, seconds: float, stopped: threading.Event | None = None) -> None:
        self._end = time.monotonic() + seconds
        self._stopped = stopped or threading.Event()

    def stop(self) -> None:
        """Stop the work: nobody waits for it any more."""
        self._stopped.set()

    @property
    def is_stopped(self) -> bool:
        """Whether the work was stopped."""
        return self._stopped.is_set()

    @property
    def rest(self) -> float:
        """Seconds that are left; 0 if the work was stopped."""
        return 0.0 if self.is_stopped else max(self._end - time.monotonic(), 0.0)

    def part(self, fraction: float) -> "WorkBudget":
        """Return a part of what is left as the budget of a part of the work.

        Args:
            fraction: share of the seconds that are left.
        """
        return WorkBudget(fraction * self.rest, self._stopped)


def decode_each(
    values: Iterable[Value], read: Callable[[Value], Result], seconds: float = DECODE_TIMEOUT_S
) -> Iterator[tuple[Result | None, str | None]]:
    """Decode values one by one, and return errors as values.

    Args:
        values: values of a block's rows. The time to get the next value is not limited.
        read: decodes one value and raises ValueError with a short reason for a bad one. Any other
            error also rejects only that row, with the type of the error as the reason.
        seconds: wall time for one value.

    Yields:
        For each value, the result of ``read`` and ``None``, or ``None`` and the reason.

    Raises:
        UserError, StoreUnavailableError: from ``values`` or ``read``; they concern no single row.
    """
    attempts = _current
    with _timer(seconds) as timer:
        for value in values:
            if attempts is not None and attempts.must_skip_next():
                yield None, CRASHES_WORKER
                continue
            try:
                timer.start()
                result = read(value)
                timer.stop()
            except (UserError, StoreUnavailableError):
                raise
            except ValueError as error:
                outcome: tuple[Result | None, str | None] = None, str(error)
            except DecodeTimeoutError:
                outcome = None, describe_timeout(seconds)
            except MemoryError:
                outcome = None, TOO_LARGE
            except Exception as error:
                # One unforeseen file must not end the run. A bug of ours rejects more rows than
                # max_error_rate allows, so it is noticed.
                outcome = None, f"the decoder failed ({type(error).__name__})"
            else:
                outcome = result, None
            finally:
                timer.stop()
                if attempts is not None:
                    attempts.end_row()
            yield outcome


def describe_timeout(seconds: float) -> str:
    """Return the reason of a file whose decoder took longer than its limit."""
    return TOO_SLOW if seconds == DECODE_TIMEOUT_S else f"longer than {seconds:.3g} s"


class DecodeAttempts:
    """Record on disk of the row that is being decoded, for later attempts at the same block.

    Rows are numbered in the order in which ``decode_each`` reaches them. The file lies in the
    temporary directory of this node; other nodes count separately.

    Args:
        session: identifies the prepare run; another session starts to count again.
        block: identifies the block.
    """

    def __init__(self, session: str, block: str) -> None:
        self.path = attempts_dir(session) / block
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._crashes: dict[int, int] = {}
        for row in self._read_rows():
            self._crashes[row] = self._crashes.get(row, 0) + 1
        # Each attempt has a slot of 8 bytes: the number of the row being decoded, from 1.
        earlier = self.path.read_bytes() if self.path.exists() else b""
        self.path.write_bytes(earlier + bytes(8))
        self._stream = self.path.open("r+b")
        self._map = mmap.mmap(self._stream.fileno(), 0)
        self._slot, self._row = len(earlier), 0

    def must_skip_next(self) -> bool:
        """Begin the next row, and return whether it has ended too many workers."""
        row, self._row = self._row, self._row + 1
        skip = self._crashes.get(row, 0) >= MAX_CRASHES
        struct.pack_into("<q", self._map, self._slot, 0 if skip else row + 1)
        return skip

    def end_row(self) -> None:
        """Record that no row is being decoded."""
        struct.pack_into("<q", self._map, self._slot, 0)

    def close(self) -> None:
        """Remove the record, because the block is done."""
        self._map.close()
        self._stream.close()
        self.path.unlink(missing_ok=True)

    def _read_rows(self) -> list[int]:
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        return [row - 1 for (row,) in struct.iter_unpack("<q", data[: len(data) // 8 * 8]) if row]


_current: DecodeAttempts | None = None


@contextlib.contextmanager
def watch_block(session: str, block: str) -> Iterator[None]:
    """Record the rows that ``decode_each`` decodes inside this ``with`` block.

    Args:
        session: identifies the prepare run.
        block: identifies the block.
    """
    global _current
    attempts = _current = DecodeAttempts(session, block)
    try:
        yield
    finally:
        # Also after an exception: a worker that raises one has not died.
        _current = None
        attempts.close()


def attempts_dir(session: str) -> Path:
    """Return the directory of a prepare run's attempts on this node."""
    return Path(tempfile.gettempdir()) / f"skillnet-attempts-{session}"


def remove_attempts(session: str) -> None:
    """Remove the records that dead workers left on this node."""
    shutil.rmtree(attempts_dir(session), ignore_errors=True)


class _Timer:
    """Limit of wall time by SIGALRM (its handler raises) and of CPU time by SIGPROF (kills)."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def start(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        signal.setitimer(signal.ITIMER_PROF, 2 * self.seconds)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


class _NoTimer:
    """In a thread that gets no signals."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


@contextlib.contextmanager
def _timer(seconds: float) -> Iterator[_Timer | _NoTimer]:
    if threading.current_thread() is not threading.main_thread():
        yield _NoTimer()
        return
    before = signal.signal(signal.SIGALRM, _time_is_up), signal.getsignal(signal.SIGPROF)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    try:
        yield _Timer(seconds)
    finally:
        _Timer(seconds).stop()
        signal.signal(signal.SIGALRM, before[0])
        signal.signal(signal.SIGPROF, before[1])


def _time_is_up(number: int, frame: Any) -> None:
    raise DecodeTimeoutError
