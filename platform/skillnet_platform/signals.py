"""Ends of runs that nobody meant: signals, killed processes; and the machine's own metrics."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from skillnet_platform.errors import TerminatedError


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM raises an interrupt inside the block, so that what is open gets closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        raise TerminatedError("ended by SIGTERM; the same command goes on")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as problem:
        if not asked or isinstance(problem, TerminatedError):
            raise
        # Ray, when it waits, makes a plain one of ours.
        raise TerminatedError("ended by SIGTERM; the same command goes on") from problem
    finally:
        signal.signal(signal.SIGTERM, before)
