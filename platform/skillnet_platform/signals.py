"""SIGTERM as an interrupt, so that open runs and servers are closed."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from skillnet_platform.errors import TerminatedError


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Raise ``TerminatedError`` on SIGTERM inside the block, so that resources are closed."""
    # Python allows signal handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        raise TerminatedError("ended by SIGTERM; the same command resumes it")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        if not asked or isinstance(error, TerminatedError):
            raise
        # Ray replaces our exception by a plain KeyboardInterrupt while it waits.
        raise TerminatedError("ended by SIGTERM; the same command resumes it") from error
    finally:
        signal.signal(signal.SIGTERM, before)
