"""Model registry of MLflow: register versions, promote them by alias, and load them.

A model is a Python file that calls ``mlflow.models.set_model``, with artifacts (safetensors, JSON)
that it reads in ``load_context(self, context)``. Nothing is pickled. The alias ``champion`` marks
the best version, ``challenger`` the latest version that was not promoted.
"""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from skillnet_platform.errors import UserError, suggest_name
from skillnet_platform.tracking import backend, promotion

MODEL_NAME = "skillnet"
CHAMPION = "champion"
CHALLENGER = "challenger"
FIGURES_TAG = "figures"
REQUIREMENTS = ("mlflow", "torch", "numpy", "safetensors", "tokenizers", "pyarrow", "pillow")


@dataclass(frozen=True)
class RegisteredVersion:
    """Version of a registered model.

    Args:
        name: of the registered model.
        version: counted from 1.
        uri: ``models:/name/version``.
        run_id: of the run that trained it.
        alias: that it got: champion or challenger.
        verdict: what the gate said.
    """

    name: str
    version: int
    uri: str
    run_id: str
    alias: str
    verdict: promotion.PromotionDecision


@dataclass(frozen=True)
class ResolvedModel:
    """Files of a model, and its entry in the registry (``None`` for a plain folder)."""

    uri: str
    path: Path
    version: int | None = None
    run_id: str | None = None
    metadata: Mapping[str, Any] | None = None


def register_version(
    run_id: str,
    code_path: str | os.PathLike[str],
    artifacts: Mapping[str, str | os.PathLike[str]],
    figures: Mapping[str, promotion.MetricEstimate],
    *,
    uri: str | None = None,
    name: str = MODEL_NAME,
    signature: Any = None,
    input_example: Any = None,
    metadata: Mapping[str, Any] | None = None,
    requirements: Sequence[str] | None = None,
    code_paths: Sequence[str] | None = None,
    description: str = "",
    tags: Mapping[str, Any] | None = None,
) -> RegisteredVersion:
    """Log a model in a run, register it as a version, and set its alias by the promotion rule.

    The first version becomes champion. A later version becomes champion if the rule allows, else
    challenger.

    Args:
        run_id: the run that trained it.
        code_path: the Python file of the model (ends with ``mlflow.models.set_model``).
        artifacts: name -> file or directory, copied into the model.
        figures: task -> estimate; stored in the tags of the version for the next comparison.
        uri: of the tracker; see :func:`skillnet_platform.tracking.backend.resolve_uri`.
        name: of the registered model.
        signature: an ``mlflow.models.ModelSignature``.
        input_example: example input of ``predict``.
        metadata: stored in the model's MLmodel file.
        requirements: pip requirements; by default the installed versions of the needed packages.
        code_paths: packages shipped inside the model; by default none.
        description: markdown for the page of the version.
        tags: more tags of the version.

    Raises:
        UserError: a code file or an artifact is missing.
    """
    for what in [code_path, *artifacts.values()]:
        if not Path(what).exists():
            raise UserError(f"{what}: no such file. Registration needs it")
    chosen = backend.resolve_uri(uri)
    client = backend.create_client(chosen)
    experiment_id = client.get_run(run_id).info.experiment_id
    with _as_default(chosen, experiment_id) as mlflow:
        # pyfunc.log_model would open the run again and end it as FINISHED.
        info = mlflow.models.Model.log(
            artifact_path=None,
            name=name,
            flavor=mlflow.pyfunc,
            run_id=run_id,
            python_model=str(code_path),
            artifacts={key: str(value) for key, value in artifacts.items()},
            signature=signature,
            input_example=input_example,
            metadata=dict(metadata or {}),
            pip_requirements=list(requirements or installed_requirements(REQUIREMENTS)),
            code_paths=list(code_paths) if code_paths else None,
        )
        _ensure_model(client, name)
        made = client.create_model_version(
            name,
            info.model_uri,
            run_id=run_id,
            model_id=info.model_id,
            tags={key: str(value) for key, value in (tags or {}).items()},
            description=description or None,
        )
    number = int(made.version)
    client.set_model_version_tag(name, made.version, FIGURES_TAG, _pack(figures))
    verdict = promote_version(number, name=name, uri=chosen)
    alias = CHAMPION if verdict.passed else CHALLENGER
    return RegisteredVersion(name, number, f"models:/{name}/{number}", run_id, alias, verdict)


def promote_version(
    number: int, *, name: str = MODEL_NAME, uri: str | None = None, force: bool = False
) -> promotion.PromotionDecision:
    """Compare a version with the champion and set its alias.

    Args:
        number: the version.
        name: of the registered model.
        uri: the tracker.
        force: make it champion regardless of the estimates; the decision records this.
    """
    client = backend.create_client(backend.resolve_uri(uri))
    current = find_champion(name=name, uri=uri)
    if current is None:
        verdict = promotion.PromotionDecision(True, ("the first version",))
    elif int(current.version) == number:
        verdict = promotion.PromotionDecision(True, ("already the champion",))
    else:
        ours = _unpack(client.get_model_version(name, str(number)))
        verdict = promotion.decide_promotion(ours, _unpack(current))
    if force and not verdict.passed:
        verdict = promotion.PromotionDecision(True, (*verdict.reasons, "promoted by hand"))
    client.set_model_version_tag(name, str(number), "gate", str(verdict)[:5000])
    client.set_registered_model_alias(name, CHAMPION if verdict.passed else CHALLENGER, str(number))
    if verdict.passed:
        # One version must not carry both aliases.
        _drop_alias(client, name, CHALLENGER, number)
    return verdict


def find_champion(*, name: str = MODEL_NAME, uri: str | None = None) -> Any:
    """Return the champion as an MLflow ModelVersion, or ``None``."""
    from mlflow.exceptions import MlflowException

    try:
        client = backend.create_client(backend.resolve_uri(uri))
        # A search for versions returns no aliases.
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        # MLflow reports a missing alias of an existing model by the second code.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def resolve_registered(model: str, uri: str | None = None) -> ResolvedModel:
    """Return the files of a model in a folder, the registry or a run.

    Args:
        model: a folder, ``models:/skillnet@champion``, ``models:/skillnet/3``, ``models:/m-…`` or
            ``runs:/RUN_ID/path``.
        uri: of the tracker.

    Raises:
        UserError: the model does not exist; lists the existing models.
    """
    if not model.startswith(("models:/", "runs:/")):
        if Path(model).is_dir():
            return ResolvedModel(model, Path(model).absolute())
        raise UserError(
            f"{model}: no such directory. Give a checkpoint's directory or a registered model "
            f"such as models:/{MODEL_NAME}@{CHAMPION}"
        )
    chosen = backend.resolve_uri(uri)
    client = backend.create_client(chosen)
    from mlflow.exceptions import MlflowException

    try:
        found = _version_of(client, model)
        with _as_default(chosen) as mlflow:
            path = Path(mlflow.artifacts.download_artifacts(artifact_uri=model))
    except (MlflowException, OSError) as error:
        raise UserError(f"{model}: not found in {chosen}{_what_there_is(client, model)}") from (
            error
        )
    metadata = mlflow.models.Model.load(str(path)).metadata if (path / "MLmodel").exists() else {}
    return ResolvedModel(
        model,
        path,
        int(found.version) if found else None,
        found.run_id if found else None,
        metadata,
    )


def load_registered(model: str, uri: str | None = None) -> Any:
    """Load the pyfunc model of a URI, or of a folder with an MLmodel file.

    Args:
        model: see :func:`resolve_registered`.
        uri: of the tracker.

    Raises:
        UserError: the model does not exist.
    """
    resolved = resolve_registered(model, uri)
    with _as_default(backend.resolve_uri(uri)) as mlflow:
        return mlflow.pyfunc.load_model(str(resolved.path))


def installed_requirements(names: Sequence[str]) -> list[str]:
    """Return ``name==version`` of installed packages, for a model's requirements."""
    found = []
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            # A local part such as +cpu depends on the machine that trained.
            found.append(f"{name}=={version(name).partition('+')[0]}")
    return found


def _ensure_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        # Another process may create the model at the same time.
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _version_of(client: Any, model: str) -> Any:
    rest = model.removeprefix("models:/")
    if model.startswith("runs:/") or rest.startswith("m-"):
        return None
    if "@" in rest:
        return client.get_model_version_by_alias(*rest.split("@", 1))
    name, _, number = rest.partition("/")
    if not number.isdigit():
        raise UserError(
            f"{model}: give a version or an alias, such as models:/{name}/1 or "
            f"models:/{name}@{CHAMPION}"
        )
    return client.get_model_version(name, number)


def _what_there_is(client: Any, model: str) -> str:
    """Return the existing models or versions, for the end of an error."""
    if model.startswith("runs:/"):
        return ""
    name = model.removeprefix("models:/").split("@")[0].split("/")[0]
    models = {each.name: each for each in client.search_registered_models()}
    if not models:
        return "; the registry is empty (`skillnet register` adds a model)"
    if name not in models:
        return f": no model {name!r}{suggest_name(name, models)}"
    aliases = ", ".join(f"@{alias} ({v})" for alias, v in sorted(models[name].aliases.items()))
    versions = [int(each.version) for each in client.search_model_versions(f"name = '{name}'")]
    return f"; {name} has versions {sorted(versions)} and aliases {aliases or 'none'}"


def _drop_alias(client: Any, name: str, alias: str, number: int) -> None:
    aliases = client.get_registered_model(name).aliases
    if str(aliases.get(alias, "")) == str(number):
        client.delete_registered_model_alias(name, alias)


def _pack(figures: Mapping[str, promotion.MetricEstimate]) -> str:
    return json.dumps(promotion.estimates_to_json(figures), separators=(",", ":"))


def _unpack(found: Any) -> dict[str, promotion.MetricEstimate]:
    return promotion.estimates_from_json(json.loads(found.tags.get(FIGURES_TAG, "{}")))


@contextlib.contextmanager
def _as_default(uri: str, experiment_id: str | None = None) -> Iterator[Any]:
    """Set MLflow's process-wide settings for a block: its functions take no URI."""
    backend.prepare_mlflow_environment()
    names = (backend.URI_VARIABLE, "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_ID")
    before = {name: os.environ.get(name) for name in names}
    os.environ[backend.URI_VARIABLE] = uri
    if experiment_id is not None:
        os.environ["MLFLOW_EXPERIMENT_ID"] = experiment_id
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        with _without_advice():
            yield mlflow
    finally:
        mlflow.set_tracking_uri("")
        mlflow.set_registry_uri("")
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Hide MLflow's advice to authors of model files: type hints, integer columns.

    MLflow inserts its own warning filter before ours, so this filters the output instead.
    """
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_others(message: Any, category: Any, filename: str, *more: Any) -> None:
            if f"{os.sep}mlflow{os.sep}" not in filename:
                show(message, category, filename, *more)

        warnings.showwarning = show_others  # type: ignore[assignment]
        yield
