"""Who is let into ``skillnet serve``, and how much of it: tokens, hosts, shares and connections.

    socket ──> :class:`GuardedConnection` (uvicorn, httptools) ──> application of ASGI

:mod:`.http_server` compares the token, parses the host that a client asked for
(:func:`parse_authority`), and refuses requests of other sites' pages
(:func:`describe_foreign_page`). A token is never an argument: other users of a machine can read
command lines.

:class:`FairShare` counts requests, bytes of bodies, and turns at decoders and at the model, so that
no client takes all of them. The server and its replicas have their own.

uvicorn waits for a request without a deadline and accepts any number of connections, so one client
without a token could stop the server (decision 63). :func:`configure_server` limits their number,
their time and their heads.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import http
import ipaddress
import json
import os
import re
import stat
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.datastructures import Headers
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from skillnet_platform.cluster import loopback
from skillnet_platform.errors import UserError
from skillnet_serving.server.config import ServerLimits

TOKEN_VARIABLE = "SKILLNET_SERVE_TOKEN"  # noqa: S105 - a variable's name
#: Shortest token, in characters; a random one of 16 bytes has 22.
MIN_TOKEN_LENGTH = 16
MAX_TOKEN_LENGTH = 4096
#: A host with an optional port: no user, no other spelling of an address, no empty port.
_AUTHORITY = re.compile(
    r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*))"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
DEFAULT_PORTS = {"http": 80, "https": 443}
#: Values of Sec-Fetch-Site: the page of this server, or a user who typed the address.
OWN_SITES = ("same-origin", "none")
_MAKE_ONE = "Make one: (umask 077; openssl rand -hex 32 > token.txt)"
#: Bits of an IPv6 address that one client has; a provider gives each customer such a network.
NETWORK_BITS = 64
#: Bytes of the request line and the headers of a request, and of one read of them.
MAX_HEAD_BYTES, HEAD_PART_BYTES = 16 * 2**10, 4 * 2**10
#: Seconds that a connection stays open between two requests.
KEEP_ALIVE_S = 5
#: Seconds that requests in progress get at the end of the server.
SHUTDOWN_S = 10
#: Key of a request's state: the :class:`RunningRequest` of its connection.
RUNNING = "running"
#: Status and reason of a request that the parser or :class:`GuardedConnection` refuses.
REFUSALS = {
    400: "this is no request of HTTP/1.1; check line ends, names and Host",
    411: "Content-Length: send the length of the body instead of chunks",
    431: f"the request line and the headers are longer than {MAX_HEAD_BYTES} bytes",
}


# -- token, host and page ---------------------------------------------------------------------


def read_token(path: str | None, host: str) -> str | None:
    """Return the token of a server: of a file, or of the environment.

    Args:
        path: location of the file, or None.
        host: interface that the server listens on.

    Returns:
        None without a token, on loopback.

    Raises:
        UserError: the interface is not loopback and no token is given; the file is unreadable or
            open to other users; the token is too short.
    """
    if path is not None:
        token, source = _read_token_file(Path(path)), f"--token_file {path}"
    else:
        token, source = os.environ.get(TOKEN_VARIABLE, ""), TOKEN_VARIABLE
        if not token:
            if loopback.is_loopback_host(host):
                return None
            raise UserError(
                f"--host {host}: everyone who reaches this interface could use the model. Give "
                f"--token_file FILE, or set {TOKEN_VARIABLE}. {_MAKE_ONE}"
            )
    if not MIN_TOKEN_LENGTH <= len(token) <= MAX_TOKEN_LENGTH or not token.isascii():
        raise UserError(
            f"{source}: a token has {MIN_TOKEN_LENGTH} to {MAX_TOKEN_LENGTH} ASCII characters. "
            f"{_MAKE_ONE}"
        )
    return token


def _read_token_file(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & 0o077:
                raise UserError(
                    f"--token_file {path}: other users can read this file. Run: chmod 600 {path}"
                )
            data = stream.read(MAX_TOKEN_LENGTH + 2)
    except OSError as error:
        raise UserError(f"--token_file {path}: cannot be read ({error.strerror})") from None
    return data.decode("ascii", "replace").strip()


def is_authorized(token: str | None, header: str | None) -> bool:
    """Return whether an ``Authorization`` header has the token, in constant time.

    A program sends ``Bearer TOKEN``. A browser asks its user and sends ``Basic``: the token is the
    password, with any user name.

    Args:
        token: secret of the server; None accepts every request.
        header: value of the header, or None.
    """
    if token is None:
        return True
    scheme, _, value = (header or "").partition(" ")
    given = value.strip()
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode("ascii").partition(":")[2]
        except ValueError:
            return False
    elif scheme.lower() != "bearer":
        return False
    # Digests have one length, so the comparison does not tell the length of the token.
    digests = [hashlib.sha256(each.encode("utf-8", "replace")).digest() for each in (token, given)]
    return hmac.compare_digest(*digests)


@dataclass(frozen=True)
class RequestAuthority:
    """Host that a client asked for.

    Args:
        name: in lower case; an IPv6 address without brackets.
        port: or None.
        is_loopback: whether no other machine can have the name.
    """

    name: str
    port: int | None
    is_loopback: bool


@lru_cache(maxsize=64)
def parse_authority(text: str) -> RequestAuthority | None:
    """Return the host of a ``Host`` header; None if it is anything but a host and a port.

    Args:
        text: value of the header.
    """
    found = _AUTHORITY.fullmatch(text)
    if found is None:
        return None
    name, port = (
        (found["name"] or "").lower(),
        None if found["port"] is None else int(found["port"]),
    )
    if found["address"] is not None:
        try:
            name = str(ipaddress.IPv6Address(found["address"]))
        except ValueError:
            return None
    if port is not None and not 0 < port <= 0xFFFF:
        return None
    return RequestAuthority(name, port, loopback.is_loopback_host(name))


def describe_foreign_page(headers: Headers, authority: RequestAuthority | None) -> str | None:
    """Return why a browser's page of another site sent a request; None if none did.

    Args:
        headers: named fields of the request. Programs send neither of the headers of browsers.
        authority: that the client asked for.
    """
    # Browsers omit this header where a connection is neither encrypted nor local.
    if any(site not in OWN_SITES for site in headers.getlist("sec-fetch-site")):
        return (
            "Sec-Fetch-Site: a page of another site sent this request; open the server's own page"
        )
    for origin in headers.getlist("origin"):
        scheme, separator, rest = origin.partition("://")
        own = parse_authority(rest) if separator and scheme in DEFAULT_PORTS else None
        if own is None or authority is None or own.name != authority.name:
            return "Origin: send the request from the page of this server"
        default = DEFAULT_PORTS[scheme]
        if (own.port or default) != (authority.port or default):
            return "Origin: send the request from the page of this server"
    return None


# -- shares ---------------------------------------------------------------------------------


class FairShare:
    """Units of one event loop.

    A client gets more units only while at least as many stay free as it has then. So one client
    holds half of them at most, a second one half of the rest, and a newcomer finds some. Clients
    that wait take turns.

    Args:
        total: number of units.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}

    @property
    def held(self) -> int:
        """Number of units that clients hold."""
        return self._held.total()

    def take(self, client: str, amount: int = 1) -> bool:
        """Take units if the client may have them now, and return whether it got them.

        Args:
            client: result of :func:`identify_client`.
            amount: number of units.
        """
        has_room = self._held[client] + amount <= self._total - self.held
        if has_room:
            self._held[client] += amount
        elif not self._held[client]:
            del self._held[client]
        return has_room

    def give_back(self, client: str, amount: int = 1) -> None:
        """Return units of :meth:`take`.

        Args:
            client: that took them.
            amount: number of units.
        """
        self._held[client] -= amount
        if not self._held[client]:
            del self._held[client]
        self._grant()

    @contextlib.asynccontextmanager
    async def hold(self, client: str, amount: int = 1) -> AsyncIterator[None]:
        """Hold units during a block, after a wait if the client may not have them yet.

        Args:
            client: result of :func:`identify_client`.
            amount: number of units, at most the total.
        """
        if client in self._waiting or not self.take(client, amount):
            await self._wait(client, amount)
        try:
            yield
        finally:
            self.give_back(client, amount)

    async def _wait(self, client: str, amount: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append((amount, turn))
        try:
            await turn
        except asyncio.CancelledError:
            # The units may have come in the same moment.
            if turn.done() and not turn.cancelled():
                self.give_back(client, amount)
            self._grant()
            raise

    def _grant(self) -> None:
        """Give free units to the clients that wait, one request of each client after the other."""
        while any(self._serve(client) for client in list(self._waiting)):
            pass

    def _serve(self, client: str) -> bool:
        """Give the first waiting request of a client its units; return whether it got them."""
        queue = self._waiting[client]
        while queue and queue[0][1].done():
            queue.popleft()
        if queue and not self.take(client, queue[0][0]):
            return False
        # The client's next request waits behind those of the others.
        del self._waiting[client]
        if not queue:
            return False
        queue.popleft()[1].set_result(None)
        if queue:
            self._waiting[client] = queue
        return True


@lru_cache(maxsize=1024)
def identify_client(host: str) -> str:
    """Return the name under which an address shares: itself, or its network in IPv6.

    Args:
        host: address of a peer; "" if it is unknown.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, NETWORK_BITS), strict=False))


# -- connections ----------------------------------------------------------------------------


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


@dataclass
class RunningRequest:
    """Request that a connection answers now; the others of the connection wait.

    Args:
        task: that answers it, or None.
        is_admitted: whether it has the token and is counted.
        is_lost: whether the client has left.
    """

    task: "asyncio.Task[Any] | None" = None
    is_admitted: bool = False
    is_lost: bool = False


class GuardedConnection(HttpToolsProtocol):
    """Connection of uvicorn with deadlines.

    One timer covers each stage: the head of a request, the request with its answer, and the
    taking of the answer. The connection ends with the timer, and a request with its connection.

    Args:
        table: register of the server's open connections.
        options: further arguments of ``uvicorn.Config``.
    """

    def __init__(self, table: ConnectionTable, **options: Any) -> None:
        super().__init__(**options)
        self._table, self._limits = table, table.limits
        self._timer: asyncio.TimerHandle | None = None
        self._running = RunningRequest()
        self.app_state = {**self.app_state, RUNNING: self._running}
        #: Bytes that are not parsed yet, and status of the refusal that ends the connection.
        self._unread, self._refusal = b"", 0
        #: Whether the head of a request is expected, and its bytes so far.
        self._is_head, self._head_bytes = True, 0
        self.peer = ""

    @property
    def has_admitted_request(self) -> bool:
        """Whether a request with its token is in progress."""
        return self._running.is_admitted

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the head of a request."""
        super().connection_made(transport)
        self.peer = identify_client(self.client[0] if self.client else "")
        self._limit_time(self._limits.head_s)
        self._table.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection, and cancel its request."""
        self._stop_timer()
        self._table.remove(self)
        super().connection_lost(exc)
        self._running.is_lost = True
        if self._running.task is not None:
            self._running.task.cancel()

    def data_received(self, data: bytes) -> None:
        """Parse what the client sent, up to a request that must wait for the answer to another."""
        self._unread += data
        while self._unread and not (self.pipeline or self._refusal or self.transport.is_closing()):
            # The parser has no limit for a head, so it gets small parts.
            size = HEAD_PART_BYTES if self._is_head else len(self._unread)
            part, self._unread = self._unread[:size], self._unread[size:]
            before = self.cycle
            if self._is_head:
                self._head_bytes += len(part)
            super().data_received(part)
            if self._head_bytes > MAX_HEAD_BYTES and not self._refusal:
                self._refusal = 431
                self.send_400_response("")
            self._note_request(before)
        # A request that reads its body lets more come than the one that waits may keep.
        if self._unread and not self.transport.is_closing():
            self.flow.pause_reading()

    def on_headers_complete(self) -> None:
        """Begin a request.

        Raises:
            ValueError: its body has chunks, whose cost grows with their number, or it names no
                host, or a second one in its target.
        """
        self._is_head, self._head_bytes = False, 0
        names = [name for name, _ in self.headers]
        version = self.parser.get_http_version()
        has_host = version == "1.0" or (version == "1.1" and b"host" in names)
        if b"transfer-encoding" in names:
            self._refusal = 411
        # A whole URL has a host of its own, and the parser would take its path.
        elif not has_host or not self.url.startswith(b"/"):
            self._refusal = 400
        if self._refusal:
            # The parser stops, and uvicorn calls :meth:`send_400_response`.
            raise ValueError(REFUSALS[self._refusal])
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Expect another head."""
        self._is_head = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request, or for the client to take its answer."""
        is_last = self.transport.is_closing()
        self._limit_time(self._limits.taking_s if is_last else self._limits.head_s)
        before = self.cycle
        super().on_response_complete()
        self._note_request(before)
        self.data_received(b"")

    def pause_writing(self) -> None:
        """Begin to wait for a client that does not take its answer."""
        super().pause_writing()
        self._limit_time(self._limits.taking_s)

    def send_400_response(self, msg: str) -> None:
        """Answer something that is no acceptable request, and close the connection."""
        self._refusal = self._refusal or 400
        if self.cycle is not None and not self.cycle.response_complete:
            # An answer may have begun. It comes whole, and ends the connection.
            self.cycle.keep_alive = False
            return
        body = json.dumps({"error": REFUSALS[self._refusal]}).encode()
        head = (
            f"HTTP/1.1 {self._refusal} {http.HTTPStatus(self._refusal).phrase}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
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
