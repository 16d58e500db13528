"""``skillnet serve`` on Ray Serve: requests survive the death of a replica."""

import json
import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import kill_replica
from pipelines.serve import ServeConfig, build_server, run_replicas
from pipelines.serving.served_model import ServedModel, ServedModelConfig
from skillnet.model import SkillNet
from tests.helpers.ports import free_port
from tests.helpers.readable_corpora import config, write_corpora

pytestmark = pytest.mark.integration

CLIENTS, REQUESTS = 8, 12


@pytest.fixture
def url(tmp_path: Path, ray_session: Any) -> Iterator[str]:
    data = write_corpora(tmp_path / "corpora")
    SkillNet(config()).save_pretrained(tmp_path / "model")
    served = ServedModelConfig(str(tmp_path / "model"), str(data), search=False)
    options = ServeConfig(port=free_port(), replicas=2, cpus=0.5, search=False)
    about = ServedModel(served).describe()
    with run_replicas(options, served) as handle:
        server = build_server(options, handle, about, None)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{options.port}"
        server.should_exit = True
        thread.join(timeout=20)


def test_no_request_is_lost_when_a_replica_is_killed(url: str) -> None:
    answered = threading.Semaphore(0)

    def send(client: int) -> list[int]:
        body = json.dumps({"rows": [{"text": f"文学研究{client}"}]}).encode()
        request = urllib.request.Request(
            f"{url}/v1/predict", body, {"Content-Type": "application/json"}
        )
        found = []
        for _ in range(REQUESTS):
            with urllib.request.urlopen(request, timeout=60) as answer:
                found.append(len(json.loads(answer.read())["predictions"]))
            answered.release()
        return found

    with ThreadPoolExecutor(CLIENTS) as pool:
        sent = [pool.submit(send, client) for client in range(CLIENTS)]
        for _ in range(CLIENTS):
            answered.acquire()
        kill_replica(os.getpid())
        assert [each.result() for each in sent] == [[1] * REQUESTS] * CLIENTS
