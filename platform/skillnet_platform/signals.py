"""Signals that ask a process to end, as interrupts, so that open runs and servers are closed.

A program (:func:`own_process`) also remembers that it was asked: after that it leaves without the
teardown of libraries whose threads still work (:mod:`skillnet_platform.cluster.connect`).
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from skillnet_platform.errors import TerminatedError

#: SIGTERM comes from schedulers, SIGHUP from a terminal or an SSH connection that ends.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
RESUMES = "the same command resumes it"


class _ProcessState:
    """Facts about this process: whether it is a program of ours, and what asked it to end."""

    is_program = False
    asked: signal.Signals | None = None


def own_process() -> None:
    """Declare that this process runs one command and ends after it."""
    _ProcessState.is_program = True


def must_leave() -> bool:
    """Return whether this process is a program that a signal or Ctrl-C asked to end."""
    return _ProcessState.is_program and _ProcessState.asked is not None


@contextlib.contextmanager
def handle_signals(
    handler: Callable[[int, FrameType | None], Any], numbers: Sequence[int] = STOP_SIGNALS
) -> Iterator[None]:
    """Handle signals during a block, in the main thread; Python allows handlers nowhere else.

    A signal that this process ignores stays ignored, as SIGHUP under ``nohup``.

    Args:
        handler: as of ``signal.signal``.
        numbers: signals, such as 15 for SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in numbers}
    before = {each: former for each, former in before.items() if former is not signal.SIG_IGN}
    for each in before:
        signal.signal(each, handler)
    try:
        yield
    finally:
        for each, former in before.items():
            # None stands for a handler that was not installed from Python.
            signal.signal(each, signal.SIG_DFL if former is None else former)


@contextlib.contextmanager
def keep_handlers() -> Iterator[None]:
    """Install the handlers of this process again after a block that replaces them, such as Ray's.

    Processes that start in the block do not end with the terminal: SIGHUP is for this one.
    """
    numbers = (*STOP_SIGNALS, signal.SIGINT)
    before = {each: signal.getsignal(each) for each in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if threading.current_thread() is threading.main_thread():
            for each, former in before.items():
                if callable(former):
                    signal.signal(each, former)


@contextlib.contextmanager
def terminate_as_interrupt(remedy: str = RESUMES) -> Iterator[None]:
    """Raise ``TerminatedError`` on SIGTERM or SIGHUP in a block, so that resources are closed.

    Ctrl-C still raises KeyboardInterrupt.

    Args:
        remedy: end of the message.
    """
    asked: list[signal.Signals] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number))
        _ProcessState.asked = asked[-1]
        raise_if_asked()
        raise KeyboardInterrupt

    def raise_if_asked() -> None:
        if asked and asked[-1] in STOP_SIGNALS:
            raise TerminatedError(f"ended by {asked[-1].name}; {remedy}", asked[-1])

    numbers: list[int] = list(STOP_SIGNALS)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    with handle_signals(interrupt, numbers):
        try:
            yield
        except TerminatedError:
            raise
        except KeyboardInterrupt:
            # Ray replaces our exception by a plain KeyboardInterrupt while it waits.
            raise_if_asked()
            raise
        # Python drops an exception that a signal raises in a finalizer.
        raise_if_asked()
