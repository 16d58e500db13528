"""A run's folder in a store: sent while the run goes on, taken up where the disk is empty.

    <mirror>/<name>/
      config.yaml, run.json, progress.jsonl   single objects
      checkpoints/step-…/                     committed by their manifests
      model/                                  committed by its manifest
      evaluation.csv, …, result.json          the results; the last of them says that all are there

The folder on this machine is where the run works, and is whole without the store.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config.run import FinetuneConfig
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import atomic_write, directories, run_root, write_json
from skillnet_platform.storage.directories import StoreUnavailable

CONFIG = "config.yaml"
RESULT = "result.json"
#: Files of a run that are sent and taken as they are, if they are there.
STATE = ("run.json", "progress.jsonl")
#: What training came to: time, losses, throughput.
TRAINED = "trained.json"
RESULTS = (TRAINED, "evaluation.csv", "outcomes.parquet")
FOLDERS = ("model",)
CHECKPOINTS = "checkpoints"
#: Keys of a run's configuration that say where things are, which differs from machine to machine.
PLACES = ("run_dir", "data", "init_from", "storage", "tracking")


if TYPE_CHECKING:
    from pipelines.runs.checkpoints import Checkpoint


class Mirror:
    """A run's folder in a store.

    Args:
        uri: of the folder.
        run: the folder on this machine.
    """

    def __init__(self, uri: str, run: Path) -> None:
        self.uri, self.run = uri, run
        #: Names of checkpoints in the store that were found altered.
        self.damaged: set[str] = set()

    def place(self, *names: str) -> str:
        """URI of something in the folder."""
        return directories.join(self.uri, *names)

    def steps(self) -> list[str]:
        """Names of the checkpoint folders in the store, whole or not, newest first."""
        from pipelines.runs import checkpoints

        found = directories.list_folders(self.place(CHECKPOINTS))
        return sorted(
            (name for name in found if checkpoints.step_of(name) >= 0),
            key=checkpoints.step_of,
            reverse=True,
        )

    def put_checkpoint(self, path: Path, keep: int) -> None:
        """Send a checkpoint, and remove all but the newest ``keep`` whole ones from the store.

        Raises:
            UserError, StoreUnavailable: see :func:`remote.put_directory`.
        """
        from pipelines.runs import checkpoints

        directories.put_directory(path, self.place(CHECKPOINTS, path.name))
        self.damaged.discard(path.name)
        self.put_files(*STATE)
        kept = 0
        for name in self.steps():
            whole = (
                kept < keep
                and name not in self.damaged
                and directories.is_committed(self.place(CHECKPOINTS, name))
            )
            kept += whole
            # An upload that broke off is of no use once a newer one is whole.
            if not whole and checkpoints.step_of(name) <= checkpoints.step_of(path.name):
                directories.remove_directory(self.place(CHECKPOINTS, name))

    def put_files(self, *names: str) -> None:
        """Send those of these files that are there."""
        for name in names:
            if (self.run / name).is_file():
                directories.put_file(self.run / name, self.place(name))

    def put_trained(self) -> None:
        """Send the final model and what training came to."""
        for name in FOLDERS:
            if (self.run / name / directories.MANIFEST).is_file():
                directories.put_directory(self.run / name, self.place(name))
        self.put_files(CONFIG, *STATE, RESULTS[0])

    def put_results(self) -> None:
        """Send all that a finished run leaves, and last the file that says that it is finished."""
        self.put_trained()
        self.put_files(*RESULTS[1:])
        self.put_files(RESULT)

    def begin(self, known: bool) -> None:
        """Find out before the work starts whether the store can be used.

        Args:
            known: the run was begun on this machine: it can do without the store for a while.

        Raises:
            UserError: the store refuses.
            StoreUnavailable: it does not answer.
        """
        # Of an earlier part of the run: what the driver takes must be of this one.
        (self.run / RESULTS[0]).unlink(missing_ok=True)
        try:
            self.put_files(CONFIG, *STATE)
            directories.remove_file(self.place(RESULTS[0]))
        except StoreUnavailable as problem:
            if not known:
                raise
            console.warn(f"{problem.reason}. Going on with what is in {self.run}")

    def take_trained(self) -> None:
        """Bring the final model of a worker whose disk this machine does not see.

        Raises:
            UserError: it is not there either.
            StoreUnavailable: the store does not answer.
        """
        if (self.run / RESULTS[0]).is_file():
            return
        if not directories.exists(self.place(RESULTS[0])):
            raise UserError(
                f"the final model is neither in {self.run} nor in {self.uri}: the first worker "
                "could not send it. Run the same command again"
            )
        for name in FOLDERS:
            # A worker that was asked to leave has made no model.
            if directories.is_committed(self.place(name)):
                directories.get_directory(self.place(name), self.run / name, check=_check_model)
        for name in (*STATE[1:], RESULTS[0]):
            if directories.exists(self.place(name)):
                directories.get_file(self.place(name), self.run / name)

    def clear(self, name: str) -> None:
        """Remove what is of no use any more; if the store is away it stays."""
        with contextlib.suppress(StoreUnavailable):
            directories.remove_directory(self.place(name))

    def is_finished(self) -> bool:
        """Whether the store has the run's results."""
        return directories.exists(self.place(RESULT))

    def take_up(self, config: FinetuneConfig) -> None:
        """Bring what the store has of the run and this machine lacks, but checkpoints.

        Args:
            config: of this call: its places are put into the configuration that is taken.

        Raises:
            UserError: files that were altered; the store refuses.
            StoreUnavailable: the store does not answer, and the run is not on this machine.
        """
        known = (self.run / CONFIG).is_file()
        try:
            if not known:
                self._take_config(config)
            if not (self.run / RESULT).is_file() and self.is_finished():
                self.take_results()
        except StoreUnavailable as problem:
            if not known:
                raise
            console.warn(f"{problem.reason}. Going on with what is in {self.run}")

    def newest(self, above: int = -1) -> "Checkpoint | None":
        """Download the newest whole checkpoint of the store beyond a step; none if there is none.

        One that was altered is named, and the one before it is taken.
        """
        from pipelines.runs import checkpoints

        for name in self.steps():
            if checkpoints.step_of(name) <= above:
                return None
            there = self.place(CHECKPOINTS, name)
            if not directories.is_committed(there):
                continue
            target = self.run / CHECKPOINTS / name
            try:
                directories.get_directory(there, target, check=checkpoints.verify)
            except UserError as problem:
                console.warn(f"{there}: {problem}; trying the checkpoint before it")
                self.damaged.add(name)
                continue
            return checkpoints.verify(target)
        return None

    def _take_config(self, config: FinetuneConfig) -> None:
        try:
            content = directories.read_bytes(self.place(CONFIG))
        except FileNotFoundError:
            return
        with tempfile.TemporaryDirectory() as aside:
            stored = Path(aside) / CONFIG
            stored.write_bytes(content)
            # First of all: a folder without it is taken for somebody else's.
            self.settle_in(config, stored)
        for name in STATE:
            if directories.exists(self.place(name)):
                directories.get_file(self.place(name), self.run / name)
        console.note(f"{config.name} is taken up from {self.uri}")

    def settle_in(self, config: FinetuneConfig, stored: Path | None = None) -> None:
        """Put the places of this machine into a configuration that another machine wrote.

        Args:
            config: of this call, with the places.
            stored: the file; by default that of the folder, if it is there.
        """
        stored = stored or self.run / CONFIG
        if not stored.is_file():
            return
        there = configuration.build(FinetuneConfig, configuration.load_yaml(stored))
        places = {key: getattr(config, key) for key in PLACES}
        with atomic_write(self.run / CONFIG, "w") as stream:
            stream.write(configuration.to_yaml(replace(there, **places)))

    def take_results(self, folders: Sequence[str] = FOLDERS) -> None:
        """Bring the results of a finished run, and those folders; paths in them are made ours."""
        for name in folders:
            if directories.is_committed(self.place(name)):
                directories.get_directory(self.place(name), self.run / name, check=_check_model)
        for name in RESULTS:
            if directories.exists(self.place(name)):
                directories.get_file(self.place(name), self.run / name)
        told = json.loads(directories.read_bytes(self.place(RESULT)))
        write_json(self.run / RESULT, _moved(told, str(told.get("run", "")), str(self.run)))


def mirror_of(config: FinetuneConfig, run: Path) -> Mirror | None:
    """The mirror of a run, if it has one."""
    if not config.storage.mirror:
        return None
    assert config.name is not None
    return Mirror(directories.join(config.storage.mirror, config.name), run)


def fetch_model(uri: str) -> Path:
    """Copy a trained model from a store to this machine, verified, and kept for the next time.

    Args:
        uri: of a run's folder, of a checkpoint or saved model.

    Returns:
        The folder that stands for it here: with the run's configuration beside it, if it has one.

    Raises:
        UserError: there is no whole model, or it was altered.
        StoreUnavailable: the store does not answer.
    """
    model = run = uri.rstrip("/")
    if directories.is_committed(model):
        run = directories.join(model, *([".."] * (2 if f"/{CHECKPOINTS}/" in model else 1)))
    else:
        there = Mirror(run, Path())
        steps = [there.place(CHECKPOINTS, step) for step in there.steps()]
        whole = [
            place for place in [there.place(FOLDERS[0]), *steps] if directories.is_committed(place)
        ]
        if not whole:
            raise UserError(
                f"{uri} holds no whole model: expected a checkpoint or saved model "
                f"({directories.MANIFEST}), or a run's folder with one"
            )
        model = whole[0]
    about = directories.read_bytes(directories.join(model, directories.MANIFEST))
    kept = run_root() / "cache" / "models" / hashlib.sha256(model.encode() + about).hexdigest()[:16]
    target = kept / model.removeprefix(run).lstrip("/")
    if not (target / directories.MANIFEST).is_file():
        directories.get_directory(model, target, check=_check_model)
        for name in (CONFIG, STATE[0], RESULTS[0]):
            if directories.exists(directories.join(run, name)):
                directories.get_file(directories.join(run, name), kept / name)
    return target


def snapshot(path: Path, outbox: Path) -> Path:
    """A checkpoint that stays as it is while the original is removed: hard links, no copies."""
    outbox.mkdir(parents=True, exist_ok=True)
    # The same step may be written again while its first copy is on its way.
    target = Path(tempfile.mkdtemp(dir=outbox)) / path.name
    shutil.copytree(path, target, copy_function=_link)
    return target


def _check_model(folder: Path) -> None:
    from skillnet.serialization import check_file, read_manifest

    manifest = read_manifest(folder)
    for name in manifest["files"]:
        check_file(folder, name, manifest)


def _link(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _moved(told: Any, before: str, now: str) -> Any:
    """The same result, its paths those of the folder in which it is now."""
    if isinstance(told, dict):
        return {key: _moved(value, before, now) for key, value in told.items()}
    if isinstance(told, list):
        return [_moved(value, before, now) for value in told]
    if isinstance(told, str) and before and (told == before or told.startswith(before + "/")):
        return now + told[len(before) :]
    return told
