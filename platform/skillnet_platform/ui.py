"""``skillnet ui``: serve the MLflow pages of this machine's runs."""

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
from skillnet_platform.config.bounds import PortNumber
from skillnet_platform.errors import UserError
from skillnet_platform.tracking import backend
from skillnet_platform.tracking import server as tracking_server

WAIT_S = 120.0


@dataclass
class UiConfig:
    """Options of ``skillnet ui``.

    Args:
        port: port to listen on; 0 takes a free port.
        host: interface to listen on. The pages have no password, so any interface but loopback
            needs ``without_password``.
        without_password: let everyone who reaches ``host`` read and change every run.
        uri: tracker to show; by default that of this machine's runs.
        experiment: experiment to show first.
        open: open a browser.
    """

    port: PortNumber = 5000
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
        console.print_note(f"a server already shows the runs: {uri}")
        return 0
    if not loopback.is_loopback_host(config.host) and not config.without_password:
        raise UserError(
            f"--host {config.host} lets others read and change every run without a password. "
            "Use 127.0.0.1 with ssh -L, start `skillnet tracker --auth true`, or add "
            "--without_password on a private network"
        )
    port = config.port or find_free_port(config.host)
    require_free_port(config.host, port)
    tracker = backend.setup_backend(uri, config.experiment)
    # Without the records that still wait the pages would be incomplete.
    tracking.send_leftover_spools(uri)
    return _serve(tracker, config.host, port, config.open)


def _serve(tracker: backend.TrackingBackend, host: str, port: int, open_browser: bool) -> int:
    url = f"http://{host}:{port}"
    arguments, environment = (
        tracking_server.server_command(host, port),
        tracking_server.server_environment(tracker.uri),
    )
    output: list[str] = []
    with tracking_server.running_server(
        arguments, environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as server:
        threading.Thread(target=_drain, args=(server, output), daemon=True).start()
        try:
            with signals.terminate_as_interrupt():
                _wait_until_up(server, url, output)
                console.print_note(f"runs of {tracker.uri}; Ctrl-C stops")
                page = backend.run_list_link(url, tracker.experiment_id)
                console.print_output(page)
                if open_browser:
                    webbrowser.open(page)
                return server.wait()
        except KeyboardInterrupt:
            return 0


def _drain(server: "subprocess.Popen[str]", output: list[str]) -> None:
    """Read the pipe so that it does not fill, and keep the last lines for an error."""
    assert server.stderr is not None
    for line in server.stderr:
        output.append(line.rstrip())
        del output[:-20]


def _wait_until_up(server: "subprocess.Popen[str]", url: str, output: list[str]) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        # A server that ended never answers, so the wait would be in vain.
        if server.poll() is not None:
            raise RuntimeError(f"the MLflow server did not start: {' '.join(output[-3:])}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):  # noqa: S310 - http, ours
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the MLflow server did not answer within {WAIT_S:.0f} s")


def find_free_port(host: str) -> int:
    """Return a port that no program uses.

    Args:
        host: interface to listen on.
    """
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def require_free_port(host: str, port: int) -> None:
    """Check that a port is free.

    Args:
        host: interface to listen on.
        port: port to listen on.

    Raises:
        UserError: another program uses the port, or the interface does not exist.
    """
    with socket.socket() as probe:
        # Without it a port counts as used for a while after an earlier server ended.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"--host {host} --port {port}: cannot listen there ({error.strerror}); give "
                "another port, or --port 0 for a free port"
            ) from None


if __name__ == "__main__":
    raise SystemExit(main())
