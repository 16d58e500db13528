"""MLflow server as a child process, which is terminated with this process."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.tracking import backend

#: Seconds for a server to end after SIGTERM.
END_S = 10
#: Shell script that reads a process group, waits for the end of its input, and ends the group. Its
#: input ends with this process, also after SIGKILL. A server has its own session, so that Ctrl-C
#: reaches the server only through this process.
WATCH = f"read -r g || exit; cat; kill -TERM -$g && sleep {END_S} && kill -KILL -$g"


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


#: Variable with the URI of the server's database. A URI may hold a password, and every user of the
#: machine can read command lines.
STORE_VARIABLE = "MLFLOW_BACKEND_STORE_URI"


def start_server(uri: str, host: str, port: int, **streams: Any) -> "subprocess.Popen[Any]":
    """Start an MLflow server in its own session; it does not answer yet.

    Args:
        uri: of the database; it appears in no command line.
        host: interface to listen on.
        port: port to listen on.
        streams: stream arguments of ``subprocess.Popen``.
    """
    words = server_command(host, port)
    return subprocess.Popen(words, env=server_environment(uri), start_new_session=True, **streams)


def server_environment(uri: str) -> dict[str, str]:
    """Return the environment of a server for the database ``uri``."""
    given = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    given[STORE_VARIABLE] = SecretUri(uri).reveal()
    given.pop(backend.URI_VARIABLE, None)
    return given


def server_command(
    host: str, port: int, artifacts: str | None = None, workers: int = 1
) -> list[str]:
    """Return the command line of an MLflow server.

    Args:
        host: interface to listen on.
        port: port to listen on.
        artifacts: folder or URI of artifacts, by default in the run root.
        workers: processes that answer.
    """
    # PATH may lead to the MLflow of another environment.
    program = shutil.which("mlflow", path=os.path.dirname(sys.executable)) or "mlflow"  # noqa: PTH120
    kept = ["--artifacts-destination", artifacts or backend.artifact_root().as_uri()]
    return [
        program,
        "server",
        *kept,
        "--host",
        host,
        "--port",
        str(port),
        "--workers",
        str(workers),
    ]
