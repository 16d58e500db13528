"""Resolution of a trained model: a folder, a run, or a version in the registry.

models:/skillnet@champion       a registered version (its folder holds a bundle)
runs/2026-…/                    a run's folder: its final model, else its newest checkpoint
runs/2026-…/checkpoints/step-…  a checkpoint
some/folder                     a folder written by save_pretrained, or a bundle
s3://bucket/runs/2026-…         any of these in an object store: downloaded first
2026-…  or an MLflow run id     a run by its name below the run root, or by its id
"""

import contextlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.data.config.folds import FoldConfig
from pipelines.training.runs.bundle_manifest import MANIFEST, is_bundle, read_bundle_manifest
from pipelines.training.runs.layout import (
    SETTINGS,
    TRAINED,
    find_untrained_tasks,
    parse_task_counts,
)
from skillnet.serialization import (
    check_file,
    config_to_dict,
    load_tensors,
    read_config,
    read_manifest,
)
from skillnet_platform import tracking
from skillnet_platform.config import build_config, load_yaml
from skillnet_platform.errors import UserError, check_known_names
from skillnet_platform.storage import data_root, read_json, read_record, run_root
from skillnet_platform.storage.directories import is_uri
from skillnet_platform.storage.location import Location, parse_location

if TYPE_CHECKING:
    from skillnet.multitask_model import TaskModel

DEFAULT_MODEL = "models:/skillnet@champion"
BUNDLE = "bundle"
#: Starts of the names of a file of weights: as trained, and averaged over the training.
FORMS = ("", "average-")
REMEDY = "give another model, or create this one again"


class TrainingRead(NamedTuple):
    """A split of a corpus that a task was trained on."""

    task: str
    corpus: str
    split: str


@dataclass(frozen=True)
class ModelSource:
    """Location of a trained model, and its training configuration as far as it is known.

    Args:
        name: as the user gave it.
        weights: folder that ``skillnet.systems.load_model`` reads.
        bundle: folder with tokenizer and labels beside the weights, or None.
        run: the run's folder, or None.
        run_id: MLflow's identifier of its MLflow run, or None.
        version: in the registry, or None.
        settings: the resolved configuration of its training, as plain values; {} if unknown.
        steps: training steps done, or None.
        untrained: task -> why its weights are random; such a model is not registered.
    """

    name: str
    weights: Path
    bundle: Path | None = None
    run: Path | None = None
    run_id: str | None = None
    version: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    untrained: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 over the hashes of all weight files; it changes with any weight."""
        from skillnet_platform.config import digest_config

        files = read_manifest(self.weights)["files"]
        # Optimizer state does not change the model's outputs.
        weights = {n: e["sha256"] for n, e in files.items() if not n.startswith("optimizer-")}
        return digest_config(weights)

    def digest_task(self, model: "TaskModel", task: str) -> str:
        """Return the SHA-256 of all that decides the outputs of a task: its weights and settings.

        Args:
            model: the loaded model.
            task: one of its tasks.
        """
        from skillnet_platform.config import digest_config

        listed = read_manifest(self.weights)["files"]
        names = [f"{start}{file}.safetensors" for file in model.files_of(task) for start in FORMS]
        settings = config_to_dict(model.config)
        plan = settings.pop("tasks")[task]
        # Other skills and tasks have no part in it.
        for key in ("skills", "reference_tasks"):
            settings.pop(key)
        about = [model.system, model.options, settings, plan, model.vocabulary.tokenizer]
        return digest_config([*about, {n: listed[n]["sha256"] for n in names if n in listed}])

    @property
    def seed(self) -> int:
        """Seed of the training, 0 if unknown."""
        return int(self.settings.get("seed", 0))

    @property
    def corpora(self) -> dict[str, str]:
        """Task -> corpus, as in training."""
        tasks = self.settings.get("tasks") or {}
        return {name: task["corpus"] for name, task in tasks.items() if task}

    def find_corpora(self, given: str | None) -> Location:
        """Return the place of prepared corpora: as given, as in the run, or the usual one.

        Args:
            given: option ``data`` of a command; None if it is not given.
        """
        trained = self.settings.get("data") if self.run is not None else None
        if given or not isinstance(trained, str):
            return parse_location(given, data_root())
        found = parse_location(trained, data_root())
        # A folder of a run may have been copied from another machine.
        return found if isinstance(found, str) or found.is_dir() else data_root()

    @property
    def fold(self) -> FoldConfig:
        """Fold of the corpora that the training read."""
        return build_config(FoldConfig, self.settings.get("fold") or {})

    def with_corpora(self, corpora: Mapping[str, str]) -> "ModelSource":
        """Return the source with other corpora of some tasks than in training.

        Args:
            corpora: task -> corpus.

        Raises:
            UserError: the model has no such task.
        """
        if not corpora:
            return self
        model, *_ = read_config(self.weights, read_manifest(self.weights))
        check_known_names(corpora, model.tasks, "--corpora", "task")
        tasks = self.settings.get("tasks") or {}
        overrides = {
            task: {**(tasks.get(task) or {}), "corpus": name} for task, name in corpora.items()
        }
        return replace(self, settings={**self.settings, "tasks": {**tasks, **overrides}})

    def require_own_splits(self, action: str) -> None:
        """Raise UserError if the training read a fold in place of the splits of its corpora.

        Args:
            action: that would read training rows of the fold as test rows.
        """
        if self.fold.count:
            raise UserError(
                f"{self.name}: was trained on fold {self.fold.number} of {self.fold.count}. "
                f"{action} reads the splits of the corpora, which hold rows of that training. "
                "Give a model that was trained without fold.count"
            )

    @property
    def limits(self) -> dict[str, int | None]:
        """Task -> longest sequence, as in training."""
        tasks = self.settings.get("tasks") or {}
        return {name: task.get("max_length") for name, task in tasks.items() if task}

    @property
    def metrics(self) -> dict[str, str | None]:
        """Task -> metric that ranks its models; None for the primary one."""
        tasks = self.settings.get("tasks") or {}
        return {name: task.get("metric") for name, task in tasks.items() if task}

    @property
    def auxiliary(self) -> set[str]:
        """Auxiliary tasks, which are not evaluated."""
        tasks = self.settings.get("tasks") or {}
        return {name for name, task in tasks.items() if task and task.get("auxiliary")}

    def trained_tasks(self, tasks: Iterable[str]) -> list[str]:
        """Return those of the model's tasks that its run trained or evaluated.

        The heads of other tasks are untrained. Without a known run all tasks are returned.
        """
        known = self.corpora if "training" in self.settings else None
        return [name for name in tasks if known is None or name in known]


def resolve_model(
    address: str, uri: str | None = None, *, check_digest: bool = True
) -> ModelSource:
    """Resolve a model from a path, a run or a registry URI; see the examples in this module.

    Args:
        address: a path, a run's name or id, a URI, or a registry URI.
        uri: MLflow tracking URI; None takes the default.
        check_digest: reject files of a registered model that differ from the registered digest.

    Raises:
        UserError: there is no such model, or it is incomplete or altered.
    """
    if address.startswith(("models:/", "runs:/")):
        return _registered(address, uri, check_digest)
    if is_uri(address):
        from pipelines.training.runs.mirror import download_model

        return _resolve_folder(download_model(address), address)
    path = Path(address).expanduser()
    if path.is_dir():
        return _resolve_folder(path.absolute(), address)
    if (run_root() / address).is_dir():
        return _resolve_folder(run_root() / address, address)
    # MLflow run ids are 32 hexadecimal digits; a run's name is tried first.
    if len(address) == 32 and address.isalnum():
        return _by_id(address, uri)
    raise UserError(
        f"{address}: no folder and no run in {run_root()} has this name, and it is no registry "
        f"address such as {DEFAULT_MODEL}"
    )


def read_training_settings(source: ModelSource) -> dict[str, Any]:
    """Return the configuration of a model's training; {} if unknown.

    Args:
        source: a run, a bundle, or a copy of weights with the settings of their training.
    """
    copied = source.weights / SETTINGS
    settings = source.settings or (read_json(copied) if copied.is_file() else {})
    return settings if isinstance(settings, dict) else {}


def list_training_reads(
    settings: Mapping[str, Any], known: Iterable[str] = ()
) -> list[TrainingRead]:
    """Return what a model was trained on, and what the local models it started from were.

    Args:
        settings: configuration of its training; {} if unknown.
        known: addresses of models that are not followed again.
    """
    tasks = settings.get("tasks") or {}
    reads = [
        TrainingRead(name, task["corpus"], task.get("split", "train"))
        for name, task in tasks.items()
        if task and not task.get("eval_only")
    ]
    start, known = settings.get("init_from"), set(known)
    # A model of a registry or hub is not downloaded for this.
    if isinstance(start, str) and start not in known:
        folder = next((each for each in (Path(start), run_root() / start) if each.is_dir()), None)
        if folder is not None:
            with contextlib.suppress(UserError):
                parent = _resolve_folder(folder.absolute(), start)
                reads += list_training_reads(read_training_settings(parent), known | {start})
    return reads


def load_source_model(source: ModelSource, unread: Collection[str] = ()) -> "TaskModel":
    """Load a model in evaluation mode, on the GPU if there is one.

    A checkpoint of a run that keeps averaged weights is loaded with those, and without the heads
    of auxiliary tasks.

    Args:
        source: resolved model.
        unread: files, without suffix, that are mapped on the host: neither hashed nor read. They
            have no averages.

    Raises:
        ValueError: files are missing or corrupt.
    """
    # torch loads here, so that a wrong name of a model is reported without it.
    import torch

    from skillnet import systems
    from skillnet.model_merging import remove_task
    from skillnet.precision import best_device

    manifest = read_manifest(source.weights)
    model = systems.load_model(source.weights, unread=unread)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for file in model.files_of():
            name = f"average-{file}.safetensors"
            if name not in manifest["files"]:
                continue
            path = check_file(source.weights, name, manifest)
            for key, value in load_tensors(path).items():
                if key not in parameters or parameters[key].shape != value.shape:
                    raise UserError(f"{path}: {key} is not the average of a weight of this model")
                parameters[key].copy_(value)
    # A checkpoint still has the heads of auxiliary tasks; a final model does not.
    for name in source.auxiliary & set(model.config.tasks):
        remove_task(model, name)
    model.place_weights(best_device(), None, model.unread)
    return model


def load_trained_tasks(source: ModelSource) -> "TaskModel":
    """Load a model without the heads of tasks that its run did not train.

    Callers of this function need the corpora of all remaining tasks.
    """
    from skillnet.model_merging import remove_task

    model = load_source_model(source)
    tasks = list(model.config.tasks)
    for name in set(tasks) - set(source.trained_tasks(tasks)):
        remove_task(model, name)
    return model


def is_known_run(run_id: str, uri: str | None) -> bool:
    """Return False if the tracker answers that it has no such run, as for a copied folder."""
    from mlflow.exceptions import MlflowException

    from skillnet_platform.tracking import backend

    try:
        backend.create_client(backend.resolve_uri(uri)).get_run(run_id)
    except MlflowException as error:
        return bool(error.error_code != "RESOURCE_DOES_NOT_EXIST")
    return True


def _registered(address: str, uri: str | None, check_digest: bool) -> ModelSource:
    from skillnet_platform.tracking import registry

    version = registry.resolve_registered(address, uri, check_digest=check_digest)
    bundle = version.path / "artifacts" / BUNDLE
    if not bundle.is_dir():
        raise UserError(f"{address} is not a SkillNet model: it has no artifact {BUNDLE!r}")
    source = _bundle(bundle, address)
    return replace(source, run_id=version.run_id or source.run_id, version=version.version)


def _bundle(folder: Path, address: str) -> ModelSource:
    about = read_bundle_manifest(folder)
    return ModelSource(
        name=address,
        weights=folder,
        bundle=folder,
        run_id=about["run_id"],
        settings=_check_settings(about["settings"], folder / MANIFEST),
        steps=about["steps"],
    )


def _check_settings(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return settings of a file; raise UserError if they lack the keys of a ``ModelSource``."""
    tasks = settings.get("tasks") or {}
    is_valid = isinstance(tasks, dict) and all(
        not task or (isinstance(task, dict) and isinstance(task.get("corpus"), str))
        for task in tasks.values()
    )
    if not is_valid or not isinstance(settings.get("seed", 0), int):
        raise UserError(
            f"{path} is damaged: the seed is no number, or a task has no corpus; {REMEDY}"
        )
    return settings


def _resolve_folder(path: Path, address: str) -> ModelSource:
    if is_bundle(path):
        return _bundle(path, address)
    if (path / "artifacts" / BUNDLE).is_dir():
        return _bundle(path / "artifacts" / BUNDLE, address)
    if (path / MANIFEST).is_file() and (path / "config.json").is_file():
        run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        return _with_run(path, run if (run / "config.yaml").is_file() else None, address)
    if (path / "model" / MANIFEST).is_file():
        return _with_run(path / "model", path, address)
    if (path / "checkpoints").is_dir():
        from pipelines.training.runs import checkpoints

        newest = checkpoints.find_newest(path / "checkpoints")
        if newest is not None:
            return _with_run(newest.path, path, address)
    raise UserError(
        f"{path} holds no complete model: expected a checkpoint or saved model (manifest.json and "
        "config.json), or a run's folder with one"
    )


def _with_run(weights: Path, run: Path | None, address: str) -> ModelSource:
    settings: dict[str, Any] = {}
    if run is not None and (run / "config.yaml").is_file():
        settings = _check_settings(load_yaml(run / "config.yaml"), run / "config.yaml")
    run_id = tracking.read_run_id(run / "run.json") if run is not None else None
    # A checkpoint has its own record; a final model has that of its run.
    folders = [weights, *([run] if run else [])]
    records = [weights / "state.json", *(folder / TRAINED for folder in folders)]
    record = next((path for path in records if path.is_file()), None)
    source = ModelSource(address, weights, None, run, run_id, None, settings)
    if record is None:
        return source
    about = read_record(record, {"step": int}, REMEDY)
    try:
        counts = parse_task_counts(about.get("tasks", {}))
    except ValueError as error:
        raise UserError(f"{record}: {error}; {REMEDY}") from None
    return replace(source, steps=about["step"], untrained=find_untrained_tasks(counts))


def _by_id(run_id: str, uri: str | None) -> ModelSource:
    from mlflow.exceptions import MlflowException

    from skillnet_platform.tracking import backend

    server = backend.resolve_uri(uri)
    try:
        run = backend.create_client(server).get_run(run_id)
    except MlflowException:
        raise UserError(f"{run_id}: no run with this id in {server}") from None
    folder = run.data.tags.get("run_dir", "")
    if not folder or not Path(folder).is_dir():
        raise UserError(
            f"run {run_id} ({run.info.run_name}): its folder {folder or '(not recorded)'} is not "
            "on this machine; give the folder of a checkpoint"
        )
    return _resolve_folder(Path(folder), run_id)
