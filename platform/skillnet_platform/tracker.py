"""``skillnet tracker``: an MLflow server for several machines, on PostgreSQL, behind a password.

A thin shell around ``mlflow server``. What it adds: the schemas are made before the server's
workers start, which race on an empty database; it listens on loopback, and elsewhere only with
MLflow's own authentication, whose first password it makes itself and keeps in a file of mode 600.
"""

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from skillnet_platform import console, signals, storage, ui
from skillnet_platform.cli import command
from skillnet_platform.cluster import loopback
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.tracking import backend
from skillnet_platform.tracking import server as tracking_server

ADMIN = "admin"
AUTH_CONFIG = "auth.ini"
PASSWORD = "admin-password"  # noqa: S105 - a file's name
SECRET = "session-key"  # noqa: S105 - a file's name
AUTHORIZATION = "mlflow.server.auth:authenticate_request_basic_auth"


@dataclass
class TrackerConfig:
    """Options of ``skillnet tracker``.

    Args:
        store: the database: ``postgresql://USER@HOST/DATABASE``, or sqlite for one machine; by
            default MLFLOW_BACKEND_STORE_URI, else the sqlite file of the run root. A password
            belongs into ``~/.pgpass`` or PGPASSWORD: others see command lines.
        artifacts: where the server keeps artifacts: a folder, or a URI such as
            ``s3://BUCKET/PATH``; by default in the run root.
        host: which interface to listen on; any but loopback needs ``auth``.
        port: where to listen.
        auth: ask for a user and a password.
        workers: processes that answer.
        allowed_hosts: names by which clients call this host, beyond localhost and private
            addresses (MLflow's guard against DNS rebinding).
    """

    store: str | None = None
    artifacts: str | None = None
    host: str = "127.0.0.1"
    port: int = 5000
    auth: bool = False
    workers: int = 2
    allowed_hosts: list[str] = field(default_factory=list)


@command(
    TrackerConfig,
    description="Run an MLflow server that several machines record to. Clients name it by "
    "MLFLOW_TRACKING_URI, and with --auth by MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD.",
    example="skillnet tracker --store postgresql://mlflow@/mlflow\n"
    "skillnet tracker --store postgresql://mlflow@db/mlflow --artifacts s3://runs/mlflow "
    "--host 10.0.0.5 --auth true",
)
def main(config: TrackerConfig) -> int:
    """Serve until interrupted."""
    require_safe(config.host, config.auth)
    ui.require_free(config.host, config.port)
    uri = resolve_store(config.store or os.environ.get(tracking_server.STORE_VARIABLE))
    if config.store and _without_password(config.store) != config.store:
        console.warn(
            "--store with a password: other users of this machine see command lines; keep it in "
            f"~/.pgpass, or give the URI as {tracking_server.STORE_VARIABLE}"
        )
    prepare(uri)
    words: list[str] = []
    secret: dict[str, str] = {}
    if config.auth:
        secret = prepare_auth(uri, auth_folder())
        words += ["--app-name", "basic-auth"]
        console.note(f"user {ADMIN}, password in {auth_folder() / PASSWORD}")
    if config.allowed_hosts:
        words += ["--allowed-hosts", ",".join(config.allowed_hosts)]
    program = tracking_server.server_command(
        config.host, config.port, config.artifacts, config.workers
    )
    with tracking_server.running_server(
        [*program, *words], tracking_server.server_environment(uri) | secret
    ) as server:
        try:
            with signals.terminate_as_interrupt():
                return server.wait()
        except KeyboardInterrupt:
            return 0


def require_safe(host: str, auth: bool) -> None:
    """Refuse to listen beyond this machine without a password.

    Raises:
        UserError: ``host`` is not loopback, and there is no authentication.
    """
    if not loopback.is_loopback_host(host) and not auth:
        raise UserError(
            f"--host {host} lets others read and change every run: give --auth true as well, or "
            "keep to 127.0.0.1 and reach it through ssh -L"
        )


def resolve_store(given: str | None) -> str:
    """The database's URI.

    Raises:
        UserError: it is no database, or its driver is not installed.
    """
    uri = backend.resolve_uri(given) if given is None or "://" not in given else given
    if uri.startswith(("http:", "https:", "file:")):
        raise UserError(
            f"--store {uri}: give the database that the server is to keep runs in, "
            "postgresql://… or sqlite:///…"
        )
    if uri.startswith("sqlite:"):
        return backend.resolve_uri(uri)
    if uri.startswith("postgresql:"):
        from importlib.util import find_spec

        if find_spec("psycopg") is None:
            raise UserError(
                "--store postgresql://…: the driver is not installed; "
                "pip install 'skillnet-platform[tracker]'"
            )
        # Whatever SQLAlchemy takes the plain name for: we install psycopg 3.
        return uri.replace("postgresql:", "postgresql+psycopg:", 1)
    return uri


def prepare(uri: str) -> None:
    """Make the schemas of runs and of the registry, in this one process.

    Raises:
        UserError: the database cannot be reached, or refuses.
    """
    backend.prepare_mlflow_environment()
    from mlflow.exceptions import MlflowException
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as Runs
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        # MLflow would try for a minute and a half before it says that there is nobody.
        engine = create_engine(uri)
        engine.connect().close()
        engine.dispose()
        Runs(uri, "mlflow-artifacts:/")
        Registry(uri)
    except (SQLAlchemyError, MlflowException) as problem:
        raise UserError(f"--store {_without_password(uri)}: {first_line(problem)}") from None


def prepare_auth(uri: str, folder: Path) -> dict[str, str]:
    """Make the users' tables and the first user; what the server needs in its environment.

    Args:
        uri: of the database; users are kept in it too.
        folder: of the configuration and the secrets.

    Raises:
        UserError: Flask-WTF, which MLflow's authentication needs, is not installed.
    """
    from importlib.util import find_spec

    if find_spec("flask_wtf") is None:
        raise UserError("--auth true needs Flask-WTF: pip install 'skillnet-platform[tracker]'")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    password = _secret(folder / PASSWORD)
    ini = folder / AUTH_CONFIG
    _write_private(
        ini,
        "[mlflow]\n"
        "default_permission = READ\n"
        # A % is the format's own sign.
        f"database_uri = {uri.replace('%', '%%')}\n"
        f"admin_username = {ADMIN}\n"
        f"authorization_function = {AUTHORIZATION}\n",
    )
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore as Users

    users = Users()
    users.init_db(uri)
    if not users.has_user(ADMIN):
        users.create_user(ADMIN, password, is_admin=True)
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(ini),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": _secret(folder / SECRET),
    }


def auth_folder() -> Path:
    """Where the server's secrets are kept: ``<run root>/tracker``."""
    return storage.run_root() / "tracker"


def _secret(path: Path) -> str:
    """The secret in a file, made at the first call."""
    if not path.is_file():
        _write_private(path, secrets.token_urlsafe(24) + "\n")
    return path.read_text(encoding="ascii").strip()


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, and was never readable to others."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)


def _without_password(uri: str) -> str:
    head, at, tail = uri.rpartition("@")
    if not at or ":" not in head.partition("://")[2]:
        return uri
    return f"{head.rpartition(':')[0]}:…@{tail}"


if __name__ == "__main__":
    raise SystemExit(main())
