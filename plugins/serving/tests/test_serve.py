"""``skillnet serve`` in one process, and on Ray Serve, where requests survive a dead replica."""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.serving import kill_replica
from pipelines.skills import drop_packages, join_packages
from skillnet.model import SkillNet
from skillnet_serving.serve import build_server, open_model
from skillnet_serving.server.config import ServeConfig
from tests.helpers.file_forms import draw_png, encode_form
from tests.helpers.hostile_corpora import SLOW_SVG
from tests.helpers.ports import free_port
from tests.helpers.processes import kill_family
from tests.helpers.readable_corpora import config, write_corpora
from tests.helpers.served_place import ServedPlace, pack_shapes
from tests.helpers.waiting import wait_for_answer, wait_until

pytestmark = pytest.mark.integration

CLIENTS, REQUESTS = 8, 12


@pytest.fixture(scope="module")
def model(place: ServedPlace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(place.bundle, tmp_path_factory.mktemp("served") / "model"))


@pytest.fixture(scope="module")
def url(model: Path, ray_session: Any) -> Iterator[str]:
    options = ServeConfig(str(model), port=free_port(), replicas=2, cpus=0.5, search=False)
    with open_model(options) as (ask, about):
        server = build_server(options, ask, about, None)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_until(lambda: server.started, 60, pause=0.01)
        yield f"http://127.0.0.1:{options.port}"
        server.should_exit = True
        thread.join(timeout=300)


def test_no_request_is_lost_when_a_replica_is_killed(url: str) -> None:
    answered = threading.Semaphore(0)

    def send(client: int) -> list[int]:
        found = []
        for _ in range(REQUESTS):
            found.append(len(predict(url, f"文学研究{client}")))
            answered.release()
        return found

    with ThreadPoolExecutor(CLIENTS) as pool:
        sent = [pool.submit(send, client) for client in range(CLIENTS)]
        for _ in range(CLIENTS):
            answered.acquire()
        kill_replica(os.getpid())
        assert [each.result() for each in sent] == [[1] * REQUESTS] * CLIENTS


def test_replicas_take_packages_together(url, place, model, tmp_path):
    package = pack_shapes(place, tmp_path)
    picture = {"file": base64.b64encode(draw_png()).decode(), "name": "a.png", "task": "shape"}
    expected, is_over = rank_classes(url), threading.Event()

    def send() -> int:
        count = 0
        while not is_over.is_set():
            # A batch of other requests may round the last bit of a score differently.
            assert rank_classes(url) == pytest.approx(expected, rel=1e-5)
            count += 1
        return count

    def read_tasks() -> Any:
        with urllib.request.urlopen(f"{url}/v1/tasks", timeout=60) as answer:
            return json.loads(answer.read())["tasks"]

    with ThreadPoolExecutor(CLIENTS) as pool:
        sent = [pool.submit(send) for _ in range(CLIENTS)]
        assert join_packages([str(package), "--to", str(model)]) == 0
        wait_until(lambda: "shape" in read_tasks(), 120, pause=0.05)
        # From then on every replica answers, whichever gets the request.
        found = [ask(url, picture)["predictions"][0]["task"] for _ in range(REQUESTS)]
        assert found == ["shape"] * REQUESTS
        assert drop_packages(["shapes", "--from", str(model)]) == 0
        wait_until(lambda: "shape" not in read_tasks(), 120, pause=0.05)
        for _ in range(REQUESTS):
            with pytest.raises(urllib.error.HTTPError, match="422"):
                ask(url, picture)
        is_over.set()
        assert min(each.result() for each in sent) > 0


def test_one_replica_needs_no_ray_and_ends_with_its_decoders(tmp_path: Path) -> None:
    data = write_corpora(tmp_path / "corpora")
    SkillNet(config()).save_pretrained(tmp_path / "model")
    port = free_port()
    words = ["--model", str(tmp_path / "model"), "--data", str(data), "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "skillnet_serving.serve", *words],
        env={**os.environ, "SKILLNET_HOME": str(tmp_path / "runs")},
    )
    try:
        wait_for_answer(f"http://127.0.0.1:{port}/health", 300, process=server)
        predict(f"http://127.0.0.1:{port}", "文学研究")
        wait_until(lambda: has_indexes(port), 300, pause=0.2)
        page = search_by_file(f"http://127.0.0.1:{port}", draw_png(), "circle.png")
        assert "<dt>task</dt><dd>text_to_image</dd>" in page
        assert page.count("<li>") == 12
        leave_a_slow_file(port, server.pid)
        family = psutil.Process(server.pid).children(recursive=True)
        assert not [each for each in family if "raylet" in command_of(each)]
        server.terminate()
        server.wait(timeout=120)
        assert not psutil.wait_procs(family, timeout=300)[1]
    finally:
        kill_family(server)


def command_of(process: psutil.Process) -> str:
    # A decoder that was killed is a zombie for a moment, and then gone.
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def leave_a_slow_file(port: int, server: int) -> None:
    """Send a drawing that takes as long as a request may, leave, and wait for its decoder's end."""

    def decoders() -> set[int]:
        family = psutil.Process(server).children(recursive=True)
        return {each.pid for each in family if "serve_requests" in command_of(each)}

    rows = [{"file": base64.b64encode(SLOW_SVG).decode(), "name": "a.svg"}]
    body = json.dumps({"rows": rows}).encode()
    head = "POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    before = decoders()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        # A decoder that was idle is busy now, or the first one has started.
        wait_until(lambda: active_requests(port) == 2, 60)
        wait_until(decoders, 60)
    wait_until(lambda: active_requests(port) == 1, 30)
    wait_until(lambda: not before & decoders(), 30)


def has_indexes(port: int) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=300) as answer:
        return bool(json.loads(answer.read())["ready"])


def active_requests(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=300) as answer:
        (line,) = (each for each in answer if each.startswith(b"skillnet_active_requests "))
    return int(float(line.split()[1]))


def predict(url: str, text: str) -> list[Any]:
    found: list[Any] = ask(url, {"text": text})["predictions"]
    return found


def rank_classes(url: str) -> dict[str, float]:
    (found,) = predict(url, "文学研究")
    assert found["task"] == "text_classification"
    return {each["answer"]: each["score"] for each in found["alternatives"]}


def ask(url: str, row: dict[str, str]) -> Any:
    body = json.dumps({"rows": [row]}).encode()
    request = urllib.request.Request(
        f"{url}/v1/predict", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read())


def search_by_file(url: str, content: bytes, name: str) -> str:
    body, kind = encode_form(content, name)
    request = urllib.request.Request(f"{url}/search", body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return str(answer.read().decode())
