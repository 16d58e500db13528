"""``skillnet tracker``: an MLflow server for this machine's pages, or for several machines.

A thin wrapper around ``mlflow server``, which reads its other options from MLflow's own variables.
The wrapper adds three things. The URI of the database, which may hold a password, is in no command
line. Interfaces beyond loopback need MLflow's authentication, whose first password is written to a
file of mode 600. The server ends with the command, also after SIGKILL.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillnet_platform import console, signals, storage, tracking
from skillnet_platform.cli import command
from skillnet_platform.cluster import loopback
from skillnet_platform.config.bounds import PortNumber
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.package_version import extra_command
from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.storage.directories import require_no_secret
from skillnet_platform.tracking import backend
from skillnet_platform.tracking.backend import STORE_VARIABLE, is_sqlite, sqlite_path, sqlite_uri

ADMIN = "admin"
AUTH_CONFIG = "auth.ini"
PASSWORD = "admin-password"  # noqa: S105 - a file's name
SECRET = "session-key"  # noqa: S105 - a file's name
AUTHORIZATION = "skillnet_cluster.authentication:authenticate_request"
ARTIFACTS_VARIABLE = "MLFLOW_ARTIFACTS_DESTINATION"
#: Variables of MLflow's server, unless the user has set them.
DEFAULTS = {
    "MLFLOW_WORKERS": "2",
    "MLFLOW_UVICORN_OPTS": "--log-level warning",
    "PYTHONWARNINGS": "ignore",
}
#: Seconds for a server to end after SIGTERM.
END_S = 10
#: Shell script that reads a process group, waits for the end of its input, and ends the group. Its
#: input ends with this process, also after SIGKILL. A server has its own session, so that Ctrl-C
#: reaches the server only through this process.
WATCH = f"read -r g || exit; cat; kill -TERM -$g && sleep {END_S} && kill -KILL -$g"


@dataclass
class TrackerConfig:
    """Options of ``skillnet tracker``.

    Args:
        store: database: sqlite for one machine, or ``postgresql://USER@HOST/DATABASE``; by
            default MLFLOW_BACKEND_STORE_URI, else this machine's runs. Put a password into
            ``~/.pgpass`` or PGPASSWORD: other users can read command lines.
        host: interface to listen on; any but loopback needs ``auth``.
        port: port to listen on; 0 takes a free port.
        auth: require a user and a password.
    """

    store: str | None = None
    host: str = "127.0.0.1"
    port: PortNumber = 5000
    auth: bool = False


@command(
    TrackerConfig,
    description="Show this machine's runs in MLflow's pages, or run an MLflow server that several "
    "machines record to. MLflow's variables set the rest: MLFLOW_ARTIFACTS_DESTINATION, "
    "MLFLOW_SERVER_ALLOWED_HOSTS, MLFLOW_WORKERS.",
    example="skillnet tracker --port 5001\n"
    "skillnet tracker --store postgresql://mlflow@db/mlflow --host 10.0.0.5 --auth true",
)
def main(config: TrackerConfig) -> int:
    """Serve until interrupted."""
    if not loopback.is_loopback_host(config.host) and not config.auth:
        raise UserError(
            f"--host {config.host} lets others read and change every run. Add --auth true, or use "
            "127.0.0.1 with ssh -L"
        )
    port = loopback.choose_port(config.host, config.port)
    environment = server_environment(resolve_store(config.store))
    uri = SecretUri(environment[STORE_VARIABLE])
    require_no_secret(environment[ARTIFACTS_VARIABLE])
    require_store(uri)
    program, address = server_command(config.host, port), f"http://{config.host}:{port}"
    page = address if config.auth else _prepare_pages(uri, address)
    if config.auth:
        environment |= write_secrets(uri, auth_directory())
        program += ["--app-name", "basic-auth"]
        console.print_note(f"user {ADMIN}, password in {auth_directory() / PASSWORD}")
    with running_server(program, environment, stdout=subprocess.DEVNULL) as server:
        try:
            with signals.terminate_as_interrupt():
                _wait_until_up(server, address)
                console.print_note(f"runs of {uri}; Ctrl-C stops")
                console.print_output(page)
                return server.wait()
        except KeyboardInterrupt:
            return 0


def resolve_store(given: str | None) -> SecretUri:
    """Return the URI of the database.

    Args:
        given: URI or path; by default the database of MLFLOW_BACKEND_STORE_URI, else that of this
            machine's runs.

    Raises:
        UserError: the URI is not a database, or its driver is not installed.
    """
    given = given or os.environ.get(STORE_VARIABLE)
    if not given:
        uri = backend.resolve_uri()
        if is_sqlite(uri):
            return uri
        console.print_note(f"commands of this shell record to another server: {uri}")
        given = str(storage.run_root() / "mlflow.db")
    if "://" not in given:
        return SecretUri(sqlite_uri(Path(given)))
    uri = SecretUri(given)
    if uri.startswith(("http:", "https:", "file:")):
        raise UserError(f"--store {uri}: give a database, postgresql://… or sqlite:///…")
    if is_sqlite(uri):
        return backend.resolve_uri(uri)
    if uri.startswith("postgresql:"):
        from importlib.util import find_spec

        if find_spec("psycopg") is None:
            raise UserError(
                "--store postgresql://…: the driver is not installed; " + extra_command("tracker")
            )
        # SQLAlchemy's default driver may differ: the extra installs psycopg 3.
        return SecretUri(uri.reveal().replace("postgresql:", "postgresql+psycopg:", 1))
    return uri


def require_store(uri: SecretUri) -> None:
    """Check that a database answers. MLflow would retry for 90 s before it reports an outage.

    Raises:
        UserError: the database does not answer, or refuses.
    """
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    if is_sqlite(uri):
        backend.require_database(sqlite_path(uri))
        sqlite_path(uri).parent.mkdir(parents=True, exist_ok=True)
        return
    try:
        engine = create_engine(uri.reveal())
        engine.connect().close()
        engine.dispose()
    except (SQLAlchemyError, ImportError) as error:
        raise UserError(f"--store {uri}: {first_line(error)}") from None


def _prepare_pages(uri: SecretUri, address: str) -> str:
    """Send the records that still wait, and return the page of this machine's runs."""
    if not is_sqlite(uri) or not sqlite_path(uri).is_file():
        return address
    tracking.send_leftover_spools(uri)
    found = backend.create_client(uri).get_experiment_by_name(tracking.TrackingConfig().experiment)
    return address if found is None else backend.run_list_link(address, found.experiment_id)


def write_secrets(uri: SecretUri, folder: Path) -> dict[str, str]:
    """Write the configuration of MLflow's authentication, and the password of its first user.

    Args:
        uri: address of the database, which also holds the users.
        folder: directory of the configuration and the secrets.

    Returns:
        Environment variables of the server.

    Raises:
        UserError: Flask-WTF, which MLflow's authentication needs, is not installed.
    """
    from importlib.util import find_spec

    if find_spec("flask_wtf") is None:
        raise UserError(f"--auth true needs Flask-WTF: {extra_command('tracker')}")
    # The folder holds secrets, and other users share this machine.
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
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
    # The server imports the function above, also from a checkout that is not installed.
    package = str(Path(__file__).resolve().parents[1])
    paths = dict.fromkeys([package, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "MLFLOW_AUTH_CONFIG_PATH": str(ini),
        # Only for a user who does not exist yet: the password may have been changed since.
        "MLFLOW_AUTH_ADMIN_PASSWORD": _secret(folder / PASSWORD),
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


def server_command(host: str, port: int) -> list[str]:
    """Return the command line of an MLflow server.

    Args:
        host: interface to listen on.
        port: port to listen on.
    """
    # PATH may lead to the MLflow of another environment.
    program = shutil.which("mlflow", path=os.path.dirname(sys.executable)) or "mlflow"  # noqa: PTH120
    return [program, "server", "--host", host, "--port", str(port)]


def server_environment(uri: str) -> dict[str, str]:
    """Return the environment of a server for the database ``uri``."""
    backend.prepare_mlflow_environment()
    given = {**DEFAULTS, ARTIFACTS_VARIABLE: backend.artifact_root().as_uri(), **os.environ}
    given |= {
        STORE_VARIABLE: SecretUri(uri).reveal(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    given.pop(backend.URI_VARIABLE, None)
    return given


@contextlib.contextmanager
def running_server(
    command: Sequence[str], environment: Mapping[str, str], **streams: Any
) -> "Iterator[subprocess.Popen[Any]]":
    """Run a server process group during a block, and terminate it with this process.

    Args:
        command: program and arguments.
        environment: complete environment of the server.
        streams: stream arguments of ``subprocess.Popen``.
    """
    # The watcher starts first: a kill during its start would leave a running server.
    watcher = subprocess.Popen(
        ["/bin/sh", "-c", WATCH],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert watcher.stdin is not None
    try:
        server = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
    except BaseException:
        watcher.communicate()
        raise
    # Only a SIGKILL before this line leaves a running server.
    watcher.stdin.write(f"{server.pid}\n".encode())
    watcher.stdin.flush()
    try:
        yield server
    finally:
        # First: after the wait the system may reuse the process id.
        watcher.kill()
        watcher.communicate()
        stop_server(server)


def stop_server(server: "subprocess.Popen[Any]", patience: float | None = None) -> None:
    """Terminate a process that leads its own session, with its descendants.

    Args:
        server: the process.
        patience: seconds after SIGTERM, by default ``END_S``; 0 sends SIGKILL at once.
    """
    patience = END_S if patience is None else patience
    if patience > 0:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(patience)
    # Also its descendants: the group exists while one of its processes runs.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _wait_until_up(server: "subprocess.Popen[Any]", address: str) -> None:
    # A server that ended never answers, so the wait would be in vain.
    while server.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{address}/health", timeout=2).close()  # noqa: S310 - ours
            return
        time.sleep(0.2)
    raise UserError(f"{address}: the MLflow server did not start. See the lines above")


if __name__ == "__main__":
    raise SystemExit(main())
