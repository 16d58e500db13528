"""Limits of the connections of ``skillnet serve``: their number, their time and their heads.

    socket ──> :class:`GuardedConnection` (uvicorn, h11) ──> application of ASGI

uvicorn waits for a request without a deadline and accepts any number of connections, so one client
without a token could stop the server (decision 63). :func:`configure_server` is the entry point;
``skillnet serve`` and the tests call it.
"""

import asyncio
import contextlib
import http
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from skillnet_serving.server.fair_share import identify_client

#: Bytes of the request line and the headers of a request, and of one read of them.
MAX_HEAD_BYTES, HEAD_PART_BYTES = 16 * 2**10, 4 * 2**10
#: Seconds that a connection stays open between two requests.
KEEP_ALIVE_S = 5
#: Seconds that requests in progress get at the end of the server.
SHUTDOWN_S = 10
#: Key of a request's state: it is authorized and counted, and its connection stays.
ADMITTED = "admitted"


@dataclass(frozen=True)
class ServerLimits:
    """Limits of a server.

    Args:
        max_bytes: largest size of the body of a request.
        max_rows: largest length of a prediction request.
        max_requests: that are in progress at the same time.
        timeout_s: seconds for the answer of a request.
        max_running: requests that the replicas have at the same time; others wait.
        head_s: seconds until a connection has sent its request line and headers.
        body_s: seconds until a request has its body.
        taking_s: seconds that a client may take to receive its answer.
    """

    max_bytes: int
    max_rows: int
    max_requests: int
    timeout_s: float
    max_running: int = 64
    head_s: float = 10.0
    body_s: float = 60.0
    taking_s: float = 60.0

    @property
    def max_connections(self) -> int:
        """Connections at the same time; one address has half of them at most."""
        return 2 * self.max_requests + 256


class ConnectionTable:
    """Open connections of a server, by address and age.

    A new connection is always accepted. Beyond the limit, the oldest one without an admitted
    request ends: one that waits for a request, or whose client has no token.

    Args:
        limits: bounds of requests, connections and time.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self.limits = limits
        self._peers: dict[str, dict[GuardedConnection, None]] = {}

    def add(self, connection: "GuardedConnection") -> None:
        """Count a new connection; end another one if it is one too many.

        Args:
            connection: that was accepted.
        """
        own = self._peers.setdefault(connection.peer, {})
        own[connection] = None
        most = self.limits.max_connections
        if len(own) > most // 2:
            self._end_one(own)
        elif sum(map(len, self._peers.values())) > most:
            self._end_one(max(self._peers.values(), key=len))

    def remove(self, connection: "GuardedConnection") -> None:
        """Forget a connection that ended.

        Args:
            connection: result of :meth:`add`.
        """
        own = self._peers.get(connection.peer, {})
        own.pop(connection, None)
        if not own:
            self._peers.pop(connection.peer, None)

    def _end_one(self, connections: "dict[GuardedConnection, None]") -> None:
        ended = next((each for each in connections if not each.has_admitted_request), None)
        if ended is None:
            # All of them are busy, so the one that came last ends.
            ended = next(reversed(connections))
        self.remove(ended)
        ended.transport.abort()


class LengthConnection(h11.Connection):
    """Parser of requests whose bodies have a declared length.

    The cost of a body in chunks grows with their number, which only the parser sees.
    """

    #: Status of the error that the parser raised.
    status = 400

    def next_event(self) -> Any:
        """Return the next part of a request; see h11.

        Raises:
            RemoteProtocolError: it is no request, its head is too long, or its body has chunks.
        """
        try:
            event = super().next_event()
            if isinstance(event, h11.Request) and b"transfer-encoding" in dict(event.headers):
                raise h11.RemoteProtocolError("chunked body", error_status_hint=411)
        except h11.RemoteProtocolError as error:
            self.status = error.error_status_hint
            raise
        return event


class GuardedConnection(H11Protocol):
    """Connection of uvicorn with deadlines.

    One timer covers each stage: the head of a request, the request with its answer, and the
    taking of the answer. The connection ends with the timer.

    Args:
        table: register of the server's open connections.
        options: further arguments of ``uvicorn.Config``.
    """

    def __init__(self, table: ConnectionTable, **options: Any) -> None:
        super().__init__(**options)
        self._parser = LengthConnection(h11.SERVER, MAX_HEAD_BYTES)
        self.conn = self._parser
        self._table, self._limits = table, table.limits
        self._timer: asyncio.TimerHandle | None = None
        self.peer = ""

    @property
    def has_admitted_request(self) -> bool:
        """Whether a request with its token is in progress."""
        is_busy = self.cycle is not None and not self.cycle.response_complete
        return is_busy and ADMITTED in self.scope["state"]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the head of a request."""
        super().connection_made(transport)
        self.peer = identify_client(self.client[0] if self.client else "")
        self._limit_time(self._limits.head_s)
        self._table.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        self._table.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what the client sent."""
        # The parser compares only an unfinished head with its limit, so it gets small parts.
        while data and not self.transport.is_closing():
            is_head = self.conn.their_state is h11.IDLE
            part, data = (
                (data[:HEAD_PART_BYTES], data[HEAD_PART_BYTES:]) if is_head else (data, b"")
            )
            before = self.cycle
            super().data_received(part)
            self._note_request(before)

    def on_response_complete(self) -> None:
        """Begin to wait for the next request, or for the client to take its answer."""
        is_last = self.transport.is_closing()
        self._limit_time(self._limits.taking_s if is_last else self._limits.head_s)
        before = self.cycle
        super().on_response_complete()
        self._note_request(before)

    def pause_writing(self) -> None:
        """Begin to wait for a client that does not take its answer."""
        super().pause_writing()
        self._limit_time(self._limits.taking_s)

    def send_400_response(self, msg: str) -> None:
        """Answer something that is no acceptable request, and close the connection."""
        status = self._parser.status
        reason = {
            411: "Content-Length: send the length of the body instead of chunks",
            431: f"the request line and the headers are longer than {MAX_HEAD_BYTES} bytes",
        }.get(status, "this is no request of HTTP/1.1; check line ends, names and Host")
        body = json.dumps({"error": reason}).encode()
        head = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        answer = h11.Response(
            status_code=status,
            headers=[*head, ("Connection", "close")],
            reason=http.HTTPStatus(status).phrase.encode(),
        )
        # An answer may have begun before.
        with contextlib.suppress(h11.LocalProtocolError):
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._limit_time(self._limits.taking_s)

    def _note_request(self, before: Any) -> None:
        """Limit the time of a request that has begun."""
        if self.cycle is not before and not self.cycle.response_complete:
            limits = self._limits
            self._limit_time(limits.body_s + limits.timeout_s + limits.taking_s)

    def _limit_time(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def configure_server(
    application: Callable[..., Any], host: str, port: int, limits: ServerLimits
) -> uvicorn.Server:
    """Return a server of uvicorn with guarded connections.

    Args:
        application: ASGI callable that answers requests.
        host: interface to listen on.
        port: port to listen on.
        limits: bounds of requests, connections and time.
    """
    connection: Any = partial(GuardedConnection, ConnectionTable(limits))
    return uvicorn.Server(
        uvicorn.Config(
            application,
            host=host,
            port=port,
            http=connection,
            # A handshake of a websocket is answered as any other request.
            ws="none",
            # Everybody who reaches the port can cause its warnings.
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
    )
