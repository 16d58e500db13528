"""A tracking server with passwords against one without: recorded training steps, and requests.

Each contender has a server of its own. A round trains the same steps and records each of them. The
clock is the wall's, because a client waits for its server. A recorded run has one request per step,
which is more than a real run has.
"""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests

from benchmarks.measure import Result, in_turns, ratio, spread
from benchmarks.training_step import Sizes, skillnet_step
from skillnet_cluster.tracker import running_server
from skillnet_platform import tracking
from skillnet_platform.cluster.loopback import choose_port
from skillnet_platform.errors import UserError
from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.tracking import Tracker, TrackingConfig, backend

STEPS = 20
CLIENTS, REQUESTS = 50, 300
START_S = 300.0
CLOCK = "wall"
SIZES = Sizes(rows=32, tokens=32, dim=128, depth=2)


def run(rounds: int, threads: int) -> list[Result]:
    """Ratio of recorded steps, and requests per second of each server."""
    del threads
    rounds = min(rounds, 10)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        uris = {
            name: stack.enter_context(_served(folder / name, name)) for name in ("auth", "open")
        }
        trackers = {
            name: stack.enter_context(
                tracking.start_run(name, None, TrackingConfig(uri=uri, system_metrics=False))
            )
            for name, uri in uris.items()
        }
        seconds = in_turns(
            {name: _recorded_steps(tracker) for name, tracker in trackers.items()},
            rounds,
            time.perf_counter,
            warmup=1,
        )
        setting = f"{STEPS} steps of {SIZES}, one record a step"
        against = "without authentication"
        found = ratio(seconds["auth"], seconds["open"])
        name = "recorded steps with authentication"
        results = [Result(name, against, "ratio of times", *found, "<= 1.1", rounds, setting)]
        for name, uri in uris.items():
            rates, failed = _request_rate(uri, 3)
            setting = f"{REQUESTS} requests of {CLIENTS} clients, 2 server processes"
            note = f"{failed} requests without an answer within 30 s"
            title = f"requests to a server, {name}"
            results.append(Result(title, "", "1/s", *spread(rates), "", 3, setting, note))
    return results


@contextlib.contextmanager
def _served(home: Path, name: str) -> Iterator[SecretUri]:
    """Run ``skillnet tracker`` during a block; yield its URI, complete with the password."""
    home.mkdir()
    port = choose_port("127.0.0.1", 0)
    words = [sys.executable, "-m", "skillnet_cluster.tracker", "--port", str(port)]
    words += ["--auth", "true"] if name == "auth" else []
    environment = {**os.environ, "SKILLNET_HOME": str(home)}
    address = f"http://127.0.0.1:{port}"
    with (
        (home / "log").open("w") as log,
        running_server(words, environment, stdout=log, stderr=log) as server,
    ):
        end = time.monotonic() + START_S
        while True:
            with contextlib.suppress(UserError):
                backend.require_answer(address)
                break
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no server: {(home / 'log').read_text(encoding='utf-8')}")
            time.sleep(0.5)
        password = home / "tracker" / "admin-password"
        user = f"admin:{password.read_text().strip()}@" if password.exists() else ""
        yield SecretUri(address.replace("://", f"://{user}"))


def _recorded_steps(tracker: Tracker) -> Callable[[], None]:
    step = skillnet_step(SIZES, 2)
    number = 0

    def train() -> None:
        nonlocal number
        for _ in range(STEPS):
            step()
            number += 1
            tracker.metrics({"training/loss": 1.0, "training/learning_rate": 1e-3}, number)

    return train


def _request_rate(uri: SecretUri, rounds: int) -> tuple[list[float], int]:
    """Return requests per second of each round, and the number of requests without an answer."""
    url = f"{uri.reveal()}/api/2.0/mlflow/experiments/search"

    def ask(_: int) -> bool:
        try:
            answer = requests.post(url, json={"max_results": 1}, timeout=30)
        except requests.RequestException:
            return False
        return answer.ok

    rates, failed = [], 0
    with ThreadPoolExecutor(CLIENTS) as clients:
        for _ in range(rounds):
            begin = time.perf_counter()
            answered = sum(clients.map(ask, range(REQUESTS)))
            rates.append(answered / (time.perf_counter() - begin))
            failed += REQUESTS - answered
    return rates, failed
