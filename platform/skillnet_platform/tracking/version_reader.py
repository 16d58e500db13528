"""Version of a registered model, read without MLflow.

MLflow's import takes longer than a prediction. :func:`read_version` therefore asks a sqlite
database or an MLflow server itself. It returns None where MLflow may answer otherwise: for tables
of another revision, special access, workspaces, and versions that do not exist. Its caller
:mod:`.registry` then asks MLflow, whose errors it explains.
"""

import base64
import contextlib
import os
import re
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.tracking import backend
from skillnet_platform.tracking.backend import is_sqlite, sqlite_path

#: Revision of MLflow's tables whose columns :func:`_read_row` knows.
KNOWN_REVISION = "dc11669786a5"
TOKEN_VARIABLE = "MLFLOW_TRACKING_TOKEN"  # noqa: S105 - a variable's name
#: Access of a request that :func:`_ask_server` knows; the others name certificates and plug-ins.
PLAIN_VARIABLES = {
    backend.URI_VARIABLE,
    backend.USER_VARIABLE,
    backend.PASSWORD_VARIABLE,
    TOKEN_VARIABLE,
}
WORKSPACE_VARIABLES = ("MLFLOW_WORKSPACE", "MLFLOW_ENABLE_WORKSPACES")
#: MLflow gives the alias ``latest`` a meaning of its own, and ``models:/m-…`` is a logged model.
_ADDRESS = re.compile(
    r"models:/(?!m-)(?P<name>[^/@%?#]+)(@(?!latest$)(?P<alias>[^/@%?#]+)|/(?P<version>[0-9]+))",
    re.IGNORECASE,
)

_FIND_VERSION = """
SELECT version, run_id, COALESCE(storage_location, source) FROM model_versions
WHERE workspace = 'default' AND name = :name AND current_stage <> 'Deleted_Internal'
AND status = 'READY' AND version = COALESCE(:version, (SELECT version FROM
registered_model_aliases WHERE workspace = 'default' AND name = :name AND alias = :alias))
"""
_FIND_TAGS = """
SELECT key, value FROM model_version_tags
WHERE workspace = 'default' AND name = :name AND version = :version
"""


@dataclass(frozen=True)
class VersionRecord:
    """Entry of a version in the registry.

    Args:
        version: counted from 1.
        run_id: MLflow's identifier of the run that trained it.
        tags: name -> value.
        folder: its files on this machine; None if they must be downloaded.
    """

    version: int
    run_id: str | None
    tags: Mapping[str, str]
    folder: Path | None


def read_version(uri: SecretUri, model: str) -> VersionRecord | None:
    """Return the entry of a version, or None if MLflow has to answer.

    Args:
        uri: address of the tracker, see :func:`skillnet_platform.tracking.backend.resolve_uri`.
        model: such as ``models:/skillnet@champion`` or ``models:/skillnet/3``.
    """
    asked = _ADDRESS.fullmatch(model)
    if asked is None or any(map(os.environ.get, WORKSPACE_VARIABLES)):
        return None
    # MLflow explains an unexpected answer.
    with contextlib.suppress(sqlite3.Error, KeyError, TypeError, ValueError, OSError):
        if is_sqlite(uri):
            return _read_row(sqlite_path(uri.reveal()), asked.groupdict())
        if uri.startswith(("http://", "https://")) and not _has_special_access():
            return _ask_server(uri, asked.groupdict())
    return None


def _has_special_access() -> bool:
    """Return whether MLflow's requests have other credentials than a password or a token."""
    names = {name for name in os.environ if name.startswith("MLFLOW_TRACKING_")}
    return bool(
        names - PLAIN_VARIABLES
        or Path("~/.mlflow/credentials").expanduser().exists()
        or entry_points(group="mlflow.request_header_provider")
    )


def _read_row(path: Path, asked: Mapping[str, str | None]) -> VersionRecord | None:
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        # One transaction: another process may migrate the tables or move the alias meanwhile.
        database.execute("BEGIN")
        revisions = database.execute("SELECT version_num FROM alembic_version").fetchall()
        if revisions != [(KNOWN_REVISION,)]:
            return None
        found = database.execute(_FIND_VERSION, asked).fetchone()
        if found is None:
            return None
        version, run_id, location = found
        tags = dict(database.execute(_FIND_TAGS, {**asked, "version": version}).fetchall())
    folder = _find_folder(location, path.parent)
    # Files in an object store are downloaded by MLflow.
    return VersionRecord(version, run_id, tags, folder) if folder is not None else None


def _find_folder(location: str, beside: Path) -> Path | None:
    """Return the folder of a location of artifacts, None if it is not on this machine.

    Args:
        location: such as ``database-folder:/mlartifacts/…`` or ``file:///…``.
        beside: folder of the database.
    """
    scheme, _, rest = location.partition(":")
    if scheme == backend.ARTIFACT_SCHEME:
        path = PurePosixPath(rest.lstrip("/"))
        folder = None if ".." in path.parts else beside / path
    else:
        parts = urlsplit(location)
        is_plain = scheme == "file" and not (parts.netloc or parts.query or parts.fragment)
        folder = Path(url2pathname(parts.path)) if is_plain else None
    return folder if folder is not None and folder.is_dir() else None


def _ask_server(uri: SecretUri, asked: Mapping[str, str | None]) -> VersionRecord | None:
    import requests

    backend.prepare_mlflow_environment()
    user, password, token = map(
        os.environ.get, (backend.USER_VARIABLE, backend.PASSWORD_VARIABLE, TOKEN_VARIABLE)
    )
    headers = {}
    # As in MLflow: a header, so that requests prefers a password in the address.
    if user and password:
        joined = base64.b64encode(f"{user}:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {joined}"
    elif token:
        headers["Authorization"] = f"Bearer {token}"
    page = "model-versions/get" if asked["alias"] is None else "registered-models/alias"
    answer = requests.get(
        f"{uri.reveal()}/api/2.0/mlflow/{page}",
        params={key: value for key, value in asked.items() if value is not None},
        headers=headers,
        timeout=float(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]),
        allow_redirects=False,
    )
    if answer.status_code != requests.codes.ok:
        return None
    found: dict[str, Any] = answer.json()["model_version"]
    if found["status"] != "READY":
        return None
    tags = {tag["key"]: tag["value"] for tag in found.get("tags", [])}
    return VersionRecord(int(found["version"]), found.get("run_id"), tags, None)
