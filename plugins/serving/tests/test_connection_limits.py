"""Limits of the server that hold before the token, and between clients that have it."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from skillnet_serving.server.admission import MAX_HEAD_BYTES
from skillnet_serving.server.config import ServerLimits
from tests.helpers.local_server import TOKEN, Service, read_to_end, run_service
from tests.helpers.stub_model import StubModel
from tests.helpers.waiting import wait_until

#: Seconds that no wait of these tests takes.
PATIENCE_S = 60.0
#: Deadlines that no test reaches, so that only the tested limit acts.
LIMITS = ServerLimits(100_000, 3, 4, 600.0, head_s=600.0, body_s=600.0, taking_s=600.0)
BODY = b'{"rows": [{"text": "a"}]}'


@pytest.fixture
def service() -> Iterator[Service]:
    with run_service(StubModel(), LIMITS) as running:
        yield running


def post(length: int | None = None, body: bytes = b"", token: str = TOKEN, more: str = "") -> bytes:
    declared = len(body) if length is None else length
    head = (
        f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {declared}\r\n{more}\r\n"
    )
    return head.encode() + body


def status_of(connection: socket.socket) -> int:
    return int(read_to_end(connection).split(b" ", 2)[1])


def first_status(connection: socket.socket) -> int:
    """Return the status of the first answer, while the connection is open."""
    found = b""
    while b"\r\n\r\n" not in found:
        part = connection.recv(1000)
        assert part, "the server ended the connection"
        found += part
    return int(found.split(b" ", 2)[1])


def test_a_declared_length_beyond_the_limit_is_refused_before_the_body(service: Service) -> None:
    # No byte of the body is sent, and the deadline of bodies is ten minutes away.
    for length in (LIMITS.max_bytes + 1, 10**9, 10**19):
        with service.connect(post(length)) as connection:
            assert first_status(connection) == 413
    with service.connect(post(10**9, more="Expect: 100-continue\r\n")) as connection:
        assert first_status(connection) == 413


def test_the_token_is_compared_before_the_body(service: Service) -> None:
    for more in ("", "Expect: 100-continue\r\n"):
        with service.connect(post(90_000, token="wrong-horse-battery", more=more)) as connection:
            assert first_status(connection) == 401
    # A client that sends its body all the same can read the answer.
    body = b" " * 90_000
    with service.connect(post(body=body, token="wrong-horse-battery")) as connection:
        assert status_of(connection) == 401


@pytest.mark.parametrize("token", [TOKEN, "wrong-horse-battery"])
def test_a_body_in_chunks_is_refused_unread(service: Service, token: str) -> None:
    head = post(token=token).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    for body in (b"", b"1\r\na\r\n" * 1000, b"0\r\n\r\n"):
        assert service.send(head + body).startswith(b"HTTP/1.1 411 ")


@pytest.mark.parametrize(
    "start",
    [b"GET /", b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"\r\n" * 20_000, b"GET / HTTP/1.1\r\n" * 9],
    ids=["target", "header", "blank", "garbage"],
)
def test_a_head_without_end_is_cut_off(service: Service, start: bytes) -> None:
    with service.connect(start) as connection:
        sent = 0
        # The server ends the connection long before a client has sent this.
        with pytest.raises(ConnectionError):
            while sent < 100 * 2**20:
                sent += connection.send(b"a" * MAX_HEAD_BYTES)
    lines = b"".join(b"a%d: b\r\n" % number for number in range(10_000))
    assert service.send(b"GET /health HTTP/1.1\r\nHost: a\r\n" + lines)[9:12] in (b"431", b"")
    assert service.ask("/health")[0] == 200


def test_a_websocket_is_answered_as_any_request(service: Service) -> None:
    upgrade = (
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    for path, status in ((b"/health", 200), (b"/search", 401), (b"/none", 401)):
        with service.connect(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n" + upgrade) as connection:
            assert first_status(connection) == status


def test_unfinished_connections_leave_room_for_others(service: Service) -> None:
    service.replica.held = {"127.0.0.1"}
    with ThreadPoolExecutor(1) as pool, service.connect() as oldest:
        answer = pool.submit(service.ask, "/v1/predict", data=BODY)
        wait_until(lambda: len(service.replica.asked) == 1, PATIENCE_S)
        idle = [service.connect(b"GET") for _ in range(LIMITS.max_connections + 100)]
        assert service.ask("/health")[0] == 200
        # The oldest one made room.
        assert read_to_end(oldest) == b""
        for each in idle:
            each.close()
        # A request in progress stays.
        service.replica.held = set()
        assert answer.result()[0] == 200


def test_one_client_takes_half_of_the_memory_for_bodies() -> None:
    ask = post(LIMITS.max_bytes, more="Expect: 100-continue\r\n")
    with run_service(StubModel(), replace(LIMITS, max_requests=40)) as service:
        senders = [service.connect(ask) for _ in range(4)]
        # Four bodies may be in memory, two of one client.
        assert [first_status(each) for each in senders[:2]] == [100, 100]
        assert service.ask("/health")[0] == 200
        for each in senders[2:]:
            each.setblocking(False)
            with pytest.raises(BlockingIOError):
                each.recv(1)
        # The next one is read when the first one is gone.
        senders[0].close()
        senders[2].setblocking(True)
        assert first_status(senders[2]) == 100
        for each in senders:
            each.close()


def test_one_client_cannot_take_the_place_of_another(service: Service) -> None:
    service.replica.held = {"127.0.0.1"}
    greedy = [service.connect(post(body=BODY)) for _ in range(3)]
    wait_until(lambda: len(service.replica.asked) == 2, PATIENCE_S)
    with socket.socket() as other:
        other.bind(("127.0.0.2", 0))
        other.connect(greedy[0].getpeername())
        other.sendall(post(body=BODY))
        assert first_status(other) == 200
    assert first_status(greedy[2]) == 503
    service.replica.held = set()
    assert [first_status(each) for each in greedy[:2]] == [200, 200]
    for each in greedy:
        each.close()


def test_work_stops_when_its_client_is_gone(service: Service) -> None:
    service.replica.held = {"127.0.0.1"}
    sent = service.connect(post(body=BODY))
    wait_until(lambda: len(service.replica.asked) == 1, PATIENCE_S)
    assert service.replica.cancelled == []
    sent.close()
    wait_until(lambda: service.replica.cancelled == service.replica.asked, PATIENCE_S)
    # Its place is free again.
    service.replica.held = set()
    assert service.ask("/v1/predict", data=BODY)[0] == 200
    assert 'status="499"' in service.ask("/metrics")[1]


def test_a_request_tells_the_replica_how_much_time_is_left(service: Service) -> None:
    assert service.ask("/v1/predict", data=BODY)[0] == 200
    (asked,) = service.replica.asked
    assert asked.client == "127.0.0.1"
    assert 0 < asked.seconds <= LIMITS.timeout_s


def test_pipelined_requests_are_answered_in_order(service: Service) -> None:
    asked = [b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", post(body=BODY)] * 2
    last = b"GET /none HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    found = service.send(b"".join(asked) + last)
    assert [part[:3] for part in found.split(b"HTTP/1.1 ")[1:]] == [b"200"] * 4 + [b"401"]


def test_an_answer_of_many_parts_arrives_whole(service: Service) -> None:
    rows: list[Any] = [{"text": "a" * 30_000}] * 3
    status, body, _ = service.ask("/v1/predict", data=json.dumps({"rows": rows}).encode())
    assert (status, len(json.loads(body)["predictions"])) == (200, 3)


@pytest.mark.parametrize("damaged", [b"no request\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n"])
def test_an_answer_is_whole_although_damage_follows_its_request(
    service: Service, damaged: bytes
) -> None:
    service.replica.held = {"127.0.0.1"}
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(service.send, post(body=BODY) + damaged + post(body=BODY))
        wait_until(lambda: len(service.replica.asked) == 1, PATIENCE_S)
        service.replica.held = set()
        head, _, body = found.result().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert len(json.loads(body)["predictions"]) == 1
    assert len(service.replica.asked) == 1


def test_requests_that_wait_are_parsed_one_after_the_other(service: Service) -> None:
    service.replica.held = {"127.0.0.1"}
    bodies = [json.dumps({"rows": [{"text": "a" * 40_000}], "top": 1 + n}) for n in range(4)]
    with ThreadPoolExecutor(1) as pool:
        last = post(body=bodies[3].encode(), more="Connection: close\r\n")
        sent = b"".join(post(body=each.encode()) for each in bodies[:3]) + last
        found = pool.submit(service.send, sent)
        wait_until(lambda: len(service.replica.asked) == 1, PATIENCE_S)
        assert service.ask("/health")[0] == 200
        assert len(service.replica.asked) == 1
        service.replica.held = set()
        assert found.result().count(b"HTTP/1.1 200 ") == 4
    assert [each.top for each in service.replica.asked] == [1, 2, 3, 4]


def test_a_client_cannot_send_on_while_its_requests_wait(service: Service) -> None:
    service.replica.held = {"127.0.0.1"}
    with service.connect(post(body=BODY) * 2) as connection:
        wait_until(lambda: len(service.replica.asked) == 1, PATIENCE_S)
        connection.settimeout(2)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 200 * 2**20:
                sent += connection.send(b"a" * 2**16)
    service.replica.held = set()


def test_all_requests_of_a_connection_end_with_it(service: Service) -> None:
    service.replica.held = {"127.0.0.1"}
    sent = service.connect(post(body=BODY) * 3)
    wait_until(lambda: len(service.replica.asked) == 1, PATIENCE_S)
    sent.close()
    wait_until(lambda: len(service.replica.cancelled) == 1, PATIENCE_S)
    service.replica.held = set()
    assert service.ask("/v1/predict", data=BODY)[0] == 200
    assert len(service.replica.asked) == 2


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/2.0\r\nHost: a",
        b"GET /health HTTP/0.9\r\nHost: a",
        b"CONNECT a:1 HTTP/1.1\r\nHost: a:1",
        b"GET /health HTTP/1.1\r\nHost : a",
        b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2",
        b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: -1",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: a\x00b",
        b"GET /\xff HTTP/1.1\r\nHost: a",
    ],
)
def test_what_two_servers_could_read_in_two_ways_is_refused(service: Service, head: bytes) -> None:
    found = service.send(head + b"\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 400 ")
    assert "error" in json.loads(found.partition(b"\r\n\r\n")[2])
