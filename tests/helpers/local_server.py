"""The HTTP server of ``skillnet serve`` in this process, with replicas that tests control."""

import asyncio
import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipelines.data.transforms.decode_guard import WorkBudget
from skillnet_platform.errors import UserError
from skillnet_serving.server.admission import configure_server
from skillnet_serving.server.config import ServerLimits
from skillnet_serving.server.http_server import ModelGateway, build_application
from skillnet_serving.server.served_model import UnreadyIndexError
from tests.helpers.ports import free_port
from tests.helpers.waiting import wait_until

TOKEN = "correct-horse-battery"  # noqa: S105


class DeadReplicaError(Exception):
    """Death of a replica, as Ray reports it."""


@dataclass
class LocalReplica:
    """Handle of a replica in this process, which can die, be slow, and hold clients' requests."""

    model: Any
    deaths: int = 0
    pause_s: float = 0.0
    asked: list[Any] = field(default_factory=list)
    cancelled: list[Any] = field(default_factory=list)
    held: set[str] = field(default_factory=set)

    def __call__(self, name: str, request: Any) -> "_Response":
        return _Response(self, partial(self._answer, name), request)

    def _answer(self, name: str, request: Any) -> Any:
        if name == "describe_later":
            return self.model.describe()
        return {**self._answer_request(name, request), "manifest_ns": 1}

    def _answer_request(self, name: str, request: Any) -> Any:
        budget = WorkBudget(request.seconds)
        if name == "predict":
            return self.model.predict([self.model.read_rows(request, budget)])[0]
        try:
            search, row = self.model.read_query(request, budget)
        except UnreadyIndexError as error:
            return {"unready": str(error)}
        except UserError as error:
            return {"error": str(error)}
        return self.model.search(request, search, row, search.embed_query(row))


@dataclass
class _Response:
    """Answer that a client waits for, as Ray Serve returns it."""

    replica: LocalReplica
    answer: Callable[[Any], Any]
    request: Any

    def __await__(self) -> Generator[Any, None, Any]:
        return self._wait().__await__()

    def cancel(self) -> None:
        self.replica.cancelled.append(self.request)

    async def _wait(self) -> Any:
        replica = self.replica
        # Not the questions of the server about its model.
        if hasattr(self.request, "client"):
            replica.asked.append(self.request)
        if replica.deaths:
            replica.deaths -= 1
            raise DeadReplicaError
        await asyncio.sleep(replica.pause_s)
        while getattr(self.request, "client", None) in replica.held:
            await asyncio.sleep(0.005)
        return await asyncio.to_thread(self.answer, self.request)


@dataclass
class Service:
    """A running server.

    Args:
        url: address of the server, with its port.
        replica: behind it.
    """

    url: str
    replica: LocalReplica

    def ask(
        self, path: str, document: Any = None, data: bytes | None = None, **headers: str
    ) -> tuple[int, str, dict[str, str]]:
        """Send a request; return status, body and headers."""
        body = data if document is None else json.dumps(document).encode()
        given = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}", **headers}
        request = urllib.request.Request(f"{self.url}{path}", body, given)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.read().decode(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(), dict(error.headers)

    def connect(self, sent: bytes = b"", window: int | None = None) -> socket.socket:
        """Return a connection on which bytes were sent; the window is the receive buffer."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        connection = socket.socket()
        connection.settimeout(30)
        if window is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        connection.connect((host, int(port)))
        connection.sendall(sent)
        return connection

    def send(self, sent: bytes) -> bytes:
        """Return all that the server answers to raw bytes until it closes the connection."""
        with self.connect(sent) as connection:
            return read_to_end(connection)

    def error(self, path: str, *given: Any, **more: Any) -> tuple[int, str]:
        """Return status and message of a rejected request."""
        status, body, _ = self.ask(path, *given, **more)
        return status, json.loads(body)["error"]


def read_to_end(connection: socket.socket) -> bytes:
    """Return the bytes that arrive until the other side ends the connection."""
    parts = []
    # A server that ends a connection in the middle of a request resets it.
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


@contextlib.contextmanager
def run_service(
    model: Any, limits: ServerLimits, token: str | None = TOKEN, ask: Any = None
) -> Iterator[Service]:
    """Run a server during a block.

    Args:
        model: object of its only replica: a ServedModel, a stub of it, or a ModelReplica.
        limits: bounds of requests, connections and time.
        token: that requests must have, or None.
        ask: calls a ModelReplica; None makes a replica that tests control.
    """
    replica, port = LocalReplica(model), free_port()
    gateway = ModelGateway(ask or replica, model.describe(), limits, (DeadReplicaError,))
    server = configure_server(build_application(gateway, token, limits), "127.0.0.1", port, limits)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, 60, pause=0.01)
    try:
        yield Service(f"http://127.0.0.1:{port}", replica)
    finally:
        replica.held = set()
        server.should_exit = True
        thread.join(timeout=10)
