"""Upload of a model's files to the tracker, verified by reading them back.

MLflow calls the uploaded files a logged model. A registration tags it with its key, so that the
same command finds it again after a kill, and with the digest of all its files.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillnet_platform.config import digest_config
from skillnet_platform.config.safe_yaml import load_plain_yaml
from skillnet_platform.errors import UserError
from skillnet_platform.storage import sha256_file

#: Tag of a registration: equal for every attempt of one command.
KEY_TAG = "skillnet.registration"
#: Tag with the digest of all files of a registered model.
DIGEST_TAG = "files_sha256"
#: Files that MLflow and Python write into a local artifact store after the registration.
_WRITTEN_LATER = ("registered_model_meta", "__pycache__")


@dataclass(frozen=True)
class UploadedModel:
    """Uploaded files of a model.

    Args:
        model_id: MLflow's identifier of the logged model.
        uri: ``models:/m-…``.
        digest: SHA-256 of all files, see :func:`digest_files`.
    """

    model_id: str
    uri: str
    digest: str


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
) -> UploadedModel:
    """Upload a model once, read it back, and compare it with the local files.

    A complete upload of an earlier attempt is used again; an incomplete one is deleted.

    Args:
        mlflow: module, with the tracker as its default.
        run_id: the run that trained the model.
        key: digest of weights, run, corpora and name.
        code_path: the Python file of the model.
        artifacts: name -> file or directory.
        **options: further arguments of ``mlflow.models.Model.log``.

    Raises:
        UserError: an uploaded file differs from the local file.
    """
    client = mlflow.MlflowClient()
    experiment_id = client.get_run(run_id).info.experiment_id
    for earlier in _find_logged_models(client, experiment_id, key):
        with contextlib.suppress(UserError, OSError, mlflow.exceptions.MlflowException):
            if earlier.status == "READY":
                return _verify_upload(mlflow, earlier.model_id, code_path, artifacts)
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
        uploaded = _verify_upload(mlflow, info.model_id, code_path, artifacts)
        client.set_logged_model_tags(uploaded.model_id, {DIGEST_TAG: uploaded.digest})
        return uploaded
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
) -> UploadedModel:
    uri = f"models:/{model_id}"
    with tempfile.TemporaryDirectory(prefix="skillnet-") as place:
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=place))
        flavor = read_model_file(folder).flavors["python_function"]
        names = {name: entry["path"] for name, entry in flavor["artifacts"].items()}
        _require_equal_files(uri, Path(code_path), folder / flavor["model_code_path"])
        for name, local in artifacts.items():
            _require_equal_files(uri, Path(local), folder / names[name])
        return UploadedModel(model_id, uri, digest_files(folder))


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
