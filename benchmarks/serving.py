"""Load test of ``skillnet serve``: beside a server written with FastAPI, and while a replica dies.

The servers are commands of their own. Their model has the size of the demo's and random weights,
which cost the same. Each client sends one text per request over a connection that stays open. A
request is lost if its client gets anything but its answer.

*Side by side*: ours in one process, with a token and its limits, and :mod:`.fastapi_server`, which
has neither. They run at the same time and are asked in turns. *Replicas*: two replicas of Ray
Serve, one of which is killed.
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import Result, alternate, find_corpora, plain, ratio, spread
from skillnet_platform.cluster.loopback import choose_port

CLOCK = "wall and cpu"
CLIENTS, REPLICAS = 50, 2
#: Requests of a client in a round.
REQUESTS = 20
#: Clients side by side -> requests of each in a round.
SIDE_BY_SIDE = {1: 80, 8: 25, 32: 12}
MOST_ROUNDS = 5
START_S = 300.0
#: Share of the requests that are answered before the kill.
KILL_AFTER = 0.3
TEXTS = ("宋代陶瓷工艺史", "有机化学实验教程", "农业经济管理概论", "儿童文学研究")
REPLICA_TITLE = "ServeReplica"
OURS, OTHER = "skillnet serve", "FastAPI"
TOKEN = "correct-horse-battery"  # noqa: S105 - of a server on loopback


@dataclass(frozen=True)
class LoadRound:
    """Measurements of a round.

    Args:
        seconds: waits of the answered requests.
        wall: seconds of the round.
        cpu: CPU seconds of the server.
        lost: requests without an answer.
    """

    seconds: list[float]
    wall: float
    cpu: float
    lost: int

    @property
    def rate(self) -> float:
        """Answered requests per second."""
        return len(self.seconds) / self.wall

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds of a request."""
        return 1000 * self.cpu / len(self.seconds)

    def quantile(self, percent: int) -> float:
        """Return a percentile of the waits, in milliseconds."""
        return 1000 * statistics.quantiles(self.seconds, n=100)[percent - 1]


class ServerProcess(NamedTuple):
    """A server that answers.

    Args:
        port: it listens on.
        pid: process id of its command.
        ready_s: seconds until it was healthy.
    """

    port: int
    pid: int
    ready_s: float


def run(rounds: int, threads: int) -> list[Result]:
    """Requests per second, waits, CPU time, memory and lost requests."""
    del threads
    rounds = min(rounds, MOST_ROUNDS)
    data = find_corpora("serving")
    if data is None:
        return []
    with tempfile.TemporaryDirectory(prefix="skillnet-") as place:
        os.environ["SKILLNET_HOME"] = place
        bundle = _write_bundle(data, Path(place))
        return _compare(bundle, rounds) + _kill_replicas(bundle, rounds)


def _compare(bundle: Path, rounds: int) -> list[Result]:
    ours = ["skillnet_serving.serve", "--model", str(bundle), "--search", "false", "--port"]
    with (
        run_server(ours) as first,
        run_server(["benchmarks.fastapi_server", str(bundle)]) as second,
    ):
        servers = {OURS: first, OTHER: second}
        results = []
        for name, each in servers.items():
            results.append(plain(f"time to ready, {name}", "s", each.ready_s))
            results.append(plain(f"private memory, {name}", "MiB", _memory(each)))
        for clients, requests in SIDE_BY_SIDE.items():
            found: dict[str, list[LoadRound]] = {name: [] for name in servers}
            for server in servers.values():
                _send_load(server, clients, 4)  # the first requests load lazily
            for _, name in alternate(servers, rounds):
                found[name].append(_send_load(servers[name], clients, requests))
            results += _describe_pair(found, clients, clients * requests)
    return results


def _describe_pair(
    found: dict[str, list[LoadRound]], clients: int, requests: int
) -> Iterator[Result]:
    setting = f"{requests} requests of one text"
    plural = "client" if clients == 1 else "clients"
    rounds = len(found[OURS])
    for name, measured in found.items():
        cpu = ("CPU of a request", "ms", [each.cpu_ms for each in measured])
        yield from _describe_load(measured, f"{clients} {plural}, {name}", setting, cpu)
    rates = {name: [each.rate for each in measured] for name, measured in found.items()}
    compared = ratio(rates[OURS], rates[OTHER])
    label = f"requests per second, {clients} {plural}"
    yield Result(label, OTHER, "ratio", *compared, ">= 1.0", rounds, setting)


def _kill_replicas(bundle: Path, rounds: int) -> list[Result]:
    words = ["skillnet_serving.serve", "--model", str(bundle), "--search", "false"]
    with run_server([*words, "--replicas", str(REPLICAS), "--port"]) as server:
        _send_load(server, CLIENTS, REQUESTS // 4)
        calm = [_send_load(server, CLIENTS, REQUESTS) for _ in range(rounds)]
        killed = [_send_load(server, CLIENTS, REQUESTS, is_killing=True) for _ in range(rounds)]
    setting = f"{CLIENTS} clients, {REPLICAS} replicas, {CLIENTS * REQUESTS} requests of one text"
    return [
        result
        for name, found in (("calm", calm), ("a replica killed", killed))
        for result in _describe_load(
            found, name, setting, ("wait, p99", "ms", [each.quantile(99) for each in found])
        )
    ]


def _describe_load(
    found: list[LoadRound], name: str, setting: str, further: tuple[str, str, list[float]]
) -> Iterator[Result]:
    for what, unit, values in (
        ("requests", "1/s", [each.rate for each in found]),
        ("wait, median", "ms", [each.quantile(50) for each in found]),
        further,
    ):
        yield Result(f"{what}, {name}", "", unit, *spread(values), "", len(found), setting)
    lost = spread([float(sum(each.lost for each in found))])
    yield Result(f"lost, {name}", "", "requests", *lost, "<= 0", len(found), setting)


@contextlib.contextmanager
def run_server(words: Sequence[str]) -> Iterator[ServerProcess]:
    """Run a server during a block.

    Args:
        words: module and arguments of its command, which the port follows.
    """
    port, begin = choose_port("127.0.0.1", 0), time.monotonic()
    environment = os.environ | {"SKILLNET_SERVE_TOKEN": TOKEN}
    environment.pop("OMP_NUM_THREADS", None)
    process = subprocess.Popen(
        [sys.executable, "-m", *words, str(port)], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        while not _is_healthy(port):
            if process.poll() is not None or time.monotonic() > begin + START_S:
                raise RuntimeError("the server did not start")
            time.sleep(0.1)
        yield ServerProcess(port, process.pid, time.monotonic() - begin)
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


def _memory(server: ServerProcess) -> float:
    import psutil

    own = psutil.Process(server.pid)
    family = [own, *own.children(recursive=True)]
    return sum(each.memory_full_info().uss for each in family) / 2**20


def _cpu_time(server: ServerProcess) -> float:
    import psutil

    own, total = psutil.Process(server.pid), 0.0
    for each in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += sum(each.cpu_times()[:2])
    return total


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def _write_bundle(data: Path, place: Path) -> Path:
    from pipelines.serving.bundle import find_bundle
    from pipelines.training.config.run import FinetuneConfig
    from pipelines.training.loop.resolved_run import resolve_run
    from pipelines.training.runs.model_source import resolve_model
    from skillnet.model import SkillNet
    from skillnet_platform.config import parse_config

    words = ["--config", "quickstart", "--name", "load", "--data", str(data)]
    # A trained model has no auxiliary tasks.
    words += ["--tasks.text_to_definition", "null", "--model.tasks.text_to_definition", "null"]
    config = parse_config(FinetuneConfig, words, "skillnet finetune")
    SkillNet(resolve_run(config).config.model).save_pretrained(place / "model")
    return find_bundle(resolve_model(str(place / "model")), data)[0]


def _send_load(
    server: ServerProcess, clients: int, requests: int, is_killing: bool = False
) -> LoadRound:
    """Send the requests of all clients; kill one replica of the server meanwhile if asked."""
    answered = threading.Semaphore(0)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}

    def send(client: int) -> list[float | None]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        seconds: list[float | None] = []
        for number in range(requests):
            body = json.dumps({"rows": [{"text": TEXTS[(client + number) % len(TEXTS)]}]})
            begin = time.perf_counter()
            try:
                connection.request("POST", "/v1/predict", body, headers)
                answer = connection.getresponse()
                good = answer.status == 200 and len(json.loads(answer.read())["predictions"]) == 1
            except (OSError, http.client.HTTPException, ValueError, KeyError):
                good = False
                connection.close()
            seconds.append(time.perf_counter() - begin if good else None)
            answered.release()
        connection.close()
        return seconds

    cpu, begin = _cpu_time(server), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        sent = [pool.submit(send, client) for client in range(clients)]
        if is_killing:
            for _ in range(int(KILL_AFTER * clients * requests)):
                answered.acquire()
            kill_replica(server.pid)
        found = [each for client in sent for each in client.result()]
    wall = time.perf_counter() - begin
    cpu = _cpu_time(server) - cpu
    return LoadRound([s for s in found if s is not None], wall, cpu, found.count(None))
