"""Connections that never finish, in any mixture: the server answers others, and ends them all."""

import contextlib
import select
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from skillnet_serving.server.config import ServerLimits
from tests.helpers.local_server import TOKEN, Service, run_service
from tests.helpers.random_damage import budget
from tests.helpers.stub_model import StubModel
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.fuzz

#: Short deadlines: the server has to end what the tests leave open.
LIMITS = ServerLimits(100_000, 3, 8, 0.4, head_s=0.2, body_s=0.2, taking_s=0.2)
#: Seconds after which a connection that is still open is a failure.
PATIENCE_S = 120.0
#: Seconds between two bytes of a client that sends slowly.
DRIP_S = 0.02

HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
OWN = HEAD + f"Authorization: Bearer {TOKEN}\r\n".encode()
BODY = b'{"rows": [{"text": "a"}]}'
HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
#: What a client sends, and what it then repeats byte by byte.
STAGES: dict[str, tuple[bytes, bytes]] = {
    "nothing": (b"", b""),
    "half a request line": (b"GET /hea", b""),
    "a slow request line": (b"GET /", b"a"),
    "half headers": (HEALTH + b"X-A: b", b""),
    "slow headers": (HEALTH, b"X-A: b\r\n"),
    "a slow header": (HEALTH + b"X: ", b"x"),
    "half a body": (OWN + b"Content-Length: 90000\r\n\r\n" + BODY, b""),
    "a slow body": (OWN + b"Content-Length: 90000\r\n\r\n", b" "),
    "a slow body without a token": (HEAD + b"Content-Length: 90000\r\n\r\n", b" "),
    "chunks without end": (OWN + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
    "chunks and a length": (OWN + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n", b"a"),
    "many header lines": (HEALTH + b"a: b\r\n" * 20_000, b"a: b\r\n"),
    "a huge header": (HEALTH + b"X: " + b"x" * 300_000, b"x"),
    "a huge request line": (b"GET /" + b"a" * 300_000, b"a"),
    "requests in a row": (HEALTH * 2 + b"\r\n" + (HEALTH + b"\r\n") * 50, b"\r\n"),
    "answers that are not read": ((HEALTH + b"\r\n") * 2000, b""),
    "HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", b""),
    "HTTP/1.0 that stays": (b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", b""),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\0"),
    "a websocket": (HEALTH + UPGRADE + b"\r\n", b"\x81"),
    "a body after a question": (OWN + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n", b""),
    "a negative length": (OWN + b"Content-Length: -1\r\n\r\n", b"a"),
    "two lengths": (OWN + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", b"a"),
    "a long length": (OWN + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n", b"a"),
    "more than the length": (OWN + b"Content-Length: 2\r\n\r\n{}" + BODY, b"a"),
    "a request that takes too long": (
        OWN + b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY),
        b"",
    ),
}
ENDINGS = ("stays", "half closed", "gone", "reset")
CLIENTS = st.lists(
    st.tuples(st.sampled_from(sorted(STAGES)) | st.binary(max_size=300), st.sampled_from(ENDINGS)),
    min_size=1,
    max_size=10,
)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with run_service(StubModel(), LIMITS) as running:
        # No request to a replica is answered.
        running.replica.held = {"127.0.0.1"}
        yield running


def open_client(service: Service, stage: str | bytes, ending: str) -> tuple[socket.socket, bytes]:
    """Return the connection of a client, and what it repeats."""
    sent, repeated = STAGES[stage] if isinstance(stage, str) else (stage, stage)
    # A client with a small window; the answers to its requests soon have no place.
    connection = service.connect(window=4096)
    connection.setblocking(False)
    # The server may end the connection while the client still sends; a full buffer ends it too.
    with contextlib.suppress(OSError):
        while sent:
            sent = sent[connection.send(sent) :]
    with contextlib.suppress(OSError):
        if ending == "half closed":
            connection.shutdown(socket.SHUT_WR)
    if ending == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if ending in ("gone", "reset"):
        connection.close()
    return connection, repeated


def has_ended(connection: socket.socket, repeated: bytes) -> bool:
    """Send once more, read all that is there, and return whether the server has ended it."""
    with contextlib.suppress(BlockingIOError, ConnectionError):
        connection.send(repeated)
    try:
        while connection.recv(2**20):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


@given(CLIENTS)
@example([(stage, "stays") for stage in STAGES])
@example([(stage, "half closed") for stage in STAGES])
@example([(stage, "gone") for stage in STAGES])
@example([("a slow header", "stays")] * (LIMITS.max_connections + 50))
@budget(10)
def test_unfinished_connections_stop_nobody_and_are_ended(
    service: Service, clients: list[tuple[str | bytes, str]]
) -> None:
    opened = [open_client(service, *each) for each in clients]
    assert service.ask("/health")[0] == 200
    waiting = [each for each in opened if each[0].fileno() >= 0]
    end = time.monotonic() + PATIENCE_S
    while waiting:
        assert time.monotonic() < end, f"{len(waiting)} connections are still open"
        select.select([], [], [], DRIP_S)
        left = [each for each in waiting if not has_ended(*each)]
        for connection, _ in waiting:
            if all(connection is not each for each, _ in left):
                connection.close()
        waiting = left
    assert service.ask("/health")[0] == 200
    # The work of those who left ends too; one request asks for the metrics.
    wait_until(lambda: "skillnet_active_requests 1.0" in service.ask("/metrics")[1], PATIENCE_S)
    assert 'status="500"' not in service.ask("/metrics")[1]
