"""An MLflow server that is started, killed and started again."""

import socket
import subprocess
from pathlib import Path

from skillnet_cluster import tracker
from tests.helpers.waiting import wait_for_answer

WAIT_S = 600.0


class Server:
    """An MLflow server on loopback that keeps its store and its port over restarts.

    Args:
        database: sqlite file of its store.
    """

    def __init__(self, database: Path) -> None:
        self._uri = f"sqlite:///{database}"
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
        self._process = subprocess.Popen(
            tracker.server_command("127.0.0.1", self._port),
            env=tracker.server_environment(self._uri),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for_answer(f"{self.uri}/health", WAIT_S, process=self._process)

    def __enter__(self) -> str:
        """Start it; its address."""
        self.start()
        return self.uri

    def __exit__(self, *error: object) -> None:
        """Stop it."""
        self.stop()

    def stop(self) -> None:
        """Kill it and all its workers."""
        if self._process is not None:
            tracker.stop_server(self._process, patience=0)
            self._process = None
