"""An MLflow server as a process of ours: how it is started. ``family.end`` ends it."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from skillnet_platform.tracking import backend

#: Seconds for a server to end by itself.
END_S = 10
#: Is told a group of processes, waits for the end of its input, which comes with the death of
#: whoever holds the other end, be it by SIGKILL, and then ends the group. A server has a session of
#: its own, so that Ctrl-C reaches it through us alone, and nobody else would.
WATCH = f"read -r g || exit; cat; kill -TERM -$g && sleep {END_S} && kill -KILL -$g"


@contextlib.contextmanager
def running_server(
    command: Sequence[str], environment: Mapping[str, str], **streams: Any
) -> "Iterator[subprocess.Popen[Any]]":
    """A command for the length of a block; at its end it and all below it are ended.

    Args:
        command: its words.
        environment: all of its environment.
        streams: of ``subprocess.Popen``: what becomes of its output.
    """
    # The watcher first: a kill while it is being started would leave a server that nobody ends.
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
    # A SIGKILL of ours before this line is the one that leaves a server.
    watcher.stdin.write(f"{server.pid}\n".encode())
    watcher.stdin.flush()
    try:
        yield server
    finally:
        # First: once the server has been waited for, its number may be another's.
        watcher.kill()
        watcher.communicate()
        stop_server(server)


def stop_server(server: "subprocess.Popen[Any]", patience: float | None = None) -> None:
    """End a process that leads a session of its own, and all that it started.

    Args:
        server: it.
        patience: seconds for it to end by itself, by default ``END_S``; with 0 it is not asked.
    """
    patience = END_S if patience is None else patience
    if patience > 0:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(patience)
    # Also what it left behind: the group lives as long as one of its processes does.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


#: By which MLflow's server takes its store. A URI may hold a password, and every user of the
#: machine sees command lines.
STORE_VARIABLE = "MLFLOW_BACKEND_STORE_URI"


def start_server(uri: str, host: str, port: int, **streams: Any) -> "subprocess.Popen[Any]":
    """Start a server on a store, in a session of its own; it does not answer yet.

    Args:
        uri: of the store; seen in no command line.
        host: which interface to listen on.
        port: where to listen.
        streams: of ``subprocess.Popen``: what becomes of its output.
    """
    words = server_command(host, port)
    return subprocess.Popen(words, env=server_environment(uri), start_new_session=True, **streams)


def server_environment(uri: str) -> dict[str, str]:
    """The environment of a server on that store."""
    given = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", STORE_VARIABLE: uri}
    given.pop(backend.URI_VARIABLE, None)
    return given


def server_command(
    host: str, port: int, artifacts: str | None = None, workers: int = 1
) -> list[str]:
    """The command line of an MLflow server; artifacts by default in the run root."""
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
