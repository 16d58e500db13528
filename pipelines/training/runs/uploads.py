"""Upload of a run to its object store in a thread, so that training never waits for the store."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.runs import checkpoints
from pipelines.training.runs.mirror import (
    CHECKPOINTS,
    RESULT,
    TRAINING,
    RunMirror,
    link_checkpoint,
    mirror_of,
)
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage.directories import open_store
from skillnet_platform.storage.locks import hold_lock
from skillnet_platform.storage.retry import StoreUnavailableError

OUTBOX = "outbox"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
#: Seconds that a run waits at its end for a store that does not answer, before it lists the
#: missing files and exits with 1.
END_PATIENCE_S = 600.0
#: Exceptions of a store that is unusable now; all others are program errors.
RETRYABLE = (StoreUnavailableError, UserError, OSError)


class CheckpointUploads:
    """Uploader of checkpoints to a mirror; it skips checkpoints that a newer one replaced.

    Args:
        mirror: upload of the run's files to its store.
        keep: number of complete checkpoints that stay in the store.
    """

    def __init__(self, mirror: RunMirror, keep: int) -> None:
        self._mirror, self._keep = mirror, keep
        self._outbox = mirror.local / OUTBOX
        shutil.rmtree(self._outbox, ignore_errors=True)  # left by a process that died
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._busy = self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def add_checkpoint(self, path: Path) -> None:
        """Queue a checkpoint in its current state; return at once."""
        # Training may delete the original before the upload is done.
        copy = link_checkpoint(path, self._outbox)
        with self._changed:
            # Only the newest checkpoint matters for a restart.
            replaced, self._waiting = self._waiting, copy
            self._changed.notify_all()
        if replaced is not None:
            _remove_copy(replaced)

    def close(self, patience: float | None = None) -> str | None:
        """Wait for the upload of the queued checkpoint.

        Args:
            patience: seconds to wait while the store fails; None for :data:`END_PATIENCE_S`.

        Returns:
            Description of the missing checkpoint, or None.
        """
        end = time.monotonic() + (END_PATIENCE_S if patience is None else patience)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while not self._is_idle() and (self._error is None or time.monotonic() < end):
                self._changed.wait(0.2)
            if self._is_idle():
                shutil.rmtree(self._outbox, ignore_errors=True)
                return None
            name = self._waiting.name if self._waiting else "a checkpoint"
            error = self._error
        return f"{name} ({_reason_of(error) if error else 'upload in progress'})"

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
                self._mirror.upload_checkpoint(path, self._keep)
                if self._error is not None:
                    console.print_note(
                        f"{self._mirror.uri}: the store answers again; {path.name} is uploaded"
                    )
                self._error, pause = None, FIRST_PAUSE_S
                _remove_copy(path)
            except RETRYABLE as error:
                if self._error is None:
                    console.print_warning(
                        f"{path.name} is not yet in {self._mirror.uri}: {_reason_of(error)}. "
                        "Training continues; the upload is repeated until it succeeds"
                    )
                self._error = error
                with self._changed:
                    if self._waiting is None:
                        self._waiting = path
                    else:
                        _remove_copy(path)
                    # A newer checkpoint does not shorten the pause before the next attempt.
                    self._busy = False
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()


def _remove_copy(copy: Path) -> None:
    shutil.rmtree(copy.parent, ignore_errors=True)


def restore_latest(mirror: RunMirror) -> None:
    """Download the newest valid checkpoint of the store, unless the run's folder has a newer one.

    All workers of a node may call it at the same time.

    Args:
        mirror: upload of the run's files to its store.

    Raises:
        UserError: the store rejects the request.
    """
    folder = mirror.local / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)

    def describe(holder: str) -> str:
        return f"{folder}: waiting for {holder}, which downloads the newest checkpoint"

    # One worker per node downloads; the others wait and then find the checkpoint.
    with hold_lock(folder / ".restore.lock", describe, wait=True):
        local = checkpoints.find_newest(folder)
        try:
            mirror.download_newest(local.step if local else -1)
        except StoreUnavailableError as error:
            here = f"step {local.step}" if local else "no checkpoint"
            console.print_warning(f"{error.reason}. Resuming from this machine: {here}")


def upload_trained(mirror: RunMirror, uploads: CheckpointUploads, is_remote: bool) -> None:
    """Finish the uploads of rank 0, and upload the model if the driver is on another machine.

    The driver uploads again what is missing after this.

    Args:
        mirror: copy in the store of the run.
        uploads: queue of the checkpoints.
        is_remote: the driver does not see this worker's disk.
    """
    missing = uploads.close(None if is_remote else 0)
    if is_remote:
        left = retry_until("the final model", lambda: mirror.upload(*TRAINING), END_PATIENCE_S)
        missing = left or missing
    if missing:
        console.print_warning(f"{mirror.uri} lacks {missing}")


def _reason_of(error: BaseException) -> str:
    return error.reason if isinstance(error, StoreUnavailableError) else str(error)


def retry_until(label: str, action: Callable[[], Any], patience: float) -> str | None:
    """Repeat an action on a store until it succeeds or time is over.

    Args:
        label: name of the files, for the message.
        action: raises one of ``RETRYABLE`` on failure.
        patience: seconds.

    Returns:
        Description of the missing files, or None.
    """
    end, pause = time.monotonic() + patience, FIRST_PAUSE_S
    while True:
        try:
            action()
            return None
        except RETRYABLE as error:
            left = end - time.monotonic()
            if left <= 0:
                return f"{label} ({_reason_of(error)})"
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE_S)


def upload_results(mirror: RunMirror, keep: int) -> None:
    """Upload the files of a finished run that the store lacks.

    Args:
        mirror: upload of the run's files to its store.
        keep: number of complete checkpoints that stay in the store.

    Raises:
        StoreUnavailableError: names the missing files. All files stay on this machine.
    """
    begin = time.monotonic()

    def upload_newest() -> None:
        newest = checkpoints.find_newest(mirror.local / CHECKPOINTS)
        if newest is not None:
            mirror.upload_checkpoint(newest.path, keep)

    missing = [retry_until("its last checkpoint", upload_newest, END_PATIENCE_S)]
    left = max(0.0, END_PATIENCE_S - (time.monotonic() - begin))
    missing += [retry_until("its results", lambda: mirror.upload(*TRAINING, RESULT), left)]
    if any(missing):
        raise StoreUnavailableError(
            f"the run is finished and complete in {mirror.local}, but {mirror.uri} lacks "
            f"{' and '.join(part for part in missing if part)}. Run the same command again to "
            "upload it"
        )


def fit_storage(config: FinetuneConfig, run: Path) -> dict[str, Any]:
    """Return Ray Train's storage arguments for a fit: in the run's folder, or in its mirror.

    The mirror is used if workers may run on nodes that do not see the folder. The caller removes
    Ray's files after the fit.

    Args:
        config: settings of the run.
        run: folder of the run.
    """
    import ray

    mirror = mirror_of(config, run)
    # An elastic run may get nodes later.
    # With one node all workers see the run's folder.
    single_node = sum(node["Alive"] for node in ray.nodes()) < 2 and not config.training.min_workers
    if mirror is None or single_node:
        return {"storage_path": str(run / "ray")}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    system, path = open_store(mirror.uri_of("ray"))
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(system))}
