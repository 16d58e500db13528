"""``skillnet ui``: the MLflow pages of the runs made here."""

import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from dataclasses import dataclass

from skillnet_platform import console, signals, tracking
from skillnet_platform.cli import command
from skillnet_platform.cluster import loopback
from skillnet_platform.errors import UserError
from skillnet_platform.tracking import backend
from skillnet_platform.tracking import server as tracking_server

WAIT_S = 120.0


@dataclass
class UiConfig:
    """Options of ``skillnet ui``.

    Args:
        port: where to listen; 0 takes a free one.
        host: which interface to listen on; the pages have no password, so any but loopback needs
            ``without_password``.
        without_password: let whoever reaches ``host`` read and change every run.
        uri: the store to show; by default that of the runs made here.
        experiment: whose runs are shown first.
        open: whether to open a browser.
    """

    port: int = 5000
    host: str = "127.0.0.1"
    without_password: bool = False
    uri: str | None = None
    experiment: str = "skillnet"
    open: bool = False


@command(
    UiConfig,
    description="Show runs, metrics and registered models in MLflow's pages, on this machine.",
    example="skillnet ui --port 5001 --open",
)
def main(config: UiConfig) -> int:
    """Serve MLflow's pages until interrupted."""
    uri = backend.resolve_uri(config.uri)
    if uri.startswith("http"):
        console.note(f"the runs are kept by a server already: {uri}")
        return 0
    if not loopback.is_loopback_host(config.host) and not config.without_password:
        raise UserError(
            f"--host {config.host} lets others read and change every run, without a password: "
            "keep to 127.0.0.1 and reach it through ssh -L, start `skillnet tracker --auth true`, "
            "or, on a network that is yours alone, add --without_password"
        )
    port = config.port or _free_port(config.host)
    require_free(config.host, port)
    place = backend.setup_backend(uri, config.experiment)
    tracking.send_leftover_spools(uri)
    return _serve(place, config.host, port, config.open)


def _serve(place: backend.TrackingBackend, host: str, port: int, open_browser: bool) -> int:
    url = f"http://{host}:{port}"
    words, environment = (
        tracking_server.server_command(host, port),
        tracking_server.server_environment(place.uri),
    )
    said: list[str] = []
    with tracking_server.running_server(
        words, environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as server:
        threading.Thread(target=_drain, args=(server, said), daemon=True).start()
        try:
            with signals.terminate_as_interrupt():
                _wait_until_up(server, url, said)
                console.note(f"runs of {place.uri}; Ctrl-C stops")
                page = f"{url}/#/experiments/{place.experiment_id}/runs?{backend.TRAINING_VIEW}"
                print(page, flush=True)
                if open_browser:
                    webbrowser.open(page)
                return server.wait()
        except KeyboardInterrupt:
            return 0


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
