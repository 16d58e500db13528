"""``skillnet ui``: the MLflow pages of the runs made here."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from dataclasses import dataclass
from typing import Optional

from skillnet_platform import config, console, lifecycle, store, tracking
from skillnet_platform.cli import command
from skillnet_platform.errors import UserError

WAIT_S = 120.0


@dataclass
class UiConfig:
    """Options of ``skillnet ui``.

    Args:
        port: where to listen; 0 takes a free one.
        host: which interface to listen on; the pages have no password, so keep it at loopback
            unless the network is yours.
        uri: the store to show; by default that of the runs made here.
        experiment: whose runs are shown first.
        open: whether to open a browser.
    """

    port: int = 5000
    host: str = "127.0.0.1"
    uri: Optional[str] = None  # noqa: UP045 - jsonargparse words this form better
    experiment: str = "skillnet"
    open: bool = False


@command
def main(argv: list[str] | None = None) -> int:
    """Serve MLflow's pages until interrupted."""
    options = config.parse(
        UiConfig,
        argv or [],
        prog="skillnet ui",
        description="Show runs, metrics and registered models in MLflow's pages, on this machine.",
        example="skillnet ui --port 5001 --open",
    )
    uri = store.resolve_uri(options.uri)
    if uri.startswith("http"):
        console.note(f"the runs are kept by a server already: {uri}")
        return 0
    port = options.port or _free_port(options.host)
    require_free(options.host, port)
    place = store.setup(uri, options.experiment)
    tracking.send_left_behind(uri)
    return _serve(place, options.host, port, options.open)


def server_command(
    uri: str, host: str, port: int, artifacts: str | None = None, workers: int = 1
) -> list[str]:
    """The command line of an MLflow server on that store; artifacts by default in the run root."""
    program = shutil.which("mlflow", path=os.path.dirname(sys.executable)) or "mlflow"  # noqa: PTH120
    kept = ["--artifacts-destination", artifacts or store.artifact_root().as_uri()]
    where = ["--host", host, "--port", str(port), "--workers", str(workers)]
    return [program, "server", "--backend-store-uri", uri, *kept, *where]


def _serve(place: store.Place, host: str, port: int, open_browser: bool) -> int:
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop(store.URI_VARIABLE, None)
    url = f"http://{host}:{port}"
    server = subprocess.Popen(
        server_command(place.uri, host, port),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    said: list[str] = []
    reader = threading.Thread(target=_drain, args=(server, said), daemon=True)
    reader.start()
    try:
        with lifecycle.terminate_as_interrupt():
            _wait_until_up(server, url, said)
            console.note(f"runs of {place.uri}; Ctrl-C stops")
            page = f"{url}/#/experiments/{place.experiment_id}/runs?{store.TRAINING_VIEW}"
            print(page, flush=True)
            if open_browser:
                webbrowser.open(page)
            return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(server)


def _drain(server: "subprocess.Popen[str]", said: list[str]) -> None:
    """Keep the pipe from filling, and the last lines for an error."""
    assert server.stderr is not None
    for line in server.stderr:
        said.append(line.rstrip())
        del said[:-20]


def _wait_until_up(server: "subprocess.Popen[str]", url: str, said: list[str]) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the MLflow server did not start: {' '.join(said[-3:])}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):  # noqa: S310 - http, ours
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the MLflow server did not answer within {WAIT_S:.0f} s")


def _stop(server: "subprocess.Popen[str]") -> None:
    """The server starts workers of its own: end its whole session."""
    if server.poll() is not None:
        return
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def require_free(host: str, port: int) -> None:
    """Refuse a port on which nothing can listen.

    Raises:
        UserError: another program has it, or the interface is not there.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as problem:
            raise UserError(
                f"--host {host} --port {port}: cannot listen there ({problem.strerror}); give "
                "another port, or --port 0 for a free one"
            ) from None


if __name__ == "__main__":
    raise SystemExit(main())
