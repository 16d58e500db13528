"""The HTTP server of ``skillnet serve``, with a real model in this process."""

import base64
import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipelines.data.transforms.decode_guard import WorkBudget
from skillnet_platform.errors import UserError
from skillnet_serving.retrieval.corpus_search import CorpusSearch
from skillnet_serving.server.admission import is_authorized, read_token
from skillnet_serving.server.config import ServeConfig, ServerLimits
from skillnet_serving.server.http_server import ModelGateway, build_routes
from skillnet_serving.server.served_model import ServedModel
from tests.helpers.file_forms import draw_png, encode_form
from tests.helpers.local_server import TOKEN, Service, run_service
from tests.helpers.served_place import ServedPlace
from tests.helpers.stub_model import StubModel

LIMITS = ServerLimits(max_bytes=200_000, max_rows=3, max_requests=4, timeout_s=30.0)


@pytest.fixture(scope="module")
def model(place: ServedPlace) -> ServedModel:
    made = ServedModel(ServeConfig(str(place.bundle), str(place.data)))
    made.open_indexes()
    return made


@pytest.fixture(scope="module")
def service(model: ServedModel) -> Iterator[Service]:
    with run_service(model, LIMITS) as running:
        yield running


def test_requests_that_run_together_get_their_own_answers(model: ServedModel) -> None:
    from pipelines.serving.inputs import parse_request_row
    from skillnet_serving.server.request_rows import PredictionRequest

    texts = [["文学研究"], ["历史概论", "  "], ["医药手册"]]
    requests = [
        PredictionRequest([parse_request_row({"text": t}, n) for n, t in enumerate(each)], top)
        for top, each in enumerate(texts, 1)
    ]
    read = [model.read_rows(each, WorkBudget(60)) for each in requests]
    together = model.predict(read)
    assert [each["rejected"] for each in together] == [
        [],
        [{"row": 1, "reason": "the text is empty"}],
        [],
    ]
    for request, answer in zip(read, together, strict=True):
        (alone,) = model.predict([request])
        assert [p["answer"] for p in alone["predictions"]] == [
            p["answer"] for p in answer["predictions"]
        ]
        assert all(len(p["alternatives"]) == request.top for p in answer["predictions"])


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 422, "the request is not JSON"),
        (b"[" * 60_000, 422, "the request is not JSON"),
        (b"[" * 100_000, 422, "outside of its texts"),
        (b"\xff", 422, "not UTF-8"),
        (b"[]", 422, "no JSON object"),
        (b'{"rows": []}', 422, "rows: expected a list"),
        (b'{"row": [{"text": "a"}]}', 422, "unknown key 'row'"),
        (b'{"rows": [{"text": "a"}], "top": 0}', 422, "top: expected a number"),
        (b'{"rows": [{"file": "not base64!"}]}', 422, "row 0: file is not base64"),
        (b'{"rows": [{"text": "a", "tusk": "b"}]}', 422, "row 0: unknown key 'tusk'"),
        (b'{"rows": [{"text": "a", "task": "none"}]}', 422, "row 0: "),
        (b'{"rows": [{"text": "\\ud800"}]}', 422, "the request is not JSON"),
        (b'{"rows": [{"text": "a"}, {"text": "b"}, {"text": "c"}, {"text": "d"}]}', 422, "4 rows"),
        (b'{"rows": [{"text": "' + b"a" * 200_000 + b'"}]}', 413, "larger than 200000 bytes"),
    ],
)
def test_a_bad_request_gets_one_clear_message(service, body, status, message):
    found, text = service.error("/v1/predict", data=body)
    assert found == status
    assert message in text


def test_an_answer_has_the_embedding_if_it_is_asked_for(service: Service) -> None:
    row = {"file": base64.b64encode(draw_png()).decode(), "name": "a.png"}
    query = {"text": "红色的心", "task": "text_to_image"}
    for asked in (False, True):
        document = {"rows": [row, query, {"text": "文学研究"}], "embeddings": asked}
        status, body, _ = service.ask("/v1/predict", document)
        assert status == 200
        image, text, title = json.loads(body)["predictions"]
        assert ("embedding" in image) == asked
        assert ("embedding" in title) == asked
        # The embedding of a query is its answer.
        assert not text["answer"]
        assert text["embedding"]
    assert "true or false" in service.error("/v1/predict", {"rows": [row], "embeddings": 1})[1]


def test_a_search_before_its_index_is_ready_gets_the_progress(place, tmp_path, monkeypatch):
    monkeypatch.setenv("SKILLNET_HOME", str(tmp_path))
    model = ServedModel(ServeConfig(str(place.bundle), str(place.data)))
    seen: list[dict[str, Any]] = []

    def look(rows: int) -> None:
        _, body, _ = service.ask("/health")
        seen.append(json.loads(body))
        status, text, headers = service.ask("/v1/search", {"query": "红色的心"})
        assert (status, headers["retry-after"]) == (503, "1")
        found = seen[-1]["indexes"]["text"]["text_to_image"]
        assert f"{found['embedded']:,} of {found['rows']:,} rows of drawings" in text
        assert service.ask("/search?query=a")[0] == 503
        assert service.ask("/v1/predict", {"rows": [{"text": "文学研究"}]})[0] == 200

    with run_service(model, LIMITS) as service:
        # Called after each batch, in the thread that embeds.
        model.searches["text"]["text_to_image"].open_index(on_rows=look)
        assert seen[0]["indexes"]["text"]["text_to_image"]["embedded"] > 0
        assert not seen[-1]["ready"]
        assert service.ask("/v1/search", {"query": "红色的心"})[0] == 200
        model.open_indexes()
        assert json.loads(service.ask("/health")[1])["ready"]
        # Others learn that the server runs, and nothing about its corpora.
        assert json.loads(service.ask("/health", Authorization="")[1]) == {"status": "ok"}
        progress = json.loads(service.ask("/v1/tasks")[1])["indexes"]["text"]["text_to_image"]
        assert progress["embedded"] == progress["rows"]


def test_an_index_that_cannot_be_built_stops_nothing_else(place, tmp_path, monkeypatch):
    monkeypatch.setenv("SKILLNET_HOME", str(tmp_path))
    model = ServedModel(ServeConfig(str(place.bundle), str(place.data)))
    embed = CorpusSearch.embed_rows

    def fail(search: CorpusSearch, *given: Any) -> Any:
        if search.task == "text_to_image":
            raise OSError(28, "No space left on device")
        return embed(search, *given)

    monkeypatch.setattr(CorpusSearch, "embed_rows", fail)
    model.open_indexes()
    with run_service(model, LIMITS) as service:
        status, text, _ = service.ask("/v1/search", {"query": "红色的心"})
        assert (status, "No space left on device" in text) == (503, True)
        found = service.ask("/v1/search", {"query": "红色的心", "task": "text_to_video"})
        assert found[0] == 200


def test_no_request_changes_the_model(service: Service) -> None:
    routes = build_routes(ModelGateway(StubModel(), StubModel().describe(), LIMITS, ()))
    methods = {(route.path, each) for route in routes for each in route.methods or ()}
    assert {path for path, each in methods if each not in ("GET", "HEAD")} == {
        "/search",
        "/v1/predict",
        "/v1/search",
    }
    for method in ("POST", "PUT", "DELETE"):
        for path in ("/v1/packages", "/v1/tasks", "/v1/skills", "/v1/tasks/text_to_image"):
            body = b'{"package": "shapes.skill"}'
            sent = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            sent += f"Authorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n"
            status = service.send(sent.encode() + body).split()[1]
            assert status in (b"404", b"405")


def test_other_content_types_and_paths_are_rejected(service: Service) -> None:
    body = b'{"rows": [{"text": "a"}]}'
    found = service.error("/v1/predict", data=body, **{"Content-Type": "text/plain"})
    assert found[0] == 415
    assert service.error("/v1/none")[0] == 404
    assert service.error("/v1/predict")[0] == 405


def test_a_token_is_required_everywhere_but_for_health(service: Service) -> None:
    assert service.ask("/health", Authorization="")[0] == 200
    for path in ("/metrics", "/search", "/v1/tasks", "/none"):
        status, body, headers = service.ask(path, Authorization="Bearer wrong-horse-battery")
        assert (status, "token" in body) == (401, True)
        assert "Basic" in headers["www-authenticate"]
    basic = base64.b64encode(f"any:{TOKEN}".encode()).decode()
    assert service.ask("/search", Authorization=f"Basic {basic}")[0] == 200


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        (f"Bearer {TOKEN}", True),
        (f"bearer  {TOKEN} ", True),
        (TOKEN, False),
        ("Bearer ", False),
        (f"Bearer {TOKEN}x", False),
        ("Basic !!", False),
        ("Basic 5Lit", False),
        (None, False),
    ],
)
def test_only_the_exact_token_is_accepted(header: str | None, accepted: bool) -> None:
    assert is_authorized(TOKEN, header) is accepted


def test_other_interfaces_need_a_private_token(tmp_path, monkeypatch):
    monkeypatch.delenv("SKILLNET_SERVE_TOKEN", raising=False)
    assert read_token(None, "127.0.0.1") is None
    for host in ("0.0.0.0", "::", "10.0.0.5", "model.example"):
        with pytest.raises(UserError, match="Give --token_file"):
            read_token(None, host)
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        read_token(str(path), "0.0.0.0")
    path.chmod(0o600)
    assert read_token(str(path), "0.0.0.0") == TOKEN
    monkeypatch.setenv("SKILLNET_SERVE_TOKEN", "short")
    with pytest.raises(UserError, match="16 to 4096 ASCII characters"):
        read_token(None, "127.0.0.1")


@pytest.fixture(scope="module")
def open_service(model: ServedModel) -> Iterator[Service]:
    with run_service(model, LIMITS, token=None) as running:
        yield running


def get(target: str, *headers: str, version: str = "1.1") -> bytes:
    return "\r\n".join(
        [f"GET {target} HTTP/{version}", *headers, "Connection: close", "", ""]
    ).encode()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    ("hosts", "statuses"),
    [
        (["localhost:8080", "127.0.0.1", "[::1]:8080", "LocalHost", "127.9.9.9:1"], {200}),
        (
            ["evil.example:8080", "10.0.0.5", "localhost.evil.example", "0x7f.1", "2130706433"],
            {403},
        ),
        (["127.0.0.1.evil.example", "[2001:db8::1]", "localhost1", "127.0.0.1.1"], {403}),
        (["localhost:80@evil.com", "localhost@evil.com", "evil.com@localhost", ""], {400}),
        (["localhost.", "127.0.0.1.", "localhost:", "localhost:0", "localhost:80:80"], {400}),
        (["localhost:99999", "localhost:8o", "[::1", "::1", "[::1]a", "[127.0.0.1]"], {400}),
        (["localhost, evil.com", "local host", "%6cocalhost", "localhost/", "localhost#"], {400}),
        (["localhost\r\nHost: evil.com", "localhost\r\nHost: localhost"], {400}),
    ],
)
def test_a_page_of_another_site_cannot_use_a_server_without_a_token(open_service, hosts, statuses):
    answers = {host: open_service.send(get("/health", f"Host: {host}")) for host in hosts}
    assert {host: status_of(each) for host, each in answers.items() if status_of(each) not in
            statuses} == {}  # fmt: skip


def test_a_request_names_its_host_in_one_place(open_service: Service, service: Service) -> None:
    for running in (open_service, service):
        for target in ("http://evil.example/health", "http://localhost/health", "*", "//a@b"):
            assert status_of(running.send(get(target, "Host: localhost"))) in (400, 401, 404)
        assert status_of(running.send(get("/health"))) == 400
    assert status_of(open_service.send(get("/health", version="1.0"))) == 403
    assert status_of(service.send(get("/health", version="1.0"))) == 200
    assert status_of(service.send(get("/health", "Host: model.example"))) == 200
    assert status_of(service.send(get("/health", "Host: a@model.example"))) == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (["Sec-Fetch-Site: cross-site"], 403),
        (["Sec-Fetch-Site: same-site"], 403),
        (["Sec-Fetch-Site: Same-Origin"], 403),
        (["Sec-Fetch-Site: "], 403),
        (["Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: cross-site"], 403),
        (["Sec-Fetch-Site: same-origin", "Origin: http://evil.example"], 403),
        (["Origin: null"], 403),
        (["Origin: http://localhost@evil.example"], 403),
        (["Origin: http://localhost.evil.example"], 403),
        (["Origin: http://localhost:81"], 403),
        (["Origin: file://localhost"], 403),
        (["Origin: http://localhost, http://evil.example"], 403),
        (["Origin: http://LOCALHOST:80", "Sec-Fetch-Site: same-origin"], 200),
        (["Origin: http://localhost"], 200),
        (["Sec-Fetch-Site: none"], 200),
        ([], 200),
    ],
)
@pytest.mark.parametrize("path", ["/search?query=a", "/v1/tasks", "/metrics"])
def test_a_page_of_another_site_gets_no_answer(open_service, path, headers, status):
    asked = len(open_service.replica.asked)
    assert status_of(open_service.send(get(path, "Host: localhost", *headers))) == status
    assert status_of(open_service.send(get("/health", "Host: localhost", *headers))) == 200
    assert (len(open_service.replica.asked) > asked) == (status == 200 and "search" in path)


def test_paths_that_clients_invent_share_one_series(service: Service) -> None:
    for path in ("/none-1", "/v1/none-2", "/health/none-3"):
        assert service.ask(path)[0] == 404
    assert service.ask("/none-4", Authorization="")[0] == 401
    metrics = service.ask("/metrics")[1]
    assert "none-" not in metrics
    found = {
        line.split('path="')[1].split('"')[0] for line in metrics.splitlines() if 'path="' in line
    }
    assert "other" in found
    assert found <= {
        "other",
        "/",
        "/search",
        "/health",
        "/metrics",
        "/v1/tasks",
        "/v1/predict",
        "/v1/search",
    }


def test_the_search_page_has_an_input_box_and_escapes_everything(service: Service) -> None:
    status, page, _ = service.ask("/search")
    assert status == 200
    assert '<input name="query"' in page
    hostile = urllib.request.quote("<script>alert(1)</script>\"'红色")
    status, page, _ = service.ask(f"/search?query={hostile}&task=text_to_image")
    assert status == 200
    assert "<script" not in page
    assert page.count("<li>") == 12
    assert "data:image/png;base64," in page
    assert "<option selected>text_to_image" in page
    status, page, _ = service.ask("/search?query=a&task=%3Cb%3E")
    assert status == 422
    assert "&lt;b&gt;" in page


def send_form(service: Service, content: bytes, name: str, **headers: str) -> tuple[int, str]:
    """Send a file as the search page does; return status and page."""
    body, kind = encode_form(content, name)
    status, page, _ = service.ask("/search", data=body, **{"Content-Type": kind, **headers})
    return status, page


def test_the_search_page_takes_a_file(service: Service) -> None:
    assert '<input name="file" type="file" required accept=' in service.ask("/search")[1]
    status, page = send_form(service, draw_png(), "a<script>.png")
    assert (status, page.count("<li>")) == (200, 12)
    assert "<script" not in page
    assert "<dt>task</dt><dd>text_to_image</dd>" in page
    assert 'alt="the image of a&lt;script&gt;.png as the model reads it"' in page
    # The next file may have another type.
    assert page.count("selected") == 1
    status, page = send_form(service, b"def add(a, b):\n    return a + b\n", "a.py")
    assert (status, "return a + b" in page.partition("<figcaption>")[0]) == (200, True)


@pytest.mark.parametrize(
    ("content", "name", "status", "message"),
    [
        (b"x", "a.bin", 422, "a.bin: unknown file type"),
        (b"\x89PNG broken", "b.png", 422, "b.png: "),
        (b"", "c.png", 422, "file: no file, or an empty one"),
        (b"\x89PNG" * 60_000, "d.png", 413, "file: larger than "),
    ],
    ids=["type", "damaged", "empty", "large"],
)
def test_a_wrong_file_of_the_search_page_has_one_message(service, content, name, status, message):
    found, page = send_form(service, content, name)
    assert found == status
    assert page.count('<p role="alert">') == 1
    assert f'<p role="alert">{message}' in page
    assert 'type="file"' in page


def test_a_page_of_another_site_cannot_send_a_file(service: Service) -> None:
    for header, value, status in (
        ("Sec-Fetch-Site", "cross-site", 403),
        ("Sec-Fetch-Site", "same-site", 403),
        ("Sec-Fetch-Site", "same-origin", 200),
        ("Origin", "http://evil.example", 403),
        ("Origin", "null", 403),
        ("Origin", service.url, 200),
    ):
        found = send_form(service, draw_png(), "a.png", **{header: value})[0]
        assert found == status, (header, value)


def test_a_damaged_form_has_a_message(service: Service) -> None:
    for kind, body in (
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=a", b"--a\r\nbroken"),
        ("multipart/form-data; boundary=a", b"--a\r\n" + b"y" * 190_000),
    ):
        status, page, _ = service.ask("/search", data=body, **{"Content-Type": kind})
        assert (status, page.count('<p role="alert">')) == (422, 1)
    assert service.ask("/search", data=b"{}")[0] == 415


def test_search_answers_as_json(service: Service) -> None:
    status, body, headers = service.ask("/v1/search", {"query": "红色的方块", "top": 3})
    answer = json.loads(body)
    assert (status, len(answer["hits"]), answer["task"]) == (200, 3, "text_to_image")
    assert headers["x-content-type-options"] == "nosniff"
    assert service.error("/v1/search", {"query": "a", "task": "text_to_imag"})[1].endswith(
        "did you mean 'text_to_image'?"
    )
    file = base64.b64encode(draw_png()).decode()
    # The candidate tower reads the picture, so captions are ranked.
    asked = {"file": file, "name": "a.png", "top": 2}
    status, body, _ = service.ask("/v1/search", asked)
    answer = json.loads(body)
    assert (status, len(answer["hits"]), answer["task"]) == (200, 2, "text_to_image")
    assert service.error("/v1/search", {**asked, "task": "text_to_code"}) == (
        422,
        "task: 'text_to_code' ranks no rows for image; did you mean 'text_to_image'?",
    )
    assert service.error("/v1/search", {"query": "a", **asked})[1].startswith("give either query")
    assert service.error("/v1/search", {"file": "?", "name": "a.png"})[1].endswith("not base64")
    broken = base64.b64encode(b"\x89PNG broken").decode()
    assert service.error("/v1/search", {"file": broken, "name": "b.png"})[0] == 422
    assert "1001 characters" in service.error("/v1/search", {"query": "a" * 1001})[1]


def test_a_request_survives_the_death_of_replicas(service: Service) -> None:
    service.replica.deaths, before = 2, len(service.replica.asked)
    assert service.ask("/v1/predict", {"rows": [{"text": "文学"}]})[0] == 200
    assert len(service.replica.asked) - before == 3
    service.replica.deaths = 100
    status, _, headers = service.ask("/v1/predict", {"rows": [{"text": "文学"}]})
    service.replica.deaths = 0
    assert (status, headers["retry-after"]) == (503, "1")
    assert "skillnet_retries_total 7.0" in service.ask("/metrics")[1]


def test_an_overloaded_server_tells_clients_to_come_back(service: Service) -> None:
    service.replica.pause_s = 1.0
    with ThreadPoolExecutor(12) as pool:
        asked = [
            pool.submit(service.ask, "/v1/predict", {"rows": [{"text": "文学"}]}) for _ in range(12)
        ]
        found = [each.result() for each in asked]
    service.replica.pause_s = 0.0
    assert {status for status, _, _ in found} == {200, 503}
    assert all(headers["retry-after"] == "1" for status, _, headers in found if status == 503)
    metrics = service.ask("/metrics")[1]
    assert 'skillnet_requests_total{path="/v1/predict",status="503"}' in metrics
    assert "skillnet_active_requests 1.0" in metrics
