"""Model registry of MLflow: register versions, promote them by alias, and find their files.

A model is a Python file that calls ``mlflow.models.set_model``, with artifacts (safetensors, JSON)
that it reads in ``load_context(self, context)``. Nothing is pickled. The alias ``champion`` marks
the best version, ``challenger`` the latest version that was not promoted.

MLflow calls the uploaded files a logged model. A registration tags it with its key, so that the
same command finds it again after a kill, and with the digest of all its files.
"""

import contextlib
import os
import re
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillnet_platform.config import digest_config
from skillnet_platform.config.safe_yaml import load_plain_yaml
from skillnet_platform.errors import UserError, suggest_name
from skillnet_platform.package_version import find_version
from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.storage import run_root, sha256_file, staging_directory
from skillnet_platform.storage.local import environment_variables
from skillnet_platform.storage.locks import this_process
from skillnet_platform.tracking import backend, champion, version_reader
from skillnet_platform.tracking.backend import is_sqlite

#: Tag of a registration: equal for every attempt of one command.
KEY_TAG = "skillnet.registration"
#: Tag with the digest of all files of a registered model.
DIGEST_TAG = "files_sha256"
#: Files that MLflow and Python write into a local artifact store after the registration.
_WRITTEN_LATER = ("registered_model_meta", "__pycache__")


def digest_files(folder: Path) -> str:
    """Return the SHA-256 over the names and hashes of all files of a model."""
    return digest_config(_hash_files(folder))


def read_model_file(folder: Path) -> Any:
    """Return MLflow's ``Model`` of a folder with an MLmodel file.

    MLflow's own ``Model.load`` reads a path as a URI, and decodes a %, ? or # in it.

    Args:
        folder: directory of a downloaded model.

    Raises:
        ValueError: the file is damaged.
        OSError: the folder has no such file.
    """
    from mlflow.models import Model

    return Model.from_dict(load_plain_yaml((folder / "MLmodel").read_text(encoding="utf-8")))


def upload_model(
    mlflow: Any,
    run_id: str,
    key: str,
    code_path: str | os.PathLike[str],
    artifacts: Mapping[str, str | os.PathLike[str]],
    **options: Any,
) -> tuple[str, str]:
    """Upload a model once, read it back, and compare it with the local files.

    A complete upload of an earlier attempt is used again; an incomplete one is deleted.

    Args:
        mlflow: module, with the tracker as its default.
        run_id: the run that trained the model.
        key: digest of weights, run, corpora and name.
        code_path: the Python file of the model.
        artifacts: name -> file or directory.
        **options: further arguments of ``mlflow.models.Model.log``.

    Returns:
        MLflow's identifier of the logged model, and the SHA-256 of all its files.

    Raises:
        UserError: an uploaded file differs from the local file.
    """
    client = mlflow.MlflowClient()
    experiment_id = client.get_run(run_id).info.experiment_id
    for earlier in _find_logged_models(client, experiment_id, key):
        with contextlib.suppress(UserError, OSError, mlflow.exceptions.MlflowException):
            if earlier.status == "READY":
                digest = _verify_upload(mlflow, earlier.model_id, code_path, artifacts)
                return earlier.model_id, digest
        _delete_upload(client, earlier, with_files=earlier.status != "READY")
    try:
        # pyfunc.log_model would open the run again and end it as FINISHED.
        info = mlflow.models.Model.log(
            artifact_path=None,
            flavor=mlflow.pyfunc,
            run_id=run_id,
            python_model=str(code_path),
            # MLflow reads a plain path as a URI: a %, ? or # in it would lead elsewhere.
            artifacts={name: Path(path).absolute().as_uri() for name, path in artifacts.items()},
            tags={KEY_TAG: key},
            **options,
        )
        digest = _verify_upload(mlflow, info.model_id, code_path, artifacts)
        client.set_logged_model_tags(info.model_id, {DIGEST_TAG: digest})
        return info.model_id, digest
    except BaseException:
        # MLflow leaves the logged model behind. After a kill the next attempt deletes it.
        with contextlib.suppress(Exception):
            for unfinished in _find_logged_models(client, experiment_id, key):
                _delete_upload(client, unfinished, with_files=True)
        raise


def _find_logged_models(client: Any, experiment_id: str, key: str) -> list[Any]:
    query = f"tags.`{KEY_TAG}` = '{key}'"
    return list(client.search_logged_models([experiment_id], filter_string=query))


def _delete_upload(client: Any, model: Any, with_files: bool) -> None:
    """Delete a logged model, and its files, which MLflow keeps.

    Args:
        client: ``MlflowClient``.
        model: logged model.
        with_files: False for a complete upload, which a version may use.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    # The location comes from the tracker, so it must be a folder that MLflow makes for the model.
    is_own = re.fullmatch(r"m-[0-9a-f]{32}", model.model_id) is not None
    is_own = is_own and model.artifact_location.endswith(f"/models/{model.model_id}/artifacts")
    if with_files and is_own:
        # Before the record: after a kill the next attempt finds the record again.
        with contextlib.suppress(Exception):
            get_artifact_repository(model.artifact_location).delete_artifacts()
    client.delete_logged_model(model.model_id)


def _verify_upload(
    mlflow: Any,
    model_id: str,
    code_path: str | os.PathLike[str],
    artifacts: Mapping[str, str | os.PathLike[str]],
) -> str:
    """Compare an uploaded model with the local files, and return the digest of its files."""
    uri = f"models:/{model_id}"
    with tempfile.TemporaryDirectory(prefix="skillnet-") as place:
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=place))
        flavor = read_model_file(folder).flavors["python_function"]
        names = {name: entry["path"] for name, entry in flavor["artifacts"].items()}
        _require_equal_files(uri, Path(code_path), folder / flavor["model_code_path"])
        for name, local in artifacts.items():
            _require_equal_files(uri, Path(local), folder / names[name])
        return digest_files(folder)


def _require_equal_files(uri: str, local: Path, downloaded: Path) -> None:
    expected, found = _hash_files(local), _hash_files(downloaded)
    for file in sorted(expected.keys() | found.keys()):
        if expected.get(file) != found.get(file):
            raise UserError(
                f"{uri}: {local / file} arrived altered or incomplete. Run the same command again"
            )


def _hash_files(path: Path) -> dict[str, str]:
    """Return name -> SHA-256 of the files of a folder; "" -> SHA-256 for a single file."""
    if path.is_file():
        return {"": sha256_file(path)}
    return {str(file.relative_to(path)): sha256_file(file) for file in _walk_files(path)}


def _walk_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and parts[0] not in _WRITTEN_LATER and "__pycache__" not in parts:
            yield path


REQUIREMENTS = ("mlflow", "torch", "numpy", "safetensors", "tokenizers", "pyarrow", "pillow")


@dataclass(frozen=True)
class RegisteredVersion:
    """Version of a registered model.

    Args:
        name: registered model, as MLflow lists it.
        version: counted from 1.
        uri: ``models:/name/version``.
        run_id: MLflow's identifier of the run that trained it.
        alias: that it got: champion or challenger.
        verdict: what the gate said.
    """

    name: str
    version: int
    uri: str
    run_id: str
    alias: str
    verdict: champion.PromotionDecision


@dataclass(frozen=True)
class ResolvedModel:
    """Files of a model, and its entry in the registry (``None`` for a plain folder)."""

    uri: str
    path: Path
    version: int | None = None
    run_id: str | None = None


def register_version(
    run_id: str,
    code_path: str | os.PathLike[str],
    artifacts: Mapping[str, str | os.PathLike[str]],
    figures: Mapping[str, champion.MetricEstimate],
    *,
    uri: str | None = None,
    name: str = champion.MODEL_NAME,
    signature: Any = None,
    metadata: Mapping[str, Any] | None = None,
    requirements: Sequence[str] | None = None,
    description: str = "",
    tags: Mapping[str, Any] | None = None,
    key: str | None = None,
) -> RegisteredVersion:
    """Log a model in a run, register it as a version, and set its alias by the promotion rule.

    The first version becomes champion. A later version becomes champion if the rule allows, else
    challenger. Processes that register versions of one model take turns. A call with the key of
    an earlier call that was killed completes that registration; one with the key of a complete
    registration returns its version.

    Args:
        run_id: the run that trained it.
        code_path: the Python file of the model (ends with ``mlflow.models.set_model``).
        artifacts: name -> file or directory, copied into the model.
        figures: task -> estimate; stored in the tags of the version for the next comparison.
        uri: address of the tracker; see :func:`skillnet_platform.tracking.backend.resolve_uri`.
        name: registered model, as MLflow lists it.
        signature: an ``mlflow.models.ModelSignature``.
        metadata: stored in the model's MLmodel file.
        requirements: pip requirements; by default the installed versions of the needed packages.
        description: markdown for the page of the version.
        tags: more tags of the version.
        key: identifies the registration; by default each call is another one.

    Raises:
        OtherSystemError: the model has versions of another system.
        UserError: a code file or an artifact is missing, or an upload differs from it.
    """
    for what in [code_path, *artifacts.values()]:
        if not Path(what).exists():
            raise UserError(f"{what}: no such file. Registration needs it")
    chosen = backend.resolve_uri(uri)
    client = backend.create_client(chosen)
    key = key or uuid.uuid4().hex
    with champion.registration_turn(chosen, name):
        found = find_registration(key, name=name, uri=chosen)
        if found is None:
            champion.check_system(client, name, (tags or {}).get(champion.SYSTEM_TAG))
            experiment_id = client.get_run(run_id).info.experiment_id
            with _as_default(chosen, experiment_id) as mlflow:
                model_id, digest = upload_model(
                    mlflow,
                    run_id,
                    key,
                    code_path,
                    artifacts,
                    # The registered model may have any name; the list of runs shows this one.
                    name=str((tags or {}).get(champion.SYSTEM_TAG) or name),
                    signature=signature,
                    input_example=None,
                    metadata=dict(metadata or {}),
                    pip_requirements=list(requirements or installed_requirements(REQUIREMENTS)),
                )
                _ensure_model(client, name)
                # All tags at once: a version without them could not be found after a kill.
                own = {
                    champion.FIGURES_TAG: champion.pack_estimates(figures),
                    KEY_TAG: key,
                    DIGEST_TAG: digest,
                    champion.STATE_TAG: champion.PENDING,
                    backend.PROCESS_TAG: this_process(),
                }
                found = client.create_model_version(
                    name,
                    f"models:/{model_id}",
                    run_id=run_id,
                    model_id=model_id,
                    tags={tag: str(value) for tag, value in {**(tags or {}), **own}.items()},
                    description=description or None,
                )
        return _settle_version(client, name, found)


def find_registration(key: str, *, name: str = champion.MODEL_NAME, uri: str | None = None) -> Any:
    """Return the version of a registration as an MLflow ModelVersion, or ``None``.

    Args:
        key: see :func:`register_version`.
        name: registered model, as MLflow lists it.
        uri: address of the tracker, such as ``http://host:5000``.
    """
    client = backend.create_client(backend.resolve_uri(uri))
    versions = client.search_model_versions(f"name = '{name}'")
    return next((each for each in versions if each.tags.get(KEY_TAG) == key), None)


def complete_registration(
    version: Any, *, name: str = champion.MODEL_NAME, uri: str | None = None
) -> RegisteredVersion:
    """Decide about the promotion of a version unless that is done; return the version.

    Args:
        version: from :func:`find_registration`.
        name: registered model, as MLflow lists it.
        uri: address of the tracker, such as ``http://host:5000``.
    """
    chosen = backend.resolve_uri(uri)
    with champion.registration_turn(chosen, name):
        return _settle_version(backend.create_client(chosen), name, version)


def _settle_version(client: Any, name: str, version: Any) -> RegisteredVersion:
    number = int(version.version)
    if champion.is_done(version):
        current = champion.champion_of(client, name)
        is_champion = current is not None and int(current.version) == number
        verdict = champion.PromotionDecision(is_champion, champion.recorded_reasons(version))
    else:
        verdict = champion.promote_in_turn(client, name, number)
    alias = champion.CHAMPION if verdict.passed else champion.CHALLENGER
    return RegisteredVersion(
        name, number, f"models:/{name}/{number}", version.run_id, alias, verdict
    )


def resolve_registered(
    model: str, uri: str | None = None, *, check_digest: bool = True
) -> ResolvedModel:
    """Return the files of a model in a folder, the registry or a run.

    Files of a registered model are compared with the digest that the tracker recorded, because
    the artifact store may belong to others.

    Args:
        model: a folder, ``models:/skillnet@champion``, ``models:/skillnet/3``, ``models:/m-…`` or
            ``runs:/RUN_ID/path``.
        uri: address of the tracker, such as ``http://host:5000``.
        check_digest: reject files that differ from the registered digest.

    Raises:
        UserError: the model does not exist, which lists the existing models; or its files were
            altered, or it was not registered by this program.
    """
    if not model.startswith(("models:/", "runs:/")):
        if Path(model).is_dir():
            return ResolvedModel(model, Path(model).absolute())
        raise UserError(
            f"{model}: no such directory. Give a checkpoint's directory or a registered model "
            f"such as models:/{champion.MODEL_NAME}@{champion.CHAMPION}"
        )
    chosen = backend.resolve_uri(uri)
    found: Any = version_reader.read_version(chosen, model)
    path = found.folder if found is not None else None
    if path is None and found is not None and check_digest:
        path = _find_downloaded(found.tags)
    tags = found.tags if found is not None else {}
    if path is None:
        client = backend.create_client(chosen)
        from mlflow.exceptions import MlflowException

        try:
            found = found or _version_of(client, model)
            path = _download_files(model, chosen, found)
        except (MlflowException, OSError) as error:
            raise UserError(f"{model}: not found in {chosen}{_what_there_is(client, model)}") from (
                error
            )
        tags = found.tags if found is not None else _logged_tags(client, model, path)
    if check_digest:
        _check_digest(tags, model, path)
    version, run_id = (int(found.version), found.run_id) if found is not None else (None, None)
    return ResolvedModel(model, path, version, run_id)


def _find_downloaded(tags: Mapping[str, str]) -> Path | None:
    """Return the folder of an earlier download of a version; None if it is missing or damaged."""
    recorded = tags.get(DIGEST_TAG)
    folder = _download_folder(recorded)
    if folder is None or not folder.is_dir() or digest_files(folder) != recorded:
        return None
    return folder


def _download_folder(digest: str | None) -> Path | None:
    # The digest comes from a server, and becomes a part of a path.
    if digest is None or re.fullmatch("[0-9a-f]{64}", digest) is None:
        return None
    return run_root() / "cache" / "registered" / digest


def _download_files(model: str, uri: SecretUri, found: Any) -> Path:
    """Return the folder of a model's files, which are downloaded unless they are on a local disk.

    MLflow downloads into a new temporary folder each time. A version of a server is therefore
    kept below the run root, by its digest.
    """
    digest = found.tags.get(DIGEST_TAG) if found is not None else None
    target = None if is_sqlite(uri) else _download_folder(digest)
    with _as_default(uri) as mlflow:
        if target is None:
            return Path(mlflow.artifacts.download_artifacts(artifact_uri=model))
        with staging_directory(target) as part:
            mlflow.artifacts.download_artifacts(artifact_uri=model, dst_path=str(part))
            _check_digest(found.tags, model, part)
    return target


def _check_digest(tags: Mapping[str, str], model: str, path: Path) -> None:
    """Compare the files of a model with the tag of its version or logged model."""
    recorded = tags.get(DIGEST_TAG)
    if recorded is None:
        raise UserError(
            f"{model}: the registry has no digest of its files (tag {DIGEST_TAG}). "
            "Register the model again: skillnet register"
        )
    digest = digest_files(path)
    if digest != recorded:
        raise UserError(
            f"{model}: a file in {path} was altered after its registration (digest {digest[:12]}, "
            f"registered {recorded[:12]}). Restore the files, or register the model again"
        )


def _logged_tags(client: Any, model: str, path: Path) -> Mapping[str, str]:
    from mlflow.exceptions import MlflowException

    run_id = model.removeprefix("runs:/").split("/")[0] if model.startswith("runs:/") else None
    try:
        # The files of a run name their logged model, which must be of that run.
        logged = client.get_logged_model(
            read_model_file(path).model_id if run_id else model.removeprefix("models:/")
        )
    except (MlflowException, ValueError, OSError):
        return {}
    tags: Mapping[str, str] = logged.tags
    return tags if run_id in (None, logged.source_run_id) else {}


def installed_requirements(names: Sequence[str]) -> list[str]:
    """Return ``name==version`` of installed packages, for a model's requirements."""
    versions = {name: find_version(name) for name in names}
    # A local part such as +cpu depends on the machine that trained.
    return [f"{name}=={found.partition('+')[0]}" for name, found in versions.items() if found]


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
            f"models:/{name}@{champion.CHAMPION}"
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


@contextlib.contextmanager
def _as_default(uri: str, experiment_id: str | None = None) -> Iterator[Any]:
    """Set MLflow's process-wide settings for a block: its functions take no URI."""
    backend.prepare_mlflow_environment()
    import mlflow

    complete = SecretUri(uri).reveal()
    # MLflow's setters change the first two.
    values = {backend.URI_VARIABLE: complete, "MLFLOW_REGISTRY_URI": complete}
    if experiment_id is not None:
        values["MLFLOW_EXPERIMENT_ID"] = experiment_id
    with environment_variables(values):
        mlflow.set_tracking_uri(complete)
        mlflow.set_registry_uri(complete)
        try:
            with _without_advice():
                yield mlflow
        finally:
            mlflow.set_tracking_uri("")
            mlflow.set_registry_uri("")


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
