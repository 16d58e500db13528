"""Sending a run to its store from a thread, so that training never waits for the store."""

import fcntl
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.config.run import FinetuneConfig
from pipelines.runs import checkpoints
from pipelines.runs.mirror import CHECKPOINTS, Mirror, mirror_of, snapshot
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage.directories import StoreUnavailable

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
        if overtaken is not None:
            _remove(overtaken)

    def close(self, patience: float) -> str | None:
        """Wait while what is left goes out, and ``patience`` seconds while it does not.

        Returns:
            Words on what is missing after that, or none.
        """
        end = time.monotonic() + patience
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while not self._is_idle() and (self._problem is None or time.monotonic() < end):
                self._changed.wait(0.2)
            if self._is_idle():
                shutil.rmtree(self._outbox, ignore_errors=True)
                return None
            name = self._waiting.name if self._waiting else "a checkpoint"
            problem = self._problem
        return f"{name} ({_reason(problem) if problem else 'on its way'})"

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
                _remove(path)
            except TROUBLE as problem:
                if self._problem is None:
                    console.warn(
                        f"{path.name} is not yet in {self._mirror.uri}: {_reason(problem)}. "
                        "Training goes on; it is sent when that is mended"
                    )
                self._problem = problem
                with self._changed:
                    if self._waiting is None:
                        self._waiting = path
                    else:
                        _remove(path)
                    # A newer checkpoint is no reason to try again sooner.
                    self._busy = False
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()


def _remove(snapshot: Path) -> None:
    shutil.rmtree(snapshot.parent, ignore_errors=True)


def bring(mirror: Mirror) -> None:
    """Have the newest whole checkpoint of the store in the run's folder, unless a newer one is.

    All workers of a machine may call it at once.

    Raises:
        UserError: the store refuses.
    """
    folder = mirror.run / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".bring.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mine = checkpoints.newest(folder)
        try:
            mirror.newest(mine.step if mine else -1)
        except StoreUnavailable as problem:
            here = f"step {mine.step}" if mine else "nothing"
            console.warn(f"{problem.reason}. Going on from what is on this machine: {here}")


def send_trained(mirror: Mirror, uploads: Uploads, patience: float, apart: bool) -> None:
    """At the end of rank 0: see its checkpoints off, and send the driver the model if it is apart.

    What does not get through is told by the driver, which tries again.
    """
    missing = uploads.close(patience if apart else 0)
    if apart:
        missing = send("the final model", mirror.put_trained, patience) or missing
    if missing:
        console.warn(f"{mirror.uri} lacks {missing}")


def _reason(problem: BaseException) -> str:
    return problem.reason if isinstance(problem, StoreUnavailable) else str(problem)


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
                return f"{what} ({_reason(problem)})"
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE_S)


def deliver(mirror: Mirror, keep: int, patience: float) -> None:
    """Send what the store lacks of a finished run.

    Args:
        mirror: of the run.
        keep: whole checkpoints that stay in the store.
        patience: seconds to wait for a store that cannot be used.

    Raises:
        StoreUnavailable: names what is not there. Nothing is lost: it is all on this machine.
    """
    begin = time.monotonic()

    def checkpoint() -> None:
        mine = checkpoints.newest(mirror.run / CHECKPOINTS)
        if mine is not None:
            mirror.put_checkpoint(mine.path, keep)

    missing = [send("its last checkpoint", checkpoint, patience)]
    left = max(0.0, patience - (time.monotonic() - begin))
    missing += [send("its results", mirror.put_results, left)]
    if any(missing):
        raise StoreUnavailable(
            f"the run is finished and whole in {mirror.run}, but {mirror.uri} lacks "
            f"{' and '.join(words for words in missing if words)}. Run the same command again to "
            "send it"
        )


def fit_storage(config: FinetuneConfig, run: Path) -> dict[str, Any]:
    """Where Ray Train keeps its own few files of a fit: the run's folder, or its mirror if
    workers may run on machines that do not see that folder. They are removed after the fit."""
    import ray

    mirror = mirror_of(config, run)
    # An elastic run may get hosts later.
    alone = sum(node["Alive"] for node in ray.nodes()) < 2 and not config.training.min_workers
    if mirror is None or alone:
        return {"storage_path": str(run / "ray")}
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    system, path = fsspec.url_to_fs(mirror.place("ray"))
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(system))}
