"""A notice to leave: SIGTERM, as a machine that is about to be taken away sends it.

Whoever gets it, driver or worker, the run writes a checkpoint after the step at hand and ends; the
same command goes on from there. A worker's own notice rides in the last gradient bucket of the
step (:class:`~pipelines.training.gradient_sync.GradientSync`), so that all ranks leave after the
same one and no exchange is added. A driver puts a file into the run's folder, which rank 0 looks
for beside the training: it may be on another machine than its workers.

In an elastic run a worker's notice is its host's alone: after the checkpoint the workers end with
:class:`Regroup`, and the controller starts them again without that host.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from skillnet_platform import console

FILE = "leave"

#: Seconds between two looks for the driver's file.
LOOK_S = 0.25

_ASKED = threading.Event()
#: Who asked, beside the process itself.
_SIGNALLED, _ORDERED = threading.Event(), threading.Event()


class Regroup(Exception):
    """Ends the workers of an elastic run after a checkpoint, to start again as the cluster is then.

    Args:
        leaving: ids of the hosts whose workers were asked to leave.
    """

    def __init__(self, leaving: list[str]) -> None:
        super().__init__(leaving)
        self.leaving = leaving

    def __str__(self) -> str:
        hosts = f" without {len(self.leaving)} host(s) that leave" if self.leaving else ""
        return f"the workers start again{hosts}"


class TooFewHosts(Exception):
    """The driver of an elastic run was asked to leave while too few hosts were there to train."""


def asked() -> bool:
    """Whether this process was asked to leave."""
    return _ASKED.is_set()


def signalled() -> bool:
    """Whether it was by a signal to this process, a worker: its host may be about to go."""
    return _SIGNALLED.is_set()


def ordered() -> bool:
    """Whether it was by the driver's file: the run is to end."""
    return _ORDERED.is_set()


def regroup() -> None:
    """Ask this process, a worker, to leave so that more workers can start; for the controller."""
    _ASKED.set()


@contextlib.contextmanager
def listening(file: Path | None = None) -> Iterator[None]:
    """SIGTERM is a notice for the length of a block; a second one raises KeyboardInterrupt.

    Outside the main thread, where Python allows no signal handlers, it does nothing.

    Args:
        file: put there at a notice, for workers in other processes. One that is there already is
            an old one and removed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if _ASKED.is_set():
            raise KeyboardInterrupt
        _ASKED.set()
        if file is not None:
            file.touch()
        console.warn("asked to leave (SIGTERM): a checkpoint after this step, then the end")

    _ASKED.clear()
    if file is not None:
        file.unlink(missing_ok=True)
    before = signal.signal(signal.SIGTERM, ask)
    # Ray Train takes Ctrl-C for itself and does not give it back: after the fit it would start
    # another Ray, to abort what is over.
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)
        _ASKED.clear()
        if file is not None:
            file.unlink(missing_ok=True)


def listen_in_worker() -> None:
    """Take SIGTERM as a notice from now on, in the main thread of a worker process.

    A second one ends the process as the first one would have without this.
    """
    before = signal.getsignal(signal.SIGTERM)

    def ask(number: int, frame: FrameType | None) -> None:
        _SIGNALLED.set()
        _ASKED.set()
        signal.signal(signal.SIGTERM, before)

    for event in (_ASKED, _SIGNALLED, _ORDERED):
        event.clear()
    signal.signal(signal.SIGTERM, ask)


@contextlib.contextmanager
def looking_for(file: Path) -> Iterator[None]:
    """Look for the driver's file in a thread, for the length of a block."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_S):
            # Listing the folder asks a network file system, where a look at the name may not.
            with contextlib.suppress(OSError), os.scandir(file.parent) as entries:
                if any(entry.name == file.name for entry in entries):
                    _ORDERED.set()
                    _ASKED.set()
                    return

    thread = threading.Thread(target=look, name="notice", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
