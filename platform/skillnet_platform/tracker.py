"""``skillnet tracker``: run an MLflow server for several machines, on PostgreSQL, with a password.

A wrapper around ``mlflow server`` with two additions. It creates the schemas before the server's
workers start, which would race on an empty database. It listens on loopback, and on other
interfaces only with MLflow's authentication, whose first password it writes to a file of mode 600.
"""

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from skillnet_platform import console, signals, storage, ui
from skillnet_platform.cli import command
from skillnet_platform.cluster import loopback
from skillnet_platform.config.bounds import PortNumber, ProcessorCount
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.storage.objects import require_no_secret
from skillnet_platform.tracking import backend
from skillnet_platform.tracking import server as tracking_server
from skillnet_platform.tracking.database_uri import is_sqlite, sqlite_path, sqlite_uri

ADMIN = "admin"
AUTH_CONFIG = "auth.ini"
PASSWORD = "admin-password"  # noqa: S105 - a file's name
SECRET = "session-key"  # noqa: S105 - a file's name
AUTHORIZATION = "skillnet_platform.tracking.authentication:authenticate_request"


@dataclass
class TrackerConfig:
    """Options of ``skillnet tracker``.

    Args:
        store: database: ``postgresql://USER@HOST/DATABASE``, or sqlite for one machine; by
            default MLFLOW_BACKEND_STORE_URI, else the sqlite file of the run root. Put a
            password into ``~/.pgpass`` or PGPASSWORD: other users can read command lines.
        artifacts: folder of the artifacts, or a URI such as
            ``s3://BUCKET/PATH``; by default in the run root.
        host: interface to listen on; any but loopback needs ``auth``.
        port: port to listen on.
        auth: require a user and a password.
        workers: processes that answer requests.
        allowed_hosts: names of this machine that clients use, beyond localhost and private
            addresses (MLflow's protection against DNS rebinding).
    """

    store: str | None = None
    artifacts: str | None = None
    host: str = "127.0.0.1"
    port: PortNumber = 5000
    auth: bool = False
    workers: ProcessorCount = 2
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
    ui.require_free_port(config.host, config.port)
    if config.artifacts:
        require_no_secret(config.artifacts)
    uri = resolve_store(config.store or os.environ.get(tracking_server.STORE_VARIABLE))
    # Before the server starts: its workers would race on an empty database.
    create_schemas(uri)
    options: list[str] = []
    secret: dict[str, str] = {}
    if config.auth:
        secret = create_first_user(uri, auth_directory())
        options += ["--app-name", "basic-auth"]
        console.print_note(f"user {ADMIN}, password in {auth_directory() / PASSWORD}")
    if config.allowed_hosts:
        options += ["--allowed-hosts", ",".join(config.allowed_hosts)]
    program = tracking_server.server_command(
        config.host, config.port, config.artifacts, config.workers
    )
    with tracking_server.running_server(
        [*program, *options], tracking_server.server_environment(uri) | secret
    ) as server:
        try:
            with signals.terminate_as_interrupt():
                return server.wait()
        except KeyboardInterrupt:
            return 0


def require_safe(host: str, auth: bool) -> None:
    """Check that a server beyond loopback has a password.

    Args:
        host: interface to listen on.
        auth: whether the server requires a password.

    Raises:
        UserError: ``host`` is not loopback, and ``auth`` is False.
    """
    if not loopback.is_loopback_host(host) and not auth:
        raise UserError(
            f"--host {host} lets others read and change every run. Add --auth true, or use "
            "127.0.0.1 with ssh -L"
        )


def resolve_store(given: str | None) -> SecretUri:
    """Return the URI of the database.

    Args:
        given: URI or path; by default the sqlite file of the run root.

    Raises:
        UserError: the URI is not a database, or its driver is not installed.
    """
    if given is None or "://" not in given:
        return SecretUri(sqlite_uri(Path(given) if given else storage.run_root() / "mlflow.db"))
    uri = SecretUri(given)
    if uri.startswith(("http:", "https:", "file:")):
        raise UserError(f"--store {uri}: give a database, postgresql://… or sqlite:///…")
    if is_sqlite(uri):
        return backend.resolve_uri(uri)
    if uri.startswith("postgresql:"):
        from importlib.util import find_spec

        if find_spec("psycopg") is None:
            raise UserError(
                "--store postgresql://…: the driver is not installed; "
                "pip install 'skillnet-platform[tracker]'"
            )
        # SQLAlchemy's default driver may differ: the extra installs psycopg 3.
        return SecretUri(uri.reveal().replace("postgresql:", "postgresql+psycopg:", 1))
    return uri


def create_schemas(uri: SecretUri) -> None:
    """Create the schemas of runs and registry in this process.

    Raises:
        UserError: the database does not answer, or refuses.
    """
    backend.prepare_mlflow_environment()
    from mlflow.exceptions import MlflowException
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as Runs
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    if is_sqlite(uri):
        sqlite_path(uri).parent.mkdir(parents=True, exist_ok=True)
    try:
        # MLflow would retry for 90 s before it reports a missing server.
        engine = create_engine(uri.reveal())
        engine.connect().close()
        engine.dispose()
        Runs(uri.reveal(), "mlflow-artifacts:/")
        Registry(uri.reveal())
    except (SQLAlchemyError, MlflowException) as error:
        raise UserError(f"--store {uri}: {first_line(error)}") from None


def create_first_user(uri: SecretUri, folder: Path) -> dict[str, str]:
    """Create the tables of users and the first user.

    Args:
        uri: of the database, which also holds the users.
        folder: of the configuration and the secrets.

    Returns:
        Environment variables of the server.

    Raises:
        UserError: Flask-WTF, which MLflow's authentication needs, is not installed.
    """
    from importlib.util import find_spec

    if find_spec("flask_wtf") is None:
        raise UserError("--auth true needs Flask-WTF: pip install 'skillnet-platform[tracker]'")
    # The folder holds secrets, and other users share this machine.
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    password = _secret(folder / PASSWORD)
    ini = folder / AUTH_CONFIG
    _write_private(
        ini,
        "[mlflow]\n"
        "default_permission = READ\n"
        # % is special in this format.
        f"database_uri = {uri.reveal().replace('%', '%%')}\n"
        f"admin_username = {ADMIN}\n"
        f"authorization_function = {AUTHORIZATION}\n",
    )
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore as Users

    users = Users()
    users.init_db(uri.reveal())
    # The password may have been changed since the first start.
    if not users.has_user(ADMIN):
        users.create_user(ADMIN, password, is_admin=True)
    # The server imports the function above, also from a checkout that is not installed.
    package = str(Path(__file__).resolve().parents[1])
    paths = dict.fromkeys([package, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "MLFLOW_AUTH_CONFIG_PATH": str(ini),
        # A new key at each start would invalidate all signed sessions.
        "MLFLOW_FLASK_SERVER_SECRET_KEY": _secret(folder / SECRET),
    }


def auth_directory() -> Path:
    """Return the folder of the server's secrets: ``<run root>/tracker``."""
    return storage.run_root() / "tracker"


def _secret(path: Path) -> str:
    """Return the secret in a file, which the first call generates."""
    if not path.is_file():
        _write_private(path, secrets.token_urlsafe(24) + "\n")
    return path.read_text(encoding="ascii").strip()


def _write_private(path: Path, text: str) -> None:
    """Write a file with mode 600 from its creation."""
    # An existing file would keep its mode. O_EXCL refuses a file or link that appears meanwhile.
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)


if __name__ == "__main__":
    raise SystemExit(main())
