"""A notice to leave: SIGTERM, as a machine that is about to be taken away sends it.

Whoever gets it, driver or worker, the run writes a checkpoint after the step at hand and ends; the
same command goes on from there. A worker's own notice rides in the last gradient bucket of the
step (:class:`~pipelines.training.gradient_sync.GradientSync`), so that all ranks leave after the
same one and no exchange is added. A driver puts up a :class:`Sign`, which rank 0 looks for beside
the training: it may be on another machine than its workers, so on Ray the sign hangs in Ray's own
store (:class:`~pipelines.training.ray_train.preemption.RaySign`), and no disk has to be common.

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
from typing import Protocol

from skillnet_platform import console
from skillnet_platform.errors import first_line

FILE = "leave"

#: Seconds between two looks for the driver's sign.
LOOK_S = 1.0
#: Seconds that a store of signs which does not answer may hold up the end of a block.
ANSWER_S = 10.0

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


class Sign(Protocol):
    """What a driver that was asked to leave puts up for its workers."""

    def put_up(self) -> None:
        """Show it."""

    def take_down(self) -> None:
        """Remove it, if it is there."""

    def is_up(self) -> bool:
        """Whether it is there."""


class FileSign:
    """A file, for workers that see the driver's disk.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def put_up(self) -> None:
        """Make the file."""
        self._path.touch()

    def take_down(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)

    def is_up(self) -> bool:
        """Whether the file is there."""
        # Listing the folder asks a network file system, where a look at the name may not.
        with contextlib.suppress(OSError), os.scandir(self._path.parent) as entries:
            return any(entry.name == self._path.name for entry in entries)
        return False


def asked() -> bool:
    """Whether this process was asked to leave."""
    return _ASKED.is_set()


def signalled() -> bool:
    """Whether it was by a signal to this process, a worker: its host may be about to go."""
    return _SIGNALLED.is_set()


def ordered() -> bool:
    """Whether it was by the driver's sign: the run is to end."""
    return _ORDERED.is_set()


def regroup() -> None:
    """Ask this process, a worker, to leave so that more workers can start; for the controller."""
    _ASKED.set()


@contextlib.contextmanager
def listening(sign: Sign | None = None) -> Iterator[None]:
    """SIGTERM is a notice for the length of a block; a second one raises KeyboardInterrupt.

    Outside the main thread, where Python allows no signal handlers, it does nothing.

    Args:
        sign: put up at a notice, for workers in other processes. One that is up already is an old
            one and taken down.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if _ASKED.is_set():
            raise KeyboardInterrupt
        _ASKED.set()
        over.set()
        console.warn("asked to leave (SIGTERM): a checkpoint after this step, then the end")

    def tell(sign: Sign) -> None:
        over.wait()
        if _ASKED.is_set():
            try:
                sign.put_up()
            except Exception as problem:
                console.warn(
                    f"the workers could not be told to leave ({first_line(problem)}); they train on"
                )

    _ASKED.clear()
    # Not in the handler: the main thread may be inside the very client that the sign needs.
    teller = threading.Thread(target=tell, args=(sign,), name="notice", daemon=True)
    if sign is not None:
        sign.take_down()
        teller.start()
    before = signal.signal(signal.SIGTERM, ask)
    # Ray Train takes Ctrl-C for itself and does not give it back: after the fit it would start
    # another Ray, to abort what is over.
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)
        over.set()
        if sign is not None:
            teller.join(ANSWER_S)
            sign.take_down()
        _ASKED.clear()


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
def looking_for(sign: Sign) -> Iterator[None]:
    """Look for the driver's sign in a thread, for the length of a block."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_S):
            # A store of signs that is away for a moment is asked again.
            with contextlib.suppress(Exception):
                if sign.is_up():
                    _ORDERED.set()
                    _ASKED.set()
                    return

    thread = threading.Thread(target=look, name="notice", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(ANSWER_S)
