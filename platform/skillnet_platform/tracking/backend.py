"""MLflow backend: its URI, its first setup, and its health.

The URI is always explicit: MLflow's default is relative to the working directory, which in a Ray
worker is a private database. One process sets up an empty backend, since several would race.
"""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillnet_platform import storage
from skillnet_platform.errors import UserError, first_line

URI_VARIABLE = "MLFLOW_TRACKING_URI"

#: Environment of MLflow unless the user has set it. MLflow retries a dead server for minutes.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Its queue is lost when the process dies; our spool keeps records on disk.
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # its import sets the level again
    "GIT_PYTHON_REFRESH": "quiet",
}

#: Without it MLflow's pages open on traces of language models.
TRAINING_VIEW = "workflowType=machine_learning"

#: Tags by which MLflow's pages show training runs first, with a description.
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": (
        "Runs of SkillNet Platform. Metrics are grouped by task (`text_to_image/loss`); a run's "
        "page has its description, its corpora as datasets (digests of their manifests), its "
        "resolved configuration as parameters and as `config.yaml`, and its plots as artifacts."
    ),
}


@dataclass(frozen=True)
class TrackingBackend:
    """Backend that is ready, with its experiment.

    Args:
        uri: of the backend.
        experiment_id: of the experiment.
    """

    uri: str
    experiment_id: str


def prepare_mlflow_environment() -> None:
    """Set MLflow's environment unless the user has set it, and limit its loggers to warnings."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def resolve_uri(uri: str | None = None) -> str:
    """Return the tracker's URI: ``uri``, MLFLOW_TRACKING_URI, or sqlite in the run root.

    Raises:
        UserError: a file store, which MLflow no longer supports.
    """
    chosen = uri or os.environ.get(URI_VARIABLE) or f"sqlite:///{storage.run_root() / 'mlflow.db'}"
    if chosen.startswith("sqlite:///"):
        # A relative path would name another database in each worker's directory.
        return f"sqlite:///{Path(chosen.removeprefix('sqlite:///')).absolute()}"
    if "://" not in chosen or chosen.startswith("file:"):
        raise UserError(
            f"tracking.uri {chosen!r}: MLflow no longer keeps runs in plain files; use "
            "sqlite:///PATH/mlflow.db or the http:// address of an MLflow server"
        )
    return chosen.rstrip("/")


def artifact_root() -> Path:
    """Return the folder of artifacts of the default backend: ``<run root>/mlartifacts``."""
    return storage.run_root() / "mlartifacts"


def create_client(uri: str) -> Any:
    """Return an ``MlflowClient`` for tracking and registry."""
    prepare_mlflow_environment()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def setup_backend(uri: str | None = None, experiment: str = "skillnet") -> TrackingBackend:
    """Create the backend and the experiment if needed. The driver calls it before workers start.

    Args:
        uri: of the backend; see :func:`resolve_uri`.
        experiment: name of the experiment.

    Raises:
        UserError: no server answers at the URI, or the experiment was deleted.
    """
    chosen = resolve_uri(uri)
    prepare_mlflow_environment()
    # MLflow's client would retry a dead server before it reports it.
    if chosen.startswith("http"):
        require_answer(chosen)
    from mlflow.entities import LifecycleStage
    from mlflow.exceptions import MlflowException

    with _one_at_a_time(chosen):
        mlflow_client = create_client(chosen)
        try:
            found = mlflow_client.get_experiment_by_name(experiment)
            if found is None:
                # MLflow fixes the folder of artifacts when the experiment is created.
                location = artifact_root().as_uri() if chosen.startswith("sqlite") else None
                identity = mlflow_client.create_experiment(experiment, location, EXPERIMENT_TAGS)
                return TrackingBackend(chosen, identity)
        except MlflowException as error:
            # The file lock does not reach other machines, and one of them may be faster.
            found = _created_meanwhile(mlflow_client, experiment, error, chosen)
    if found.lifecycle_stage == LifecycleStage.DELETED:
        raise UserError(
            f"the experiment {experiment!r} was deleted in {chosen}; restore it there, or give "
            "another name with --tracking.experiment"
        )
    return TrackingBackend(chosen, found.experiment_id)


def _created_meanwhile(mlflow_client: Any, experiment: str, error: Exception, uri: str) -> Any:
    """Return the experiment that another machine created in the meantime."""
    code = getattr(error, "error_code", "")
    if code == "RESOURCE_ALREADY_EXISTS":
        return mlflow_client.get_experiment_by_name(experiment)
    if code == "UNAUTHENTICATED":
        raise UserError(
            f"tracking.uri {uri}: the server asks for a password; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        ) from None
    raise UserError(f"tracking.uri {uri}: {first_line(error)}") from error


def require_answer(uri: str) -> None:
    """Check that an MLflow server answers.

    Raises:
        UserError: no answer.
    """
    import requests

    try:
        answer = requests.get(f"{uri}/health", timeout=5)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise UserError(
            f"tracking.uri {uri}: no MLflow server answers there ({first_line(error)}). Start "
            f"it, or unset {URI_VARIABLE} to use a sqlite file in {storage.run_root()}"
        ) from None


def require_access(uri: str) -> None:
    """Check that a tracker accepts the user and password of the environment.

    Raises:
        UserError: the tracker requires a password, refuses the password, or fails.
    """
    if not uri.startswith("http"):
        return
    prepare_mlflow_environment()
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import read_mlflow_creds

    try:
        create_client(uri).search_experiments(max_results=1)
    except MlflowException as error:
        if error.error_code not in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise UserError(f"tracking.uri {uri}: {first_line(error)}") from None
        user = read_mlflow_creds().username
        raise UserError(
            f"tracking.uri {uri}: the server refuses the user {user} with this password"
            if user
            else f"tracking.uri {uri}: the server asks for a password, and none is set"
        ) from None


@contextlib.contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Allow one process of this machine at a time to migrate a sqlite database."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        # Processes that migrate one empty database at the same time crash.
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
