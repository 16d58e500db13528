"""Folder of artifacts beside a sqlite database, as a plug-in of MLflow.

MLflow stores absolute locations of artifacts, which are wrong in a run root that was moved, copied
or mounted elsewhere. Experiments of a sqlite database therefore have the location
``database-folder:/mlartifacts``. MLflow finds :class:`DatabaseFolderArtifacts` for it by the entry
point ``mlflow.artifact_repository``.
"""

import os
from pathlib import Path, PurePosixPath

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from skillnet_platform.storage import run_root
from skillnet_platform.tracking.backend import (
    ARTIFACT_SCHEME,
    STORE_VARIABLE,
    is_sqlite,
    sqlite_path,
    sqlite_uri,
)


class DatabaseFolderArtifacts(LocalArtifactRepository):  # type: ignore[misc]
    """Artifacts in a folder beside the sqlite database of the tracker.

    Args:
        artifact_uri: such as ``database-folder:/mlartifacts/RUN/artifacts``.
        tracking_uri: location of the database; by default that of MLflow.
        registry_uri: location of the registry.

    Raises:
        MlflowException: the database is on another machine, or the location leads out of its
            folder.
    """

    def __init__(
        self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
    ) -> None:
        path = PurePosixPath(artifact_uri.removeprefix(f"{ARTIFACT_SCHEME}:").lstrip("/"))
        if ".." in path.parts:
            raise MlflowException.invalid_parameter_value(
                f"{artifact_uri}: leads out of the folder of its database"
            )
        folder = find_database_folder(artifact_uri, tracking_uri) / path
        super().__init__(folder.as_uri(), tracking_uri, registry_uri)


def find_database_folder(artifact_uri: str, tracking_uri: str | None) -> Path:
    """Return the folder of the tracker's sqlite database.

    Args:
        artifact_uri: for the message.
        tracking_uri: location of the database; by default that of MLflow, that of this process'
            server, or the database of the run root.

    Raises:
        MlflowException: none of them is a file of this machine.
    """
    own = sqlite_uri(run_root() / "mlflow.db")
    for uri in (tracking_uri or mlflow.get_tracking_uri(), os.environ.get(STORE_VARIABLE), own):
        if uri and is_sqlite(uri) and sqlite_path(uri).is_file():
            return sqlite_path(uri).parent
    # Not INTERNAL_ERROR: records would wait for a tracker that works again.
    raise MlflowException.invalid_parameter_value(
        f"{artifact_uri}: lies beside the sqlite database of another machine. Record to another "
        "experiment of its server with --tracking.experiment"
    )
