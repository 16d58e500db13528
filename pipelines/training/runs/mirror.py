"""A run's folder in an object store: uploaded during the run, restored where the disk is empty.

    <mirror>/<name>/
      config.yaml, run.json, progress.jsonl   single objects
      checkpoints/step-…/                     committed by their manifests
      model/                                  committed by its manifest
      evaluation.csv, …, result.json          the results; result.json is written last

The run works in its folder on this machine, which is complete without the store.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.runs.layout import TRAINED
from skillnet_files.commit import link_or_copy
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import atomic_write, directories, run_root, write_json
from skillnet_platform.storage.location import SyncedFolder
from skillnet_platform.storage.retry import StoreUnavailableError

CONFIG = "config.yaml"
RESULT = "result.json"
CHECKPOINTS = "checkpoints"
# Names are in the order of commit: the last one of a list is written last.
STATE = ("run.json", "progress.jsonl")
START = (CONFIG, *STATE)
MODEL = "model/"
FIGURES = ("evaluation.csv", "outcomes.parquet", TRAINED)
TRAINING = (MODEL, *START, *FIGURES)
#: Keys of a run's configuration that hold locations, which differ between machines.
LOCATION_KEYS = ("run_dir", "data", "init_from", "storage", "tracking")


if TYPE_CHECKING:
    from pipelines.training.runs.checkpoints import VerifiedCheckpoint


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


def link_checkpoint(path: Path, outbox: Path) -> Path:
    """Copy a checkpoint by hard links, so that the copy stays when the original is removed."""
    outbox.mkdir(parents=True, exist_ok=True)
    # The same step may be written again while its first copy is being uploaded.
    target = Path(tempfile.mkdtemp(dir=outbox)) / path.name
    shutil.copytree(path, target, copy_function=link_or_copy)
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
