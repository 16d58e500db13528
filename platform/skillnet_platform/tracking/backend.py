"""Which MLflow store is used, and how it is first set up.

Always an explicit URI: MLflow's own default is a path relative to the working directory, which
in a Ray worker is a private database. One process sets an empty store up; several at once race.
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

#: Set where the user has not. MLflow retries a dead server for minutes by default.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # its import sets the level anew
    "GIT_PYTHON_REFRESH": "quiet",
}

#: MLflow's pages open on traces of language models otherwise.
TRAINING_VIEW = "workflowType=machine_learning"

#: So that MLflow's pages show training runs first, and say what they show.
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
    """A store that is ready, and the experiment in it."""

    uri: str
    experiment_id: str


def prepare_mlflow_environment() -> None:
    """Set MLflow's environment where the user has not, and keep its loggers to warnings."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def resolve_uri(uri: str | None = None) -> str:
    """The tracker's URI: the one given, else MLFLOW_TRACKING_URI, else sqlite in the run root.

    Raises:
        UserError: a file store, which MLflow no longer has.
    """
    chosen = uri or os.environ.get(URI_VARIABLE) or f"sqlite:///{storage.run_root() / 'mlflow.db'}"
    if chosen.startswith("sqlite:///"):
        return f"sqlite:///{Path(chosen.removeprefix('sqlite:///')).absolute()}"
    if "://" not in chosen or chosen.startswith("file:"):
        raise UserError(
            f"tracking.uri {chosen!r}: MLflow no longer keeps runs in plain files; use "
            "sqlite:///PATH/mlflow.db or the http:// address of an MLflow server"
        )
    return chosen.rstrip("/")


def artifact_root() -> Path:
    """Where artifacts of the default store are kept: ``<run root>/mlartifacts``."""
    return storage.run_root() / "mlartifacts"


def create_client(uri: str) -> Any:
    """An ``MlflowClient`` of that store, for tracking and registry alike."""
    prepare_mlflow_environment()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def setup_backend(uri: str | None = None, experiment: str = "skillnet") -> TrackingBackend:
    """Make sure that the store and the experiment exist. The driver calls it, before workers.

    Raises:
        UserError: nothing answers at the URI, or the experiment was deleted there.
    """
    chosen = resolve_uri(uri)
    prepare_mlflow_environment()
    if chosen.startswith("http"):
        require_answer(chosen)
    from mlflow.entities import LifecycleStage
    from mlflow.exceptions import MlflowException

    with _one_at_a_time(chosen):
        mlflow_client = create_client(chosen)
        try:
            found = mlflow_client.get_experiment_by_name(experiment)
            if found is None:
                location = artifact_root().as_uri() if chosen.startswith("sqlite") else None
                identity = mlflow_client.create_experiment(experiment, location, EXPERIMENT_TAGS)
                return TrackingBackend(chosen, identity)
        except MlflowException as problem:
            found = _made_meanwhile(mlflow_client, experiment, problem, chosen)
    if found.lifecycle_stage == LifecycleStage.DELETED:
        raise UserError(
            f"the experiment {experiment!r} was deleted in {chosen}; restore it there, or give "
            "another name with --tracking.experiment"
        )
    return TrackingBackend(chosen, found.experiment_id)


def _made_meanwhile(mlflow_client: Any, experiment: str, problem: Exception, uri: str) -> Any:
    """The experiment, if another machine made it between our look and our try."""
    code = getattr(problem, "error_code", "")
    if code == "RESOURCE_ALREADY_EXISTS":
        return mlflow_client.get_experiment_by_name(experiment)
    if code == "UNAUTHENTICATED":
        raise UserError(
            f"tracking.uri {uri}: the server asks for a password; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        ) from None
    raise UserError(f"tracking.uri {uri}: {first_line(problem)}") from problem


def require_answer(uri: str) -> None:
    """Ask an MLflow server for its health.

    Raises:
        UserError: nothing answers.
    """
    import requests

    try:
        answer = requests.get(f"{uri}/health", timeout=5)
        answer.raise_for_status()
    except requests.RequestException as problem:
        raise UserError(
            f"tracking.uri {uri}: no MLflow server answers there ({first_line(problem)}). Start "
            f"it, or unset {URI_VARIABLE} to use a sqlite file in {storage.run_root()}"
        ) from None


def require_access(uri: str) -> None:
    """Ask a tracker for something that it shows to those alone whom it lets in.

    Raises:
        UserError: it asks for a password, or refuses the one that was given; or another error.
    """
    if not uri.startswith("http"):
        return
    prepare_mlflow_environment()
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import read_mlflow_creds

    try:
        create_client(uri).search_experiments(max_results=1)
    except MlflowException as problem:
        if problem.error_code not in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise UserError(f"tracking.uri {uri}: {first_line(problem)}") from None
        user = read_mlflow_creds().username
        raise UserError(
            f"tracking.uri {uri}: the server refuses the user {user} with that password"
            if user
            else f"tracking.uri {uri}: the server asks for a password, and none is set"
        ) from None


@contextlib.contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Let one process of this machine at a time migrate a sqlite store."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
