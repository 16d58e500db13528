"""Load test of ``skillnet serve``: requests per second and waits of 50 clients, also while a
replica is killed.

The server is a command of its own with replicas of Ray Serve. Its model has the size of the demo's
and random weights, which cost the same. Each client sends one text per request over a connection
that stays open. A request is lost if its client gets anything but its answer.
"""

import contextlib
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Result, Spread, spread
from skillnet_platform import console
from skillnet_platform.cluster.loopback import choose_port
from skillnet_platform.storage import data_root

CLOCK = "wall"
CLIENTS, REPLICAS = 50, 2
#: Requests of a client in a round.
REQUESTS = 20
MOST_ROUNDS = 3
START_S = 300.0
#: Share of the requests that are answered before the kill.
KILL_AFTER = 0.3
TEXTS = ("宋代陶瓷工艺史", "有机化学实验教程", "农业经济管理概论", "儿童文学研究")
REPLICA_TITLE = "ServeReplica"


@dataclass(frozen=True)
class LoadRound:
    """Measurements of a round.

    Args:
        seconds: waits of the answered requests.
        wall: seconds of the round.
        lost: requests without an answer.
    """

    seconds: list[float]
    wall: float
    lost: int

    @property
    def rate(self) -> float:
        """Answered requests per second."""
        return len(self.seconds) / self.wall

    def quantile(self, percent: int) -> float:
        """Return a percentile of the waits, in milliseconds."""
        return 1000 * statistics.quantiles(self.seconds, n=100)[percent - 1]


def run(rounds: int, threads: int) -> list[Result]:
    """Requests per second, waits and lost requests, with and without a killed replica."""
    del threads
    rounds = min(rounds, MOST_ROUNDS)
    data = Path(os.environ.get("SKILLNET_BENCHMARK_DATA") or data_root()).absolute()
    if not (data / "headings" / "manifest.json").is_file():
        console.print_warning(f"serving needs prepared corpora; there are none in {data}")
        return []
    with tempfile.TemporaryDirectory(prefix="skillnet-") as place:
        model = _write_model(data, Path(place))
        with run_server(model, data, Path(place)) as (port, server):
            _send_load(port, REQUESTS // 4)  # the first requests load lazily
            calm = [_send_load(port, REQUESTS) for _ in range(rounds)]
            killed = [_send_load(port, REQUESTS, server) for _ in range(rounds)]
    setting = f"{CLIENTS} clients, {REPLICAS} replicas, {CLIENTS * REQUESTS} requests of one text"
    results = []
    for name, found in (("calm", calm), ("a replica killed", killed)):
        for measured, unit, values in (
            ("requests", "1/s", [each.rate for each in found]),
            ("wait, median", "ms", [each.quantile(50) for each in found]),
            ("wait, p99", "ms", [each.quantile(99) for each in found]),
        ):
            label = f"{measured}, {name}"
            results.append(Result(label, "", unit, *spread(values), "", rounds, setting))
        lost = Spread(*[float(sum(each.lost for each in found))] * 3)
        results.append(Result(f"lost, {name}", "", "requests", *lost, "<= 0", rounds, setting))
    return results


@contextlib.contextmanager
def run_server(model: Path, data: Path, home: Path) -> Iterator[tuple[int, int]]:
    """Run ``skillnet serve`` during a block; return its port and process id.

    Args:
        model: folder of the saved model.
        data: prepared corpora.
        home: run root of the server.
    """
    port = choose_port("127.0.0.1", 0)
    words = ["--model", str(model), "--data", str(data), "--search", "false"]
    words += ["--port", str(port), "--replicas", str(REPLICAS)]
    environment = os.environ | {"SKILLNET_HOME": str(home)}
    environment.pop("OMP_NUM_THREADS", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.serve", *words],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + START_S
        while not _is_healthy(port):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the server did not start")
            time.sleep(0.5)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(60)


def kill_replica(server: int) -> None:
    """Kill one process of a replica.

    Args:
        server: process id of the command.
    """
    import psutil

    for child in psutil.Process(server).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if REPLICA_TITLE in " ".join(child.cmdline()):
                os.kill(child.pid, signal.SIGKILL)
                return
    raise RuntimeError("the server has no replica to kill")


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def _write_model(data: Path, place: Path) -> Path:
    from pipelines.training.config.run import FinetuneConfig
    from pipelines.training.loop.resolved_run import resolve_run
    from skillnet.model import SkillNet
    from skillnet_platform.config import parse_config

    words = ["--config", "quickstart", "--name", "load", "--data", str(data)]
    # A trained model has no auxiliary tasks.
    words += ["--tasks.text_to_definition", "null", "--model.tasks.text_to_definition", "null"]
    config = parse_config(FinetuneConfig, words, "skillnet finetune")
    SkillNet(resolve_run(config).config.model).save_pretrained(place / "model")
    return place / "model"


def _send_load(port: int, requests: int, server: int | None = None) -> LoadRound:
    """Send the requests of all clients; with a server, kill one of its replicas meanwhile."""
    answered = threading.Semaphore(0)

    def send(client: int) -> list[float | None]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        seconds: list[float | None] = []
        for number in range(requests):
            body = json.dumps({"rows": [{"text": TEXTS[(client + number) % len(TEXTS)]}]})
            begin = time.perf_counter()
            try:
                connection.request(
                    "POST", "/v1/predict", body, {"Content-Type": "application/json"}
                )
                answer = connection.getresponse()
                good = answer.status == 200 and len(json.loads(answer.read())["predictions"]) == 1
            except (OSError, http.client.HTTPException, ValueError, KeyError):
                good = False
                connection.close()
            seconds.append(time.perf_counter() - begin if good else None)
            answered.release()
        connection.close()
        return seconds

    begin = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        sent = [pool.submit(send, client) for client in range(CLIENTS)]
        if server is not None:
            for _ in range(int(KILL_AFTER * CLIENTS * requests)):
                answered.acquire()
            kill_replica(server)
        found = [each for client in sent for each in client.result()]
    wall = time.perf_counter() - begin
    return LoadRound([s for s in found if s is not None], wall, found.count(None))
