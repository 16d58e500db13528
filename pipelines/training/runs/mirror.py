"""A run's folder in an object store: uploaded during the run, restored where the disk is empty.

    <mirror>/<name>/
      config.yaml, run.json, progress.jsonl   single objects
      checkpoints/step-…/                     committed by their manifests
      model/                                  committed by its manifest
      evaluation.csv, …, result.json          the results; result.json is written last

The run works in its folder on this machine, which is complete without the store. Checkpoints are
uploaded in a thread (:class:`CheckpointUploads`), so that training never waits for the store.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.runs.layout import CONFIG, RESULT, RUN, TRAINED
from skillnet_files.commit import link_or_copy
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import atomic_write, directories, run_root, write_json
from skillnet_platform.storage.location import SyncedFolder
from skillnet_platform.storage.locks import hold_lock
from skillnet_platform.storage.retry import StoreUnavailableError

if TYPE_CHECKING:
    from pipelines.training.runs.checkpoints import VerifiedCheckpoint

CHECKPOINTS = "checkpoints"
# Names are in the order of commit: the last one of a list is written last.
STATE = (RUN, "progress.jsonl")
START = (CONFIG, *STATE)
MODEL = "model/"
FIGURES = ("evaluation.csv", "outcomes.parquet", TRAINED)
TRAINING = (MODEL, *START, *FIGURES)
#: Keys of a run's configuration that hold locations, which differ between machines.
LOCATION_KEYS = ("run_dir", "data", "init_from", "storage", "tracking")


class RunMirror(SyncedFolder):
    """Folder of a run, and its copy in an object store.

    Args:
        uri: URI of the copy.
        run: the folder on this machine.
    """

    def __init__(self, uri: str, run: Path) -> None:
        super().__init__(uri, run, _check_model)
        #: Names of checkpoints in the store whose files are corrupt.
        self.corrupt: set[str] = set()

    def list_checkpoints(self) -> list[str]:
        """Return the names of the checkpoint folders, newest first, complete or not."""
        from pipelines.training.runs import checkpoints

        found = directories.list_folders(self.uri_of(CHECKPOINTS))
        return sorted(
            (name for name in found if checkpoints.step_of(name) >= 0),
            key=checkpoints.step_of,
            reverse=True,
        )

    def upload_checkpoint(self, path: Path, keep: int) -> None:
        """Upload a checkpoint; remove all but the newest ``keep`` complete ones from the store.

        Files of the checkpoint before it that did not change are copied within the store.

        Args:
            path: folder of the checkpoint.
            keep: number of checkpoints that stay.

        Raises:
            UserError, StoreUnavailableError: see
                :func:`skillnet_platform.storage.directories.put_directory`.
        """
        from pipelines.training.runs import checkpoints

        copies = self._find_copies(path)
        directories.put_directory(path, self.uri_of(CHECKPOINTS, path.name), copies)
        self.corrupt.discard(path.name)
        self.upload(*STATE)
        count = 0
        for name in self.list_checkpoints():
            stays = (
                count < keep
                and name not in self.corrupt
                and directories.is_committed(self.uri_of(CHECKPOINTS, name))
            )
            # Count only checkpoints that stay: corrupt ones do not use up the number to keep.
            count += stays
            # An interrupted upload is useless once a newer one is complete.
            if not stays and checkpoints.step_of(name) <= checkpoints.step_of(path.name):
                directories.remove_directory(self.uri_of(CHECKPOINTS, name))

    def _find_copies(self, path: Path) -> dict[str, str]:
        """Return name -> URI of the files of a checkpoint that another one in the store has."""
        mine = json.loads((path / directories.MANIFEST).read_bytes())["files"]
        for name in self.list_checkpoints():
            there = self.uri_of(CHECKPOINTS, name)
            if name in (path.name, *self.corrupt) or not directories.is_committed(there):
                continue
            sizes = {entry.name: entry.bytes for entry in directories.list_files(there)}
            # A damaged manifest, or one that was just removed, saves no transfer.
            with contextlib.suppress(ValueError, KeyError, AttributeError, TypeError, OSError):
                theirs = json.loads(
                    directories.read_bytes(directories.join_uri(there, directories.MANIFEST))
                )["files"]
                return {
                    file: directories.join_uri(there, file)
                    for file, entry in mine.items()
                    if theirs.get(file) == entry and sizes.get(file) == entry["bytes"]
                }
        return {}

    def check_writable(self, exists: bool) -> None:
        """Write to the store before the work starts, to find out whether it can be used.

        Args:
            exists: the run's folder exists on this machine, so a store that does not answer is
                only a warning.

        Raises:
            UserError: the store rejects the request.
            StoreUnavailableError: it does not answer.
        """
        # The summary is of an earlier process; the driver must download that of this one.
        (self.local / TRAINED).unlink(missing_ok=True)
        try:
            self.upload(*START)
            directories.remove_file(self.uri_of(TRAINED))
        except StoreUnavailableError as error:
            if not exists:
                raise
            console.print_warning(f"{error.reason}. Continuing with the files in {self.local}")

    def download_trained(self) -> None:
        """Download the final model and evaluation of a worker on a disk that is not seen here.

        Raises:
            UserError: the store has no model either.
            StoreUnavailableError: the store does not answer.
        """
        if (self.local / TRAINED).is_file():
            return
        if not self.has(TRAINED):
            raise UserError(
                f"the final model is neither in {self.local} nor in {self.uri}: the first worker "
                "could not upload it. Run the same command again"
            )
        # A preempted worker has written no model.
        self.download(MODEL, *STATE[1:], *FIGURES)

    def remove_if_reachable(self, name: str) -> None:
        """Remove a folder that is no longer used; ignore a store that does not answer."""
        with contextlib.suppress(StoreUnavailableError):
            directories.remove_directory(self.uri_of(name))

    def restore(self, config: FinetuneConfig) -> None:
        """Download the files of the run that this machine lacks, without checkpoints.

        Args:
            config: settings of this call; its locations replace those of the downloaded
                configuration.

        Raises:
            UserError: files are corrupt, or the store rejects the request.
            StoreUnavailableError: the store does not answer, and the run is not on this machine.
        """
        exists = (self.local / CONFIG).is_file()
        try:
            # Only a machine without the folder takes the configuration of the store.
            if not exists:
                self._download_config(config)
            if not (self.local / RESULT).is_file() and self.has(RESULT):
                self.download_results(MODEL)
        except StoreUnavailableError as error:
            if not exists:
                raise
            console.print_warning(f"{error.reason}. Continuing with the files in {self.local}")

    def download_newest(self, above: int = -1) -> "VerifiedCheckpoint | None":
        """Download the newest valid checkpoint of the store after a step; None if there is none.

        A corrupt checkpoint causes a warning, and the one before it is used.

        Args:
            above: ignore checkpoints up to this step.
        """
        from pipelines.training.runs import checkpoints

        for name in self.list_checkpoints():
            if checkpoints.step_of(name) <= above:
                return None
            there = self.uri_of(CHECKPOINTS, name)
            if not directories.is_committed(there):
                continue
            target = self.local / CHECKPOINTS / name
            try:
                directories.get_directory(there, target, check=checkpoints.verify_checkpoint)
            except UserError as error:
                console.print_warning(f"{there}: {error}; trying the checkpoint before it")
                self.corrupt.add(name)
                continue
            return checkpoints.verify_checkpoint(target)
        return None

    def _download_config(self, config: FinetuneConfig) -> None:
        try:
            content = directories.read_bytes(self.uri_of(CONFIG))
        except FileNotFoundError:
            return
        with tempfile.TemporaryDirectory() as temporary:
            stored = Path(temporary) / CONFIG
            stored.write_bytes(content)
            # The configuration comes first: a folder without it is no run directory.
            self.relocate_config(config, stored)
        self.download(*STATE)
        console.print_note(f"{config.name} is restored from {self.uri}")

    def relocate_config(self, config: FinetuneConfig, stored: Path | None = None) -> None:
        """Replace the locations in a configuration that another machine wrote.

        Args:
            config: settings of this call, with the locations of this machine.
            stored: the file; None takes that of the folder, if it exists.
        """
        stored = stored or self.local / CONFIG
        if not stored.is_file():
            return
        written = configuration.build_config(FinetuneConfig, configuration.load_yaml(stored))
        locations = {key: getattr(config, key) for key in LOCATION_KEYS}
        with atomic_write(self.local / CONFIG, "w") as stream:
            stream.write(configuration.to_yaml(replace(written, **locations)))

    def download_results(self, *folders: str) -> None:
        """Download some folders and the results of a finished run, with paths of this machine."""
        self.download(*folders, *FIGURES)
        result = json.loads(directories.read_bytes(self.uri_of(RESULT)))
        relocated = _replace_prefix(result, str(result.get("run", "")), str(self.local))
        write_json(self.local / RESULT, relocated)


def mirror_of(config: FinetuneConfig, run: Path) -> RunMirror | None:
    """Return the mirror of a run, or None."""
    if not config.storage.mirror:
        return None
    assert config.name is not None
    return RunMirror(directories.join_uri(config.storage.mirror, config.name), run)


def download_model(uri: str) -> Path:
    """Download a trained model from an object store, verify it, and cache it.

    Args:
        uri: address of a run's folder, a checkpoint or a saved model.

    Returns:
        Its folder on this machine, with the run's configuration beside it, if it has one.

    Raises:
        UserError: there is no complete model, or it is corrupt.
        StoreUnavailableError: the store does not answer.
    """
    # The URI may name a model, a checkpoint or a run's folder.
    model = run = uri.rstrip("/")
    if directories.is_committed(model):
        run = directories.join_uri(model, *([".."] * (2 if f"/{CHECKPOINTS}/" in model else 1)))
    else:
        there = RunMirror(run, Path())
        steps = [there.uri_of(CHECKPOINTS, step) for step in there.list_checkpoints()]
        complete = [
            candidate
            for candidate in [there.uri_of(MODEL), *steps]
            if directories.is_committed(candidate)
        ]
        if not complete:
            raise UserError(
                f"{uri} holds no complete model: expected a checkpoint or saved model "
                f"({directories.MANIFEST}), or a run's folder with one"
            )
        model = complete[0]
    manifest = directories.read_bytes(directories.join_uri(model, directories.MANIFEST))
    # The manifest has the hashes of all files, so a changed model gets another folder.
    key = hashlib.sha256(model.encode() + manifest).hexdigest()[:16]
    cached = run_root() / "cache" / "models" / key
    target = cached / model.removeprefix(run).lstrip("/")
    if not (target / directories.MANIFEST).is_file():
        directories.get_directory(model, target, check=_check_model)
        SyncedFolder(run, cached).download(CONFIG, STATE[0], TRAINED)
    return target


def _check_model(folder: Path) -> None:
    from skillnet.serialization import check_file, read_manifest

    manifest = read_manifest(folder)
    for name in manifest["files"]:
        check_file(folder, name, manifest)


def _replace_prefix(value: Any, old: str, new: str) -> Any:
    """Replace a folder at the start of all paths in a result."""
    if isinstance(value, dict):
        return {key: _replace_prefix(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_prefix(item, old, new) for item in value]
    if isinstance(value, str) and old and (value == old or value.startswith(old + "/")):
        return new + value[len(old) :]
    return value


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
        self._outbox.mkdir(parents=True, exist_ok=True)
        # Training may delete the original before the upload is done, or write the same step again.
        copy = Path(tempfile.mkdtemp(dir=self._outbox)) / path.name
        shutil.copytree(path, copy, copy_function=link_or_copy)
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
    from pipelines.training.runs import checkpoints

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
    from pipelines.training.runs import checkpoints

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

    system, path = directories.open_store(mirror.uri_of("ray"))
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(system))}
