"""Graceful preemption: on a stop signal all ranks stop after the current step, with a checkpoint.

The driver or a worker may receive the signal; the same command resumes the run. A worker's flag
travels in the last gradient bucket of the step
(:class:`~pipelines.training.loop.gradient_sync.GradientSync`), so that all ranks stop after the
same step without another exchange. With several GPUs that is the step after: a host that reads the
flag of the current step waits for its backward pass.

The driver sets a :class:`StopSignal`, which rank 0 polls in a thread, because the driver may be on
another node than its workers. On Ray the signal is a key in Ray's own store
(:class:`~skillnet_platform.ray_internals.stop_signal.RayStopSignal`), so no common disk is needed.

In an elastic run a signal to a worker concerns its node alone: after the checkpoint the workers
end with :class:`~skillnet_platform.ray_internals.errors.WorkerGroupResize`, and the controller
restarts them without that node.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Protocol

from skillnet_platform import console
from skillnet_platform.errors import first_line
from skillnet_platform.signals import handle_signals

#: Seconds between two polls of the driver's stop signal.
POLL_INTERVAL_S = 1.0
#: Seconds that a stop signal whose store does not answer may delay the end of a block.
ANSWER_TIMEOUT_S = 10.0

_STOP_REQUESTED = threading.Event()
#: Origin of the request: a signal to this process, or the driver.
_REQUESTED_BY_SIGNAL, _REQUESTED_BY_DRIVER = threading.Event(), threading.Event()
_RECEIVED_BY_DRIVER: list[signal.Signals] = []


class StopSignal(Protocol):
    """Signal from a preempted driver to its workers."""

    def set(self) -> None:
        """Set the signal."""

    def clear(self) -> None:
        """Clear the signal, if it is set."""

    def is_set(self) -> bool:
        """Return whether the signal is set."""


def stop_requested() -> bool:
    """Return whether this process must stop after the current step."""
    return _STOP_REQUESTED.is_set()


def stop_requested_by_signal() -> bool:
    """Return whether this worker received SIGTERM itself, so that its node may be leaving."""
    return _REQUESTED_BY_SIGNAL.is_set()


def stop_requested_by_driver() -> bool:
    """Return whether the driver requested the stop, so that the run must end."""
    return _REQUESTED_BY_DRIVER.is_set()


def received_signal() -> signal.Signals:
    """Return the signal that stopped the last run of this driver: SIGTERM if a worker got it."""
    return _RECEIVED_BY_DRIVER[0] if _RECEIVED_BY_DRIVER else signal.SIGTERM


def request_stop() -> None:
    """Request a stop of this process after the current step, with a checkpoint.

    The controller of an elastic run calls it so that more workers can start, and a sweep calls it
    in the process of a trial.
    """
    _STOP_REQUESTED.set()


def clear_request() -> None:
    """Forget a stop request, so that the next run of this process starts."""
    _STOP_REQUESTED.clear()


@contextlib.contextmanager
def listen_in_driver(stop_signal: StopSignal | None = None) -> Iterator[None]:
    """Treat SIGTERM and SIGHUP as a stop request in a block; a second one raises KeyboardInterrupt.

    Outside the main thread, where Python allows no signal handlers, it does nothing.

    Args:
        stop_signal: set at a stop request, for workers in other processes. One that is set at the
            start is left over and is cleared.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    done = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if _STOP_REQUESTED.is_set():
            raise KeyboardInterrupt
        _RECEIVED_BY_DRIVER.append(signal.Signals(number))
        _STOP_REQUESTED.set()
        done.set()
        name = received_signal().name
        console.print_warning(f"{name}: stopping after this step, with a checkpoint")

    def forward(signal_to_set: StopSignal) -> None:
        done.wait()
        if _STOP_REQUESTED.is_set():
            try:
                signal_to_set.set()
            except Exception as error:
                console.print_warning(
                    f"the stop request did not reach the workers ({first_line(error)}); they "
                    "continue to train"
                )

    # A request of an earlier run in this process must not stop this one.
    _STOP_REQUESTED.clear()
    _RECEIVED_BY_DRIVER.clear()
    # The handler must not set the signal: the main thread may be inside the client that it needs.
    forwarder = threading.Thread(target=forward, args=(stop_signal,), name="stop", daemon=True)
    if stop_signal is not None:
        stop_signal.clear()
        forwarder.start()
    # Ray Train replaces the handler of Ctrl-C and does not restore it: after the fit that handler
    # would start another Ray to abort a finished fit.
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with handle_signals(handle):
            yield
    finally:
        signal.signal(signal.SIGINT, interrupt)
        done.set()
        if stop_signal is not None:
            forwarder.join(ANSWER_TIMEOUT_S)
            stop_signal.clear()
        _STOP_REQUESTED.clear()


def listen_in_worker() -> None:
    """Treat SIGTERM as a stop request from now on, in the main thread of a worker process.

    A second SIGTERM ends the process.
    """
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        _REQUESTED_BY_SIGNAL.set()
        _STOP_REQUESTED.set()
        signal.signal(signal.SIGTERM, before)

    for event in (_STOP_REQUESTED, _REQUESTED_BY_SIGNAL, _REQUESTED_BY_DRIVER):
        event.clear()
    signal.signal(signal.SIGTERM, handle)


@contextlib.contextmanager
def watch_stop_signal(stop_signal: StopSignal) -> Iterator[None]:
    """Poll the driver's stop signal in a thread, inside a block."""
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(POLL_INTERVAL_S):
            # A store that fails is polled again.
            with contextlib.suppress(Exception):
                if stop_signal.is_set():
                    _REQUESTED_BY_DRIVER.set()
                    _STOP_REQUESTED.set()
                    return

    thread = threading.Thread(target=poll, name="stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(ANSWER_TIMEOUT_S)
