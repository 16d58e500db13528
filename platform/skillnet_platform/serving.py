"""An MLflow server as a process of ours: how it is started. ``family.end`` ends it."""

import os
import shutil
import subprocess
import sys
from typing import Any

from skillnet_platform import store

#: By which MLflow's server takes its store. A URI may hold a password, and every user of the
#: machine sees command lines.
STORE_VARIABLE = "MLFLOW_BACKEND_STORE_URI"


def start(uri: str, host: str, port: int, **streams: Any) -> "subprocess.Popen[Any]":
    """Start a server on a store, in a session of its own; it does not answer yet.

    Args:
        uri: of the store; seen in no command line.
        host: which interface to listen on.
        port: where to listen.
        streams: of ``subprocess.Popen``: what becomes of its output.
    """
    words = command(host, port)
    return subprocess.Popen(words, env=environment(uri), start_new_session=True, **streams)


def environment(uri: str) -> dict[str, str]:
    """The environment of a server on that store."""
    given = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", STORE_VARIABLE: uri}
    given.pop(store.URI_VARIABLE, None)
    return given


def command(host: str, port: int, artifacts: str | None = None, workers: int = 1) -> list[str]:
    """The command line of an MLflow server; artifacts by default in the run root."""
    program = shutil.which("mlflow", path=os.path.dirname(sys.executable)) or "mlflow"  # noqa: PTH120
    kept = ["--artifacts-destination", artifacts or store.artifact_root().as_uri()]
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
