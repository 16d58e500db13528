"""Sending a run to its store from a thread, so that training never waits for the store."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.mirror import Mirror, snapshot
from pipelines.training import checkpoints
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.remote import StoreUnavailable

OUTBOX = "outbox"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
#: What a store that cannot be used now raises; all else is a mistake of ours.
TROUBLE = (StoreUnavailable, UserError, OSError)


class Uploads:
    """Sends checkpoints to a mirror, newest first; those that a newer one overtook are left out.

    Args:
        mirror: of the run.
        keep: whole checkpoints that stay in the store.
    """

    def __init__(self, mirror: Mirror, keep: int) -> None:
        self._mirror, self._keep = mirror, keep
        self._outbox = mirror.run / OUTBOX
        shutil.rmtree(self._outbox, ignore_errors=True)  # of a process that died
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._busy = self._closing = False
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def checkpoint(self, path: Path) -> None:
        """Send a checkpoint as it is now. Returns at once."""
        kept = snapshot(path, self._outbox)
        with self._changed:
            overtaken, self._waiting = self._waiting, kept
            self._changed.notify_all()
        if overtaken is not None and overtaken != kept:
            shutil.rmtree(overtaken, ignore_errors=True)

    def close(self, patience: float) -> str | None:
        """Wait for what is not yet sent; words on what is missing after that time, or none."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(self._is_idle, patience)
            left = self._waiting
            if self._is_idle():
                shutil.rmtree(self._outbox, ignore_errors=True)
                return None
        name = left.name if left else "a checkpoint"
        return f"checkpoint {name} ({self._problem or 'on its way'})"

    def _is_idle(self) -> bool:
        return self._waiting is None and not self._busy

    def _work(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                path, self._waiting = self._waiting, None
                self._busy = path is not None
                if path is None:
                    return
            try:
                self._mirror.put_checkpoint(path, self._keep)
                if self._problem is not None:
                    console.note(f"{self._mirror.uri}: the store is back; {path.name} is there")
                self._problem, pause = None, FIRST_PAUSE_S
                shutil.rmtree(path, ignore_errors=True)
            except TROUBLE as problem:
                if self._problem is None:
                    console.warn(
                        f"{path.name} is not yet in {self._mirror.uri}: {problem}. Training goes "
                        "on; it is sent when that is mended"
                    )
                self._problem = problem
                with self._changed:
                    if self._waiting is None:
                        self._waiting = path
                    else:
                        shutil.rmtree(path, ignore_errors=True)
                    # A newer checkpoint is no reason to try again sooner.
                    self._busy = False
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()


def send(what: str, action: Callable[[], Any], patience: float) -> str | None:
    """Do something with a store until it works or so many seconds are over.

    Returns:
        Words on what is missing, or none.
    """
    end, pause = time.monotonic() + patience, FIRST_PAUSE_S
    while True:
        try:
            action()
            return None
        except TROUBLE as problem:
            left = end - time.monotonic()
            if left <= 0:
                return f"{what} ({problem})"
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE_S)


def send_rest(mirror: Mirror, keep: int) -> None:
    """Send the newest whole checkpoint of the run unless the store has it or a newer one.

    Raises:
        UserError, StoreUnavailable: see :func:`remote.put_directory`.
    """
    mine = checkpoints.newest(mirror.run / "checkpoints")
    if mine is not None:
        mirror.put_checkpoint(mine.path, keep)
