"""Finding a trained model: a folder, a run, or a version in the registry.

models:/skillnet@champion       a registered version (its folder holds a bundle)
runs/2026-…/                    a run's folder: its final model, else its newest checkpoint
runs/2026-…/checkpoints/step-…  a checkpoint
some/folder                     what save_pretrained wrote, or a bundle
s3://bucket/runs/2026-…         any of these in a store: copied to this machine first
2026-…  or an MLflow run id     a run by its name below the run root, or by its id
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from skillnet import systems
from skillnet.growth import remove_task
from skillnet.multitask_model import TaskModel
from skillnet.precision import best_device
from skillnet.serialization import check_file, load_tensors, read_manifest
from skillnet_platform import tracking
from skillnet_platform.config import load_yaml
from skillnet_platform.errors import UserError
from skillnet_platform.storage import read_record, run_root
from skillnet_platform.storage.objects import is_uri

DEFAULT = "models:/skillnet@champion"
BUNDLE = "bundle"
REMEDY = "give another model, or make this one again"


@dataclass(frozen=True)
class Source:
    """Where a trained model lies, and what is known of how it was made.

    Args:
        name: as the user gave it, or in words.
        weights: folder that ``skillnet.systems.load`` reads.
        bundle: folder with tokenizer and labels beside the weights, or none.
        run: the run's folder, or none.
        run_id: of its MLflow run, or none.
        version: in the registry, or none.
        settings: the resolved configuration of its training, as plain values; {} if unknown.
        steps: training steps done, or none.
    """

    name: str
    weights: Path
    bundle: Path | None = None
    run: Path | None = None
    run_id: str | None = None
    version: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over the hashes of all weight files: changes with any weight."""
        from skillnet_platform.config import digest

        files = read_manifest(self.weights)["files"]
        wanted = {n: e["sha256"] for n, e in files.items() if not n.startswith("optimizer-")}
        return digest(wanted)

    @property
    def seed(self) -> int:
        """Seed of the training, 0 if unknown."""
        return int(self.settings.get("seed", 0))

    @property
    def corpora(self) -> dict[str, str]:
        """Task -> corpus, as in training."""
        tasks = self.settings.get("tasks") or {}
        return {name: task["corpus"] for name, task in tasks.items() if task}

    @property
    def limits(self) -> dict[str, int | None]:
        """Task -> longest sequence, as in training."""
        tasks = self.settings.get("tasks") or {}
        return {name: task.get("max_length") for name, task in tasks.items() if task}

    @property
    def auxiliary(self) -> set[str]:
        """Tasks that only helped the others to learn."""
        tasks = self.settings.get("tasks") or {}
        return {name for name, task in tasks.items() if task and task.get("auxiliary")}

    def at_work(self, tasks: Iterable[str]) -> list[str]:
        """Those of the model's tasks that its run trained or measured; all if nothing is known of
        the run. A model has heads for the others too, which nobody trained."""
        known = self.corpora if "training" in self.settings else None
        return [name for name in tasks if known is None or name in known]


def find(given: str, uri: str | None = None) -> Source:
    """Find a model; see the head of this file for what may be given.

    Args:
        given: a path, a run's name or id, or a registry URI.
        uri: MLflow tracking URI; by default as everywhere.

    Raises:
        UserError: there is none, or it is not whole.
    """
    if given.startswith(("models:/", "runs:/")):
        return _registered(given, uri)
    if is_uri(given):
        from pipelines.runs.mirror import fetch_model

        return _folder(fetch_model(given), given)
    path = Path(given).expanduser()
    if path.is_dir():
        return _folder(path.absolute(), given)
    if (run_root() / given).is_dir():
        return _folder(run_root() / given, given)
    if len(given) == 32 and given.isalnum():
        return _by_id(given, uri)
    raise UserError(
        f"{given}: there is no such folder, no such run below {run_root()}, and it is no registry "
        f"address such as {DEFAULT}"
    )


def load(source: Source, task: str | None = None) -> TaskModel:
    """The model in evaluation mode, on the GPU if there is one; with ``task`` only what that
    task activates.

    A checkpoint of a run that keeps averaged weights gives those, and does without the heads of
    auxiliary tasks.

    Raises:
        ValueError: files that are missing or altered.
    """
    model = systems.load(source.weights, task)
    manifest = read_manifest(source.weights)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for file in model.files_of():
            name = f"average-{file}.safetensors"
            if name not in manifest["files"]:
                continue
            path = check_file(source.weights, name, manifest)
            for key, value in load_tensors(path).items():
                if key not in own or own[key].shape != value.shape:
                    raise UserError(f"{path}: {key} is no average of a weight of this model")
                own[key].copy_(value)
    if task is None:
        for name in source.auxiliary & set(model.config.tasks):
            remove_task(model, name)
    return model.to(best_device())


def load_at_work(source: Source) -> TaskModel:
    """As :func:`load`, without the heads of tasks that its run left alone: for whoever needs the
    corpora of all of its tasks."""
    model = load(source)
    tasks = list(model.config.tasks)
    for name in set(tasks) - set(source.at_work(tasks)):
        remove_task(model, name)
    return model


def knows_run(run_id: str, uri: str | None) -> bool:
    """False if the tracker answers that it has no such run (a folder copied from elsewhere)."""
    from mlflow.exceptions import MlflowException

    from skillnet_platform.tracking import backend

    try:
        backend.client(backend.resolve_uri(uri)).get_run(run_id)
    except MlflowException as problem:
        return bool(problem.error_code != "RESOURCE_DOES_NOT_EXIST")
    return True


def _registered(given: str, uri: str | None) -> Source:
    from skillnet_platform.tracking import registry

    found = registry.resolve(given, uri)
    bundle = found.path / "artifacts" / BUNDLE
    if not bundle.is_dir():
        raise UserError(f"{given} is no SkillNet model: it has no artifact {BUNDLE!r}")
    source = _bundle(bundle, given)
    return Source(
        name=given,
        weights=source.weights,
        bundle=bundle,
        run_id=found.run_id or source.run_id,
        version=found.version,
        settings=source.settings,
        steps=source.steps,
    )


def _bundle(folder: Path, given: str) -> Source:
    told: dict[str, type | tuple[type, ...]] = {
        "run_id": (str, NoneType),
        "settings": dict,
        "steps": (int, NoneType),
    }
    about = read_record(folder / "serving.json", told, REMEDY)
    return Source(
        name=given,
        weights=folder / "model",
        bundle=folder,
        run_id=about.get("run_id"),
        settings=_whole(about["settings"], folder / "serving.json"),
        steps=about.get("steps"),
    )


def _whole(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Settings from that file; UserError if they lack what a ``Source`` tells of them."""
    tasks = settings.get("tasks") or {}
    sound = isinstance(tasks, dict) and all(
        not task or (isinstance(task, dict) and isinstance(task.get("corpus"), str))
        for task in tasks.values()
    )
    if not sound or not isinstance(settings.get("seed", 0), int):
        raise UserError(f"{path} is damaged: it names no seed, or tasks without a corpus; {REMEDY}")
    return settings


def _folder(path: Path, given: str) -> Source:
    if (path / "serving.json").is_file():
        return _bundle(path, given)
    if (path / "artifacts" / BUNDLE).is_dir():
        return _bundle(path / "artifacts" / BUNDLE, given)
    if (path / "manifest.json").is_file() and (path / "config.json").is_file():
        run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        return _with_run(path, run if (run / "config.yaml").is_file() else None, given)
    if (path / "model" / "manifest.json").is_file():
        return _with_run(path / "model", path, given)
    if (path / "checkpoints").is_dir():
        from pipelines.runs import checkpoints

        newest = checkpoints.newest(path / "checkpoints")
        if newest is not None:
            return _with_run(newest.path, path, given)
    raise UserError(
        f"{path} holds no whole model: expected a checkpoint or saved model (manifest.json and "
        "config.json), or a run's folder with one"
    )


def _with_run(weights: Path, run: Path | None, given: str) -> Source:
    settings: dict[str, Any] = {}
    if run is not None and (run / "config.yaml").is_file():
        settings = _whole(load_yaml(run / "config.yaml"), run / "config.yaml")
    run_id = tracking.recorded(run / "run.json") if run is not None else None
    steps = None
    for told in (weights / "state.json", *([run / "trained.json"] if run else [])):
        if steps is None and told.is_file():
            steps = read_record(told, {"step": int}, REMEDY)["step"]
    return Source(given, weights, None, run, run_id, None, settings, steps)


def _by_id(run_id: str, uri: str | None) -> Source:
    from mlflow.exceptions import MlflowException

    from skillnet_platform.tracking import backend

    chosen = backend.resolve_uri(uri)
    try:
        run = backend.client(chosen).get_run(run_id)
    except MlflowException:
        raise UserError(f"{run_id}: no run with this id in {chosen}") from None
    folder = run.data.tags.get("run_dir", "")
    if not folder or not Path(folder).is_dir():
        raise UserError(
            f"run {run_id} ({run.info.run_name}): its folder {folder or '(not recorded)'} is not "
            "on this machine; give the folder of a checkpoint"
        )
    return _folder(Path(folder), run_id)
