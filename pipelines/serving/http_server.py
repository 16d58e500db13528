"""HTTP server in front of the replicas of ``skillnet serve``.

    client ── HTTP ──> :func:`build_application` ── handle ──> replicas of Ray Serve

The server runs in the process of the command, not in Ray Serve's proxy: it rejects a request before
it reads the body, and sends the request of a killed replica to another one. A prediction changes
nothing, so it may run twice.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

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

from pipelines.serving.access_token import is_authorized
from pipelines.serving.request_rows import (
    SearchRequest,
    build_search_request,
    read_prediction_request,
    read_search_form,
    read_search_request,
)
from pipelines.serving.search_page import render_search_page
from skillnet_platform import console
from skillnet_platform.cluster import loopback
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.storage import human_bytes

#: Tries of one request; each follows the death of a replica.
MAX_TRIES = 5
#: Seconds before the next try. Ray Serve needs a moment to notice that a replica is dead.
RETRY_PAUSE_S = 0.2
#: Seconds after which an overloaded server asks clients to come back.
RETRY_AFTER_S = 1
#: Seconds that a client has to send its body.
BODY_PATIENCE_S = 60.0
#: Seconds and bytes of a rejected body that are read and dropped.
DISCARD_PATIENCE_S, MAX_DISCARDED_BYTES = 2.0, 64 * 2**20
RETRY_HEADERS, RETRY_REMEDY = {"Retry-After": str(RETRY_AFTER_S)}, "send the request again"
#: Headers of every answer. A page of another site can neither frame it nor read its query. With
#: no-referrer, browsers would hide the origin of the page's own forms.
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class OverloadError(Exception):
    """The server has too many requests, or no replica answered in time."""


class ModelHandle(Protocol):
    """Replicas of a served model; a deployment handle of Ray Serve."""

    predict: Any
    search: Any
    render_search: Any


@dataclass(frozen=True)
class ServerLimits:
    """Limits of a server.

    Args:
        max_bytes: of the body of a request.
        max_rows: of a prediction request.
        max_requests: that are in progress at the same time.
        timeout_s: seconds for the answer of a request.
    """

    max_bytes: int
    max_rows: int
    max_requests: int
    timeout_s: float


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
        handle: of the replicas.
        about: description of the model, see
            :meth:`pipelines.serving.served_model.ServedModel.describe`.
        limits: of the server.
        lost: exceptions that mean a dead replica.
        full: exceptions that mean that the queues are full.
    """

    def __init__(
        self,
        handle: ModelHandle,
        about: dict[str, Any],
        limits: ServerLimits,
        lost: tuple[type[Exception], ...],
        full: tuple[type[Exception], ...] = (),
    ) -> None:
        self._handle, self._about, self._limits = handle, about, limits
        self._lost, self._full = lost, full
        self.metrics = ServerMetrics()

    async def health(self, request: Request) -> Response:
        """Answer that the server runs; no token is needed."""
        return JSONResponse({"status": "ok"})

    async def list_tasks(self, request: Request) -> Response:
        """Answer with the model and its tasks."""
        return JSONResponse(self._about)

    async def show_metrics(self, request: Request) -> Response:
        """Answer with the metrics in the format of Prometheus."""
        text = generate_latest(self.metrics.registry)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def predict(self, request: Request) -> Response:
        """Answer ``POST /v1/predict``."""
        body = await self._read_body(request)
        asked = await asyncio.to_thread(read_prediction_request, body, self._limits.max_rows)
        answer = await self._ask(self._handle.predict, asked)
        for each in answer["predictions"]:
            self.metrics.rows.labels(each["task"]).inc()
        rejected = answer["rejected"]
        self.metrics.rejected.inc(len(rejected))
        if len(rejected) == len(asked.items):
            first = rejected[0]
            raise UserError(f"row {first['row']}: {first['reason']}; none of the rows is usable")
        return JSONResponse(answer)

    async def search(self, request: Request) -> Response:
        """Answer ``POST /v1/search``."""
        asked = read_search_request(await self._read_body(request))
        return JSONResponse(await self._ask(self._handle.search, asked))

    async def show_search(self, request: Request) -> Response:
        """Answer ``/search`` with a page: inputs, and the results of a query.

        ``GET`` has a text, ``POST`` a form with a file.
        """
        query, task = request.query_params.get("query", ""), request.query_params.get("task")
        tasks: Mapping[str, Sequence[str]] = self._about["search"]
        status, problem, headers = 200, "", {}
        asked = None
        try:
            if not tasks:
                problem = "This model has no task for a search."
            elif request.method == "POST":
                asked = await self._read_form(request)
            elif query:
                asked = build_search_request(query, task)
            if asked is not None:
                return HTMLResponse((await self._ask(self._handle.render_search, asked))["html"])
        except UserError as error:
            status, problem = 422, str(error)
        except HTTPException as error:
            status, problem = error.status_code, str(error.detail)
        except OverloadError as error:
            status, problem, headers = 503, f"{error}; {RETRY_REMEDY}", RETRY_HEADERS
        page = render_search_page(query[:100], [], tasks=tasks, task=task or "", problem=problem)
        return HTMLResponse(page, status, headers)

    async def _read_form(self, request: Request) -> SearchRequest:
        # Pages of other sites can send forms without a question to this server.
        if not _is_own_form(request):
            raise HTTPException(403, "Origin: send the form from the page of this server")
        try:
            body = await self._read_body(request, "multipart/form-data")
        except HTTPException as error:
            if error.status_code == 413:
                limit = human_bytes(self._limits.max_bytes)
                error.detail = (
                    f"file: larger than {limit}. Choose a smaller one, or start the server with a "
                    "larger --max_bytes"
                )
            raise
        return await asyncio.to_thread(read_search_form, request.headers["content-type"], body)

    async def go_to_search(self, request: Request) -> Response:
        """Answer ``GET /``."""
        return RedirectResponse("/search")

    async def _ask(self, method: Any, asked: Any) -> dict[str, Any]:
        """Return the answer of a replica; a replica that dies is replaced by another one."""
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                for _ in range(MAX_TRIES):
                    try:
                        answer: dict[str, Any] = await method.remote(asked)
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
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    async def _read_body(self, request: Request, expected: str = "application/json") -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # Pages of other sites can send other types than JSON without a question to this server.
        if kind != expected:
            raise HTTPException(415, f"Content-Type: send {expected}")
        limit = self._limits.max_bytes
        too_large = HTTPException(413, f"the request is larger than {limit} bytes; send parts")
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > limit:
            await _discard_body(request)
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_PATIENCE_S):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        parts.clear()
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise HTTPException(408, "the request did not arrive in time") from None
        except ClientDisconnect:
            raise HTTPException(400, "the client left before its request was complete") from None
        return b"".join(parts)


async def _discard_body(request: Request) -> None:
    """Read a rejected body for a moment: an answer is lost if its client is still sending."""
    size = 0
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(DISCARD_PATIENCE_S):
            async for part in request.stream():
                size += len(part)
                if size > MAX_DISCARDED_BYTES:
                    return


class RequestGuard:
    """Outermost layer: host, token, number of requests, metrics and errors.

    Args:
        gateway: with limits and metrics.
        application: with the routes.
        token: that requests must have, or None.
        host: interface that the server listens on.
        limits: of the server.
    """

    def __init__(
        self,
        gateway: ModelGateway,
        application: Callable[..., Awaitable[None]],
        token: str | None,
        host: str,
        limits: ServerLimits,
    ) -> None:
        self._metrics, self._application = gateway.metrics, application
        self._token, self._host, self._limits = token, host, limits
        self._active = 0
        self._paths = {route.path for route in build_routes(gateway)}

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer one request of ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._application(scope, receive, send)
            return
        request = Request(scope, receive)
        # Unknown paths share a label: clients must not create series without bound.
        path = scope["path"] if scope["path"] in self._paths else "other"
        begin, status = time.monotonic(), 500

        async def send_noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    *((name.lower().encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            await send(message)

        with self._count_request():
            refused = self._refuse(request)
            if refused is not None:
                await refused(scope, receive, send_noted)
            else:
                # Starlette raises an unexpected error again after its handler has answered.
                with contextlib.suppress(Exception):
                    await self._application(scope, receive, send_noted)
        self._metrics.requests.labels(path, str(status)).inc()
        self._metrics.seconds.labels(path).observe(time.monotonic() - begin)

    @contextlib.contextmanager
    def _count_request(self) -> Any:
        self._active += 1
        self._metrics.active.set(self._active)
        try:
            yield
        finally:
            self._active -= 1
            self._metrics.active.set(self._active)

    def _refuse(self, request: Request) -> Response | None:
        """Return the answer to a request that no handler may see, or None."""
        # A page of another site can resolve its own name to loopback, and then read answers.
        if self._token is None and not _is_local_name(request.headers.get("host", "")):
            return build_error(403, "Host: this server answers requests to localhost only")
        if request.scope["path"] == "/health":
            return None
        if not is_authorized(self._token, request.headers.get("authorization")):
            # A browser answers the challenge with a box for user and password.
            challenge = {"WWW-Authenticate": 'Basic realm="skillnet", Bearer'}
            return build_error(401, "Authorization: send Bearer and the token", challenge)
        if self._active > self._limits.max_requests:
            return answer_overload("too many requests are in progress")
        return None


def build_application(
    gateway: ModelGateway, token: str | None, host: str, limits: ServerLimits
) -> RequestGuard:
    """Return the ASGI application of a server.

    Args:
        gateway: with the handlers.
        token: that requests must have; None on loopback.
        host: interface that the server listens on.
        limits: of the server.
    """

    async def user_error(request: Request, error: Exception) -> Response:
        return build_error(422, str(error))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return build_error(error.status_code, str(error.detail), error.headers)

    async def overload(request: Request, error: Exception) -> Response:
        return answer_overload(str(error))

    async def unexpected(request: Request, error: Exception) -> Response:
        console.print_warning(f"{request.url.path}: {type(error).__name__}: {first_line(error)}")
        return build_error(500, "internal error; the server's output has the reason")

    handlers: Any = {
        UserError: user_error,
        HTTPException: http_error,
        OverloadError: overload,
        Exception: unexpected,
    }
    application = Starlette(routes=build_routes(gateway), exception_handlers=handlers)
    return RequestGuard(gateway, application, token, host, limits)


def build_routes(gateway: ModelGateway) -> list[Route]:
    """Return the routes of a server.

    Args:
        gateway: with the handlers.
    """
    return [
        Route("/", gateway.go_to_search),
        Route("/search", gateway.show_search, methods=["GET", "POST"]),
        Route("/health", gateway.health),
        Route("/metrics", gateway.show_metrics),
        Route("/v1/tasks", gateway.list_tasks),
        Route("/v1/predict", gateway.predict, methods=["POST"]),
        Route("/v1/search", gateway.search, methods=["POST"]),
    ]


def build_error(status: int, message: str, headers: Any = None) -> Response:
    """Return the answer to a rejected request.

    Args:
        status: of HTTP.
        message: reason and remedy.
        headers: further headers, or None.
    """
    return JSONResponse({"error": message}, status, headers)


def answer_overload(reason: str) -> Response:
    """Return the answer of an overloaded server.

    Args:
        reason: of the overload.
    """
    return build_error(503, f"{reason}; {RETRY_REMEDY}", RETRY_HEADERS)


def _is_own_form(request: Request) -> bool:
    """Return whether no browser, or a page of this server, sent a form."""
    site = request.headers.get("sec-fetch-site")
    # Browsers omit this header where a connection is neither encrypted nor local.
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is None or origin.partition("://")[2] == request.headers.get("host")


def _is_local_name(host: str) -> bool:
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    return loopback.is_loopback_host(name.strip("[]"))
