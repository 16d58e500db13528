"""By default nothing listens beyond loopback, and the embedded Ray asks for its token."""

import os
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from skillnet_platform import cluster
from skillnet_platform.cluster import connect, loopback
from skillnet_platform.tracking import backend
from tests.helpers.other_user import run_as_other_user
from tests.helpers.processes import run_python, start_python
from tests.helpers.sockets import Listening, listening, reachable

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.integration


def test_the_watch_sees_a_socket_that_others_can_reach() -> None:
    before = listening()
    with socket.socket() as open_to_all:
        open_to_all.bind(("0.0.0.0", 0))
        open_to_all.listen()
        (found,) = reachable(listening() - before)
        assert found.port == open_to_all.getsockname()[1]
    assert Listening("", "::ffff:127.0.0.1", 1).is_loopback
    assert not Listening("", "::ffff:10.0.0.1", 1).is_loopback


def test_workers_of_the_embedded_ray_have_the_priority_of_their_driver(ray_session: Any) -> None:
    priority = ray_session.remote(lambda: os.nice(0))
    assert ray_session.get(priority.remote()) == os.nice(0)


def test_the_embedded_ray_asks_for_its_token(ray_session: Any) -> None:
    """Other users of the machine can open its loopback ports."""
    from ray._private.worker import get_dashboard_url

    jobs = f"http://{get_dashboard_url()}/api/jobs/"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(jobs, timeout=300)
    reported = {"Authorization": "Bearer " + loopback._own_token()}
    with urllib.request.urlopen(
        urllib.request.Request(jobs, headers=reported), timeout=300
    ) as answer:
        assert answer.status == 200

    knocking = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
    for theirs in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        address = ray_session.get_runtime_context().gcs_address
        refused = run_python("-c", knocking, address, variables=theirs)
        assert refused.returncode != 0
        assert "Authentication token is missing or incorrect" in refused.stderr


#: What the second user of an attack tries: to read the logs, and to replace or use the sockets.
_ATTACK = """
import socket
drop()
session = sys.argv[1]
reached = []
def attempt(name, action):
    try:
        action()
    except PermissionError:
        return
    reached.append(name)
def connect():
    with socket.socket(socket.AF_UNIX) as opened:
        opened.connect(session + "/sockets/raylet")
attempt("read logs", lambda: os.listdir(session + "/logs"))
attempt("list sockets", lambda: os.listdir(session + "/sockets"))
attempt("plant a file", lambda: os.mkdir(session + "/sockets/planted"))
attempt("connect", connect)
print(reached)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as a second user")
def test_another_user_reaches_no_socket_or_log_of_the_embedded_ray(ray_session: Any) -> None:
    session = Path(ray_session._private.worker._global_node.get_session_dir_path())
    assert (session / "sockets/raylet").is_socket()
    attack = run_as_other_user(_ATTACK, str(session))
    assert attack.stdout == "[]\n", f"another user could {attack.stdout}{attack.stderr}"
    private = session.parents[1]
    assert private == connect.prepare_session_directory()
    assert private.stat().st_mode & 0o7777 == 0o700
    assert private.stat().st_uid == os.geteuid()


def content(path: Path) -> bytes:
    """Of a file of a living session: Ray writes some under another name first."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def test_the_token_is_not_left_lying_about(ray_session: Any) -> None:
    token = loopback._own_token().encode()
    session = Path(ray_session._private.worker._global_node.get_session_dir_path())
    files = [path for path in session.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if token in content(path)] == []
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ, "a cluster may follow"
    assert os.environ.get("RAY_TMPDIR") != str(session.parents[1]), "a cluster may follow"


def test_a_ray_that_listens_elsewhere_is_ended(
    ray_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere:
        """What ``require`` asks of Ray, on a version whose address is chosen in another way."""

        __version__ = "9"
        ended = False
        util = type("util", (), {"get_node_ip_address": staticmethod(lambda: "192.0.2.1")})

        @classmethod
        def shutdown(cls) -> None:
            cls.ended = True

    loopback.require_loopback(ray_session)
    with pytest.raises(RuntimeError, match=r"Ray 9 listens on 192\.0\.2\.1 instead of 127"):
        loopback.require_loopback(Elsewhere)
    assert Elsewhere.ended


@pytest.mark.slow("test_tracker.py::test_the_pages_show_the_runs_and_leave_no_process")
def test_the_pages_of_the_runs_are_served_on_loopback_only(run_root: Path) -> None:
    backend.setup_backend(experiment="shown")
    process = start_python("-m", "skillnet_cluster.tracker", "--port", "0")
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        sockets = listening(process.pid)
        assert len(sockets) >= 1
        assert reachable(sockets) == []
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()
    assert process.returncode == 0


def test_on_a_cluster_the_mode_is_its_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    cluster.prepare_ray_environment()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    cluster.prepare_ray_environment()
    assert os.environ["RAY_AUTH_MODE"] == "token"
