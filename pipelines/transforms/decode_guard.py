"""Decoding one row after the other, so that a row that cannot be decoded costs itself only.

Decoders refuse what is too large before they decode it (``pipelines/transforms``). What is left
is a decoder that never comes back or ends its process, in C, where no exception reaches it:

* ``read_each`` gives a row ``SECONDS``; a decoder that returns to Python now and then, as PyAV
  does between frames, is stopped by a signal, and the row is set aside;
* one that does not is ended by the kernel after twice as much of CPU time, with its worker;
* ``Attempts`` notes on disk which row is being decoded. Ray runs a block whose worker died once
  more, and a row that was at work when a worker died for the second time is set aside.

A row costs two microseconds of this.
"""

import contextlib
import mmap
import shutil
import signal
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from skillnet_platform.errors import UserError
from skillnet_platform.storage.retry import StoreUnavailable

Value = TypeVar("Value")
Result = TypeVar("Result")

#: Wall time that decoding one row may take.
DECODE_TIMEOUT_S = 60.0
#: A row at work when so many workers died is set aside.
MAX_CRASHES = 2
TOO_SLOW = f"decoding took longer than {DECODE_TIMEOUT_S:.0f} seconds"
CRASHES_WORKER = f"decoding ended {MAX_CRASHES} workers"
TOO_LARGE = "decoding needs more memory than there is"


class DecodeTimeoutError(BaseException):
    """Raised in the midst of a decoder whose time is up; nothing that means errors catches it."""


def decode_each(
    values: Iterable[Value], read: Callable[[Value], Result], seconds: float = DECODE_TIMEOUT_S
) -> Iterator[tuple[Result | None, str | None]]:
    """Decode values one by one; what cannot be decoded is told, not raised.

    Args:
        values: of a block's rows; the time that it takes to get the next one is not counted.
        read: decodes one; raises ValueError with a short reason for a bad one. Any other error
            costs that row, too, with the error's type as the reason.
        seconds: that one may take.

    Yields:
        For each value what ``read`` returned and None, or None and the reason.

    Raises:
        UserError, StoreUnavailable: by ``values`` or ``read``; they tell of no row.
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
            except (UserError, StoreUnavailable):
                raise
            except ValueError as problem:
                outcome: tuple[Result | None, str | None] = None, str(problem)
            except DecodeTimeoutError:
                outcome = (
                    None,
                    TOO_SLOW if seconds == DECODE_TIMEOUT_S else f"longer than {seconds:.3g} s",
                )
            except MemoryError:
                outcome = None, TOO_LARGE
            except Exception as problem:
                # One file that nobody thought of ends nothing. A defect of ours fails for more
                # rows than max_bad allows.
                outcome = None, f"the decoder failed ({type(problem).__name__})"
            else:
                outcome = result, None
            finally:
                timer.stop()
                if attempts is not None:
                    attempts.end_row()
            yield outcome


class DecodeAttempts:
    """Which row of a block is being decoded, kept where a later attempt finds it.

    Rows are numbered in the order in which ``read_each`` comes to them. The file lies in this
    machine's temporary folder: another machine counts for itself.

    Args:
        session: of the prepare; another one starts to count anew.
        block: a name for the block.
    """

    def __init__(self, session: str, block: str) -> None:
        self.path = attempts_dir(session) / block
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._strikes: dict[int, int] = {}
        for row in self._read():
            self._strikes[row] = self._strikes.get(row, 0) + 1
        # A slot of 8 bytes for each attempt: the number of the row at work, counted from 1.
        before = self.path.read_bytes() if self.path.exists() else b""
        self.path.write_bytes(before + bytes(8))
        self._stream = self.path.open("r+b")
        self._map = mmap.mmap(self._stream.fileno(), 0)
        self._slot, self._row = len(before), 0

    def must_skip_next(self) -> bool:
        """Go on to the next row, and say whether it must not be tried again."""
        row, self._row = self._row, self._row + 1
        deadly = self._strikes.get(row, 0) >= MAX_CRASHES
        struct.pack_into("<q", self._map, self._slot, 0 if deadly else row + 1)
        return deadly

    def end_row(self) -> None:
        """No row is at work."""
        struct.pack_into("<q", self._map, self._slot, 0)

    def close(self) -> None:
        """The block is done: forget."""
        self._map.close()
        self._stream.close()
        self.path.unlink(missing_ok=True)

    def _read(self) -> list[int]:
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        return [row - 1 for (row,) in struct.iter_unpack("<q", data[: len(data) // 8 * 8]) if row]


_current: DecodeAttempts | None = None


@contextlib.contextmanager
def watch_block(session: str, block: str) -> Iterator[None]:
    """Keep count of the rows that ``read_each`` decodes inside this ``with`` block."""
    global _current
    attempts = _current = DecodeAttempts(session, block)
    try:
        yield
    finally:
        # Also after an exception: what can raise one has not ended its worker.
        _current = None
        attempts.close()


def attempts_dir(session: str) -> Path:
    """Where a prepare keeps its attempts on this machine."""
    return Path(tempfile.gettempdir()) / f"skillnet-attempts-{session}"


def remove_attempts(session: str) -> None:
    """Remove what workers that died left on this machine."""
    shutil.rmtree(attempts_dir(session), ignore_errors=True)


class _Timer:
    """Wall time by SIGALRM, whose handler raises; CPU time by SIGPROF, which ends the process."""

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
