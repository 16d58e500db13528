"""MLflow backend: its URI, its first setup, and its health.

The URI is always explicit: MLflow's default is relative to the working directory, which in a Ray
worker is a private database. One process sets up an empty backend, since several would race.
"""

import contextlib
import json
import logging
import os
import re
import sqlite3
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from skillnet_platform import storage
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.storage.local import environment_variables, prepare_user_environment
from skillnet_platform.storage.locks import hold_lock

_PLAIN = "sqlite:///"
#: Names the driver. MLflow makes the folder of a ``sqlite:///`` database from the encoded path,
#: and would leave an empty folder with a wrong name.
_WITH_DRIVER = "sqlite+pysqlite:///"
#: URI of an absolute path that SQLAlchemy does not change. Its import is slow.
_UNCHANGED = re.compile(r"sqlite:///(?P<path>/[A-Za-z0-9_./-]+)")


def is_sqlite(uri: str) -> bool:
    """Return whether a URI names a sqlite database."""
    return uri.partition(":")[0].partition("+")[0] == "sqlite"


def sqlite_uri(path: Path) -> str:
    """Return the URI of a database file; characters that SQLAlchemy decodes are encoded."""
    complete = str(path.absolute())
    plain = f"{_PLAIN}{complete}"
    if _UNCHANGED.fullmatch(plain):
        return plain
    from sqlalchemy.engine import URL

    encoded = URL.create("sqlite", database=complete).render_as_string(hide_password=False)
    return plain if encoded == plain else encoded.replace(_PLAIN, _WITH_DRIVER, 1)


def sqlite_path(uri: str) -> Path:
    """Return the absolute path of the database file of a sqlite URI.

    Raises:
        UserError: the URI names no file, or has options.
    """
    if unchanged := _UNCHANGED.fullmatch(uri):
        return Path(unchanged["path"])
    from sqlalchemy.engine import make_url

    found = make_url(uri)
    if "?" in uri:
        raise UserError(
            f"{uri}: a ? starts options of the database, and none are supported. Write %3F for a ? "
            "in the path, and %25 for a %"
        )
    if not found.database or found.database == ":memory:" or found.host:
        raise UserError(f"{uri}: names no file. Write sqlite:///PATH/mlflow.db")
    return Path(found.database).absolute()


URI_VARIABLE = "MLFLOW_TRACKING_URI"
#: Names the database of a server; in a command line, others could read its password.
STORE_VARIABLE = "MLFLOW_BACKEND_STORE_URI"
#: Scheme of artifacts beside a sqlite database, see :mod:`.artifact_folder`.
ARTIFACT_SCHEME = "database-folder"
USER_VARIABLE = "MLFLOW_TRACKING_USERNAME"
PASSWORD_VARIABLE = "MLFLOW_TRACKING_PASSWORD"  # noqa: S105 - a variable's name

#: Environment of MLflow unless the user has set it. MLflow retries a dead server for minutes.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Its queue is lost when the process dies; our spool keeps records on disk.
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow prints the URI of a run with the password in it; `Tracker.link` has none.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # its import sets the level again
    "GIT_PYTHON_REFRESH": "quiet",
}

_OTHER_DATABASE = (
    "Move it away to start with an empty database, or name another one with tracking.uri"
)

#: Without it MLflow's pages open on traces of language models.
TRAINING_VIEW = "workflowType=machine_learning"

#: Experiments of runs that are not compared with those of ``TrackingConfig.experiment``.
PRETRAINING_EXPERIMENT = "skillnet-pretraining"
SWEEP_EXPERIMENT = "skillnet-sweeps"
STUDY_EXPERIMENT = "skillnet-studies"

#: Tag of a run and of a version: the process that writes it.
PROCESS_TAG = "skillnet.process"
#: Tags and metric of each run that the list of runs shows, see ``RUN_LIST_VIEW``.
SYSTEM_TAG, TASKS_TAG, SCORE_METRIC = "system", "tasks", "score"

#: Name of the shared view of an experiment. MLflow's pages keep a shared view in a tag.
RUN_LIST_KEY = "skillnet"
#: Columns of the list of runs. MLflow puts its own columns first, and the source and datasets would
#: fill the page.
RUN_LIST_VIEW = {
    "selectedColumns": [
        f"tags.`{SYSTEM_TAG}`",
        f"tags.`{TASKS_TAG}`",
        f"metrics.`{SCORE_METRIC}`",
        "attributes.`Models`",
    ]
}
RUN_LIST_TAG = f"mlflow.sharedViewState.{RUN_LIST_KEY}"

#: Tags by which MLflow's pages show training runs first, with a description.
EXPERIMENT_TAGS = {
    RUN_LIST_TAG: json.dumps(RUN_LIST_VIEW),
    # The axis of the chart that compares runs; without it MLflow takes the first metric.
    "mlflow.experiment.primaryMetric.name": SCORE_METRIC,
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
        uri: address of the backend.
        experiment_id: MLflow's identifier of the experiment.
    """

    uri: SecretUri
    experiment_id: str


def prepare_mlflow_environment() -> None:
    """Set MLflow's environment unless the user has set it, and limit its loggers to warnings."""
    prepare_user_environment()
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    # It prints the traceback of an error that it raises too, such as that of a full disk.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def resolve_uri(uri: str | None = None) -> SecretUri:
    """Return the tracker's URI: ``uri``, MLFLOW_TRACKING_URI, or sqlite in the run root.

    A URI that was written without its password gets it from the environment.

    Raises:
        UserError: a file store, which MLflow no longer supports, a password that is missing, or an
            address of a server with a query.
    """
    given = uri or os.environ.get(URI_VARIABLE) or sqlite_uri(storage.run_root() / "mlflow.db")
    chosen = _restore_secret(SecretUri(given))
    if is_sqlite(chosen):
        # A relative path would name another database in each worker's directory.
        return SecretUri(sqlite_uri(sqlite_path(chosen.reveal())))
    if "://" not in chosen or chosen.startswith("file:"):
        raise UserError(
            f"tracking.uri {chosen!r}: MLflow no longer keeps runs in plain files; use "
            "sqlite:///PATH/mlflow.db or the http:// address of an MLflow server"
        )
    if chosen.startswith("http") and {"?", "#"} & set(chosen):
        # MLflow would append the path of a request to it, and show it in its errors.
        raise UserError(
            f"tracking.uri {chosen}: the address of a server has no part after ? or #. Remove it, "
            "and set MLFLOW_TRACKING_TOKEN to a token"
        )
    return SecretUri(chosen.reveal().rstrip("/"))


def _restore_secret(uri: SecretUri) -> SecretUri:
    """Return a URI with its password, which files do not keep, from the environment.

    Raises:
        UserError: the environment lacks it.
    """
    if not uri.is_redacted:
        return uri
    known = SecretUri(os.environ.get(URI_VARIABLE, ""))
    if known.has_secret and known.rstrip("/") == uri.rstrip("/"):
        return known
    user, password = (os.environ.get(name, "") for name in (USER_VARIABLE, PASSWORD_VARIABLE))
    if password and (user or not uri.lacks_user):
        return uri.with_secret(password, user)
    names = f"{USER_VARIABLE} and {PASSWORD_VARIABLE}" if uri.lacks_user else PASSWORD_VARIABLE
    raise UserError(
        f"tracking.uri {uri}: files keep no password, and this process has none for it. Set "
        f"{URI_VARIABLE} to the complete URI, or {names}, or give --tracking.uri again"
    )


def share_secret(uri: SecretUri) -> contextlib.AbstractContextManager[None]:
    """Give a tracker's password to processes that start during a block, by the environment.

    Files of a run name its tracker without the password. Only this user can read the environment
    of a process; command lines and Ray's records are visible to others.
    """
    return environment_variables({URI_VARIABLE: uri.reveal()} if uri.has_secret else {})


def run_list_link(server: str, experiment_id: str) -> str:
    """Return the URL of an experiment's list of runs with system, tasks and score.

    Args:
        server: address of the MLflow server.
        experiment_id: MLflow's identifier of the experiment.
    """
    view = f"viewStateShareKey={RUN_LIST_KEY}&{TRAINING_VIEW}"
    return f"{server}/#/experiments/{experiment_id}/runs?{view}"


def artifact_root() -> Path:
    """Return the folder of artifacts of the default backend: ``<run root>/mlartifacts``."""
    return storage.run_root() / "mlartifacts"


def _artifact_location() -> str:
    """Return the location of artifacts of a sqlite database, relative to it if possible."""
    # A job on a cluster has our code without the metadata by which MLflow finds the plug-in.
    has_plugin = bool(entry_points(group="mlflow.artifact_repository", name=ARTIFACT_SCHEME))
    return f"{ARTIFACT_SCHEME}:/{artifact_root().name}" if has_plugin else artifact_root().as_uri()


def create_client(uri: str) -> Any:
    """Return an ``MlflowClient`` for tracking and registry.

    Raises:
        UserError: the URI names a sqlite file that cannot be used.
    """
    prepare_mlflow_environment()
    from mlflow import MlflowClient

    if is_sqlite(uri):
        require_database(sqlite_path(uri))
    complete = _restore_secret(SecretUri(uri)).reveal()
    return MlflowClient(tracking_uri=complete, registry_uri=complete)


def require_database(path: Path) -> None:
    """Check that a file is a sqlite database, or that it can be created.

    MLflow retries a database that it cannot open for minutes, and its error names no path.

    Raises:
        UserError: it is another file, is damaged, or cannot be opened or created.
    """
    if not path.exists():
        folder = next(each for each in path.parents if each.exists())
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"{path}: the database cannot be created, because {folder} is not writable. "
                f"Set {storage.HOME_VARIABLE} or tracking.uri to a writable directory."
            )
        return
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: no permission to read this database. {_OTHER_DATABASE}.")
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=0)) as database:
            database.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        # Another process may migrate it; MLflow waits for that.
        if "locked" not in str(error):
            raise UserError(f"{path}: {error}. {_OTHER_DATABASE}.") from None


def setup_backend(uri: str | None = None, experiment: str = "skillnet") -> TrackingBackend:
    """Create the backend and the experiment if needed. The driver calls it before workers start.

    Args:
        uri: address of the backend; see :func:`resolve_uri`.
        experiment: name of the experiment.

    Raises:
        UserError: no server answers at the URI, the database is read-only, or the experiment was
            deleted.
    """
    chosen = resolve_uri(uri)
    prepare_mlflow_environment()
    # MLflow's client would retry a dead server before it reports it.
    if chosen.startswith("http"):
        require_answer(chosen)
    path = sqlite_path(chosen) if is_sqlite(chosen) else None
    if path is not None and path.exists() and not os.access(path, os.W_OK):
        raise UserError(
            f"{path}: the database is read-only. Make it writable, or name another one with "
            "tracking.uri"
        )
    from mlflow.entities import LifecycleStage
    from mlflow.exceptions import MlflowException

    with _one_at_a_time(chosen):
        mlflow_client = create_client(chosen)
        try:
            found = mlflow_client.get_experiment_by_name(experiment)
            if found is None:
                # MLflow fixes the folder of artifacts when the experiment is created.
                location = _artifact_location() if is_sqlite(chosen) else None
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
    for tag, value in EXPERIMENT_TAGS.items():
        # An experiment that another program or version created; a description of the user stays.
        if tag not in found.tags or (tag == RUN_LIST_TAG and found.tags[tag] != value):
            mlflow_client.set_experiment_tag(found.experiment_id, tag, value)
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
        answer = requests.get(f"{SecretUri(uri).reveal()}/health", timeout=5)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise UserError(
            f"tracking.uri {uri}: no MLflow server answers there ({first_line(error)}). Start "
            f"it, or unset {URI_VARIABLE} to use a sqlite file in {storage.run_root()}"
        ) from None


def _one_at_a_time(uri: str) -> contextlib.AbstractContextManager[None]:
    """Allow one process of this machine at a time to migrate a sqlite database."""
    if not is_sqlite(uri):
        return contextlib.nullcontext()
    path = sqlite_path(uri)

    def describe(holder: str) -> str:
        return f"{path}: waiting for {holder}, which sets up this database"

    # Processes that migrate one empty database at the same time crash.
    return hold_lock(path.with_suffix(".lock"), describe, wait=True)
