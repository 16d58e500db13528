"""An MLflow server that is started, killed and started again."""

import contextlib
import socket
import subprocess
import time
from pathlib import Path

from skillnet_platform.errors import UserError
from skillnet_platform.tracking import backend
from skillnet_platform.tracking import server as tracking_server

WAIT_S = 600.0


class Server:
    """An MLflow server on loopback that keeps its store and its port over restarts.

    Args:
        database: sqlite file of its store.
        artifacts: folder of its artifacts.
    """

    def __init__(self, database: Path, artifacts: Path) -> None:
        self._uri = f"sqlite:///{database}"
        self._artifacts = artifacts
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """Of the running server; its workers end with it."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, unless it answers; returns when it does."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        self._process = tracking_server.start_server(
            self._uri,
            "127.0.0.1",
            self._port,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            with contextlib.suppress(UserError):
                backend.require_answer(self.uri)
                return
            time.sleep(0.2)
        raise RuntimeError(f"no MLflow server at {self.uri} within {WAIT_S:.0f} s")

    def stop(self) -> None:
        """Kill it and all its workers."""
        if self._process is not None:
            tracking_server.stop_server(self._process, patience=0)
            self._process = None
