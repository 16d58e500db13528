"""HTTP server in front of the replicas of ``skillnet serve``.

    client ── HTTP ──> :func:`build_application` ── handle ──> replica, here or in Ray Serve

The server runs in the process of the command, not in Ray Serve's proxy: it rejects a request before
it reads the body, and sends the request of a killed replica to another one. A prediction changes
nothing, so it may run twice. Clients share requests, memory and replicas, see
:class:`.FairShare`. A request whose client is gone is cancelled.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from pipelines.serving.inputs import NONE_USABLE
from skillnet_platform import console
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.storage import human_bytes
from skillnet_serving.retrieval.search_page import render_search_page
from skillnet_serving.server.admission import (
    RUNNING,
    FairShare,
    RunningRequest,
    describe_foreign_page,
    identify_client,
    is_authorized,
    parse_authority,
)
from skillnet_serving.server.config import ServerLimits
from skillnet_serving.server.request_rows import (
    PredictionRequest,
    SearchRequest,
    build_search_request,
    read_prediction_request,
    read_search_form,
    read_search_request,
)

#: Tries of one request; each follows the death of a replica.
MAX_TRIES = 5
#: Seconds before the next try. Ray Serve needs a moment to notice that a replica is dead.
RETRY_PAUSE_S = 0.2
#: Seconds after which an overloaded server asks clients to come back.
RETRY_AFTER_S = 1
#: Seconds that the health waits for the state of the model.
PROGRESS_PATIENCE_S = 0.5
#: Largest bodies that are in memory at the same time; one client has half of them at most.
BODIES_IN_MEMORY = 4
#: Bytes of a body that the event loop parses itself, which takes less time than a thread.
MAX_SHORT_BYTES = 4096
#: Seconds and bytes of a rejected body that are read and dropped.
DISCARD_PATIENCE_S, MAX_DISCARDED_BYTES = 2.0, 64 * 2**20
#: Key of a request's state: its health check has the token.
AUTHORIZED = "authorized"
#: Keys of the model's description that the health has.
HEALTH_KEYS = ("manifest", "packages", "problem", "ready", "indexes")
#: Content type of the form of the search page.
FORM = "multipart/form-data"
#: Status in the metrics of a request whose client left.
CLIENT_LEFT = 499
RETRY_HEADERS, RETRY_REMEDY = {"Retry-After": str(RETRY_AFTER_S)}, "send the request again"
#: Headers of every answer. A page of another site can neither frame it nor read its query. With
#: no-referrer, browsers would hide the origin of the page's own forms.
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]


Parsed = TypeVar("Parsed")


class OverloadError(HTTPException):
    """The server has too many requests, no replica answered in time, or an index is not ready."""

    def __init__(self, reason: str) -> None:
        super().__init__(503, f"{reason}; {RETRY_REMEDY}", RETRY_HEADERS)


#: Calls a method of a replica: a coroutine here, or a response of Ray Serve, which is cancelled if
#: nobody awaits it any more.
AskReplica = Callable[[str, Any], Any]


class ServerMetrics:
    """Metrics of a server, for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        make = partial(Counter, registry=self.registry)
        self.requests = make("skillnet_requests", "answered requests", ["path", "status"])
        self.rows = make("skillnet_rows", "predicted rows", ["task"])
        self.rejected = make("skillnet_rejected_rows", "unusable rows")
        self.retries = make("skillnet_retries", "requests sent again after a replica died")
        self.active = Gauge(
            "skillnet_active_requests", "requests in progress", registry=self.registry
        )
        self.seconds = Histogram(
            "skillnet_request_seconds",
            "seconds from a request to its answer",
            ["path"],
            registry=self.registry,
        )


class ModelGateway:
    """Handlers of the routes.

    Args:
        ask: calls the replicas.
        about: description of the model, see
            :meth:`.model_replica.ModelReplica.describe`. It changes when packages join or leave the
            folder of the model.
        limits: bounds of requests, connections and time.
        lost: exceptions that mean a dead replica.
        full: exceptions that mean that the queues are full.
    """

    def __init__(
        self,
        ask: AskReplica,
        about: dict[str, Any],
        limits: ServerLimits,
        lost: tuple[type[Exception], ...],
        full: tuple[type[Exception], ...] = (),
    ) -> None:
        self._ask_replica, self._limits = ask, limits
        self._about = {key: value for key, value in about.items() if key != "manifest_ns"}
        self._lost, self._full = lost, full
        self._running = FairShare(limits.max_running)
        self._bodies = FairShare(BODIES_IN_MEMORY * limits.max_bytes)
        self.metrics = ServerMetrics()
        #: Newest state of the model's folder that an answer showed; no later answer is older.
        self._manifest_ns: int = about["manifest_ns"]
        self._asking: asyncio.Future[dict[str, Any]] | None = None

    async def health(self, request: Request) -> Response:
        """Answer that the server runs; no token is needed.

        With the token, the answer has the state of the model and of its indexes.
        """
        if not request.scope["state"].get(AUTHORIZED):
            return JSONResponse({"status": "ok"})
        about = await self._read_about()
        return JSONResponse({"status": "ok", **{key: about[key] for key in HEALTH_KEYS}})

    async def list_tasks(self, request: Request) -> Response:
        """Answer with the model, its tasks and the progress of its indexes."""
        return JSONResponse(await self._read_about())

    async def _read_about(self) -> dict[str, Any]:
        """Return the description of the model by a replica; the last known one if it is dead."""
        # One question for all requests that wait: anybody may ask for the health.
        if self._asking is None or self._asking.done():
            asked = self._ask_replica("describe_later", self._manifest_ns)
            self._asking = asyncio.ensure_future(asked)
        with contextlib.suppress(TimeoutError, *self._lost, *self._full):
            async with asyncio.timeout(PROGRESS_PATIENCE_S):
                about = dict(await asyncio.shield(self._asking))
                self._remember(about)
                self._about = about
        return self._about

    def _remember(self, answer: dict[str, Any]) -> None:
        """Take the state of the folder out of an answer, for the replicas of later requests."""
        self._manifest_ns = max(self._manifest_ns, answer.pop("manifest_ns"))

    async def show_metrics(self, request: Request) -> Response:
        """Answer with the metrics in the format of Prometheus."""
        text = generate_latest(self.metrics.registry)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def predict(self, request: Request) -> Response:
        """Answer ``POST /v1/predict``."""
        async with self._hold_body(request) as body:
            asked = await self._parse(read_prediction_request, body, self._limits.max_rows)
            answer = await self._ask(request, "predict", asked)
        for each in answer["predictions"]:
            self.metrics.rows.labels(each["task"]).inc()
        rejected = answer["rejected"]
        self.metrics.rejected.inc(len(rejected))
        if len(rejected) == len(asked.rows):
            raise UserError(f"row 0: {rejected[0]['reason']}; {NONE_USABLE}")
        return JSONResponse(answer)

    async def search(self, request: Request) -> Response:
        """Answer ``POST /v1/search``."""
        async with self._hold_body(request) as body:
            asked = await self._parse(read_search_request, body)
            return JSONResponse(await self._ask(request, "search", asked))

    async def show_search(self, request: Request) -> Response:
        """Answer ``/search`` with a page: inputs, and the results of a query.

        ``GET`` has a text, ``POST`` a form with a file.
        """
        query, task = request.query_params.get("query", ""), request.query_params.get("task")
        tasks: Mapping[str, Sequence[str]] = (await self._read_about())["page"]
        status, problem, headers = 200, "", None
        try:
            if not tasks:
                problem = "This model has no task that the page can show."
            elif request.method == "POST":
                kind = request.headers.get("content-type", "")
                async with self._hold_body(request, FORM) as body:
                    asked = await asyncio.to_thread(read_search_form, kind, body)
                    return HTMLResponse((await self._ask(request, "search", asked))["html"])
            elif query:
                asked = replace(build_search_request(query, task), is_page=True)
                return HTMLResponse((await self._ask(request, "search", asked))["html"])
        except (UserError, HTTPException) as error:
            status, problem, headers = _describe_error(error)
        page = render_search_page(query[:100], [], tasks=tasks, task=task or "", problem=problem)
        return HTMLResponse(page, status, headers)

    async def go_to_search(self, request: Request) -> Response:
        """Answer ``GET /``."""
        return RedirectResponse("/search")

    async def _ask(
        self, request: Request, method: str, asked: PredictionRequest | SearchRequest
    ) -> dict[str, Any]:
        """Return the answer of a replica; a replica that dies is replaced by another one."""
        client, clock = _client_of(request), asyncio.get_running_loop().time
        end = clock() + self._limits.timeout_s
        try:
            async with asyncio.timeout_at(end), self._running.hold(client):
                for _ in range(MAX_TRIES):
                    timed = replace(
                        asked,
                        client=client,
                        seconds=end - clock(),
                        manifest_ns=self._manifest_ns,
                    )
                    try:
                        response = self._ask_replica(method, timed)
                        try:
                            answer: dict[str, Any] = await response
                        except asyncio.CancelledError:
                            # A replica elsewhere learns that nobody waits any more.
                            if not asyncio.iscoroutine(response):
                                response.cancel()
                            raise
                        self._remember(answer)
                        break
                    except self._lost:
                        self.metrics.retries.inc()
                        await asyncio.sleep(RETRY_PAUSE_S)
                else:
                    raise OverloadError("the replicas of the model died repeatedly")
        except TimeoutError:
            raise OverloadError(f"no answer within {self._limits.timeout_s:g} s") from None
        except self._full:
            raise OverloadError("the queues of all replicas are full") from None
        if "unready" in answer:
            raise OverloadError(answer["unready"])
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    async def _parse(self, parse: Callable[..., Parsed], body: bytes, *given: Any) -> Parsed:
        """Parse a body, a long one in a thread."""
        if len(body) <= MAX_SHORT_BYTES:
            return parse(body, *given)
        return await asyncio.to_thread(parse, body, *given)

    @contextlib.asynccontextmanager
    async def _hold_body(
        self, request: Request, expected: str = "application/json"
    ) -> AsyncIterator[bytes]:
        """Read the body of a request, and keep its share of the memory during a block."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # Pages of other sites can send other types than JSON without a question to this server.
        if kind != expected:
            raise HTTPException(415, f"Content-Type: send {expected}")
        size, limit = _declared_length(request), self._limits.max_bytes
        if size > limit:
            reason = f"the request is larger than {limit} bytes; send parts"
            if expected == FORM:
                reason = (
                    f"file: larger than {human_bytes(limit)}. Choose a smaller one, or start the "
                    "server with a larger --max_bytes"
                )
            raise HTTPException(413, reason)
        async with contextlib.AsyncExitStack() as held:
            has_room = False
            try:
                async with asyncio.timeout(self._limits.body_s):
                    await held.enter_async_context(self._bodies.hold(_client_of(request), size))
                    has_room = True
                    body = b"".join([part async for part in request.stream()])
            except TimeoutError:
                if not has_room:
                    raise OverloadError("other requests take the memory for bodies") from None
                raise HTTPException(408, "the request did not arrive in time") from None
            except ClientDisconnect:
                raise HTTPException(
                    400, "the client left before its request was complete"
                ) from None
            yield body


def _client_of(request: Request) -> str:
    return identify_client(request.client.host if request.client else "")


def _declared_length(request: Request) -> int:
    """Return the bytes of a request's body; the parser rejects other values, and chunks."""
    return int(request.headers.get("content-length", "0")[:20])


class RequestGuard:
    """Outermost layer: host, token, number of requests, metrics and errors.

    Args:
        gateway: with limits and metrics.
        application: with the routes.
        token: that requests must have, or None.
        limits: bounds of requests, connections and time.
    """

    def __init__(
        self,
        gateway: ModelGateway,
        application: Callable[..., Awaitable[None]],
        token: str | None,
        limits: ServerLimits,
    ) -> None:
        self._metrics, self._application = gateway.metrics, application
        self._token = token
        self._admitted = FairShare(limits.max_requests)
        self._paths = {route.path for route in build_routes(gateway)}

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer one request of ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._application(scope, receive, send)
            return
        exchange = RequestExchange(scope, receive, send)
        # Unknown paths share a label: clients must not create series without bound.
        path = scope["path"] if scope["path"] in self._paths else "other"
        running: RunningRequest = scope["state"][RUNNING]
        with self._metrics.seconds.labels(path).time():
            running.task = asyncio.current_task()
            try:
                active = self._metrics.active.track_inprogress()
                with active, self._admit(exchange.request, running) as refused:
                    await exchange.run(refused or self._application)
                await exchange.finish()
            except asyncio.CancelledError:
                if not running.is_lost:
                    raise
                exchange.status = CLIENT_LEFT
            finally:
                running.task = None
        self._metrics.requests.labels(path, str(exchange.status)).inc()

    @contextlib.contextmanager
    def _admit(self, request: Request, running: RunningRequest) -> Iterator[Response | None]:
        """Count a request during a block, and return the answer to one that no handler may see."""
        refused = self._refuse(request)
        if refused is not None or request.scope["path"] == "/health":
            given = request.headers.get("authorization")
            request.scope["state"][AUTHORIZED] = is_authorized(self._token, given)
            yield refused
            return
        client = _client_of(request)
        if not self._admitted.take(client):
            error = OverloadError("too many requests are in progress")
            yield build_error(*_describe_error(error))
            return
        running.is_admitted = True
        try:
            yield None
        finally:
            running.is_admitted = False
            self._admitted.give_back(client)

    def _refuse(self, request: Request) -> Response | None:
        """Return the answer to a request that comes from the wrong place or has no token."""
        path, hosts = request.scope["path"], request.headers.getlist("host")
        authority = parse_authority(hosts[0]) if len(hosts) == 1 else None
        if authority is None and hosts:
            return build_error(400, "Host: send one host with an optional port")
        # A page of another site can resolve its own name to loopback, and then read answers.
        if self._token is None and (authority is None or not authority.is_loopback):
            return build_error(403, "Host: this server answers requests to localhost only")
        if path == "/health":
            return None
        if problem := describe_foreign_page(request.headers, authority):
            return build_error(403, problem)
        if not is_authorized(self._token, request.headers.get("authorization")):
            # A browser answers the challenge with a box for user and password.
            challenge = {"WWW-Authenticate": 'Basic realm="skillnet", Bearer'}
            return build_error(401, "Authorization: send Bearer and the token", challenge)
        return None


class RequestExchange:
    """One request and its answer, over the functions of ASGI.

    Args:
        scope: ASGI scope of the request.
        receive: ASGI callable that returns the next message.
        send: ASGI callable that sends a message.
    """

    def __init__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.request = Request(scope, receive)
        self.status = 500
        self._is_answered = False
        self._has_body_ended = not _declared_length(self.request)

    async def run(self, application: Callable[..., Awaitable[None]]) -> None:
        """Run an application until it has answered.

        Args:
            application: with the routes, or an answer.
        """
        # Starlette raises an unexpected error again after its handler has answered.
        with contextlib.suppress(Exception):
            await application(self._scope, self.receive, self.send)

    async def receive(self) -> Any:
        """Return the next message of the client."""
        # The next one would be its end, with which the connection cancels the request.
        if self._has_body_ended:
            return {"type": "http.request", "body": b"", "more_body": False}
        message = await self._receive()
        self._has_body_ended = not message.get("more_body")
        return message

    async def send(self, message: Any) -> None:
        """Send a part of the answer, with the headers of every answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            added = HEADERS if self._has_body_ended else [*HEADERS, (b"connection", b"close")]
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        elif not message.get("more_body"):
            self._is_answered = True
            # :meth:`finish` ends the answer.
            message = {**message, "more_body": not self._has_body_ended}
        await self._send(message)

    async def finish(self) -> None:
        """Read a rejected body for a moment: an answer is lost if its client is still sending."""
        if not self._is_answered or self._has_body_ended:
            return
        size, is_sent = 0, "expect" not in self.request.headers
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_PATIENCE_S):
                while is_sent and not self._has_body_ended and size < MAX_DISCARDED_BYTES:
                    size += len((await self.receive()).get("body", b""))
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def build_application(
    gateway: ModelGateway, token: str | None, limits: ServerLimits
) -> RequestGuard:
    """Return the ASGI application of a server.

    Args:
        gateway: with the handlers.
        token: that requests must have; None on loopback.
        limits: bounds of requests, connections and time.
    """

    async def rejected(request: Request, error: Exception) -> Response:
        return build_error(*_describe_error(error))

    async def unexpected(request: Request, error: Exception) -> Response:
        console.print_warning(f"{request.url.path}: {type(error).__name__}: {first_line(error)}")
        return build_error(500, "internal error; the server's output has the reason")

    handlers: Any = {UserError: rejected, HTTPException: rejected, Exception: unexpected}
    application = Starlette(routes=build_routes(gateway), exception_handlers=handlers)
    return RequestGuard(gateway, application, token, limits)


def build_routes(gateway: ModelGateway) -> list[Route]:
    """Return the routes of a server.

    Args:
        gateway: with the handlers.
    """
    return [
        # The first one that fits answers, and most requests are for this one.
        Route("/v1/predict", gateway.predict, methods=["POST"]),
        Route("/", gateway.go_to_search),
        Route("/search", gateway.show_search, methods=["GET", "POST"]),
        Route("/health", gateway.health),
        Route("/metrics", gateway.show_metrics),
        Route("/v1/tasks", gateway.list_tasks),
        Route("/v1/search", gateway.search, methods=["POST"]),
    ]


def build_error(status: int, message: str, headers: Any = None) -> Response:
    """Return the answer to a rejected request.

    Args:
        status: HTTP status code.
        message: reason and remedy.
        headers: further headers, or None.
    """
    return JSONResponse({"error": message}, status, headers)


def _describe_error(error: Exception) -> tuple[int, str, Any]:
    """Return status, message and headers of the answer to a rejected request."""
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail), error.headers
    return 422, str(error), None
