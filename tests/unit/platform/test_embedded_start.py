"""The embedded Ray gets a second chance on a busy machine; a lost node ends its command."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray as installed_ray

from skillnet_platform.cluster import connect
from skillnet_platform.cluster.connect import start_embedded_ray
from skillnet_platform.errors import UserError
from sweeps.trials.ray_tune import TrialListener

#: Message of ray._private.node in Ray 2.60.
TOO_SLOW = (
    "The current node timed out during startup. This could happen because some of the raylet "
    "failed to startup or the GCS has become overloaded."
)


def slow_ray(*failures: Exception) -> tuple[Any, list[str]]:
    """Return a module whose first starts fail, and the list of its calls."""
    left, calls = list(failures), list[str]()

    def init(**options: object) -> None:
        calls.append(f"init {options}")
        if left:
            raise left.pop(0)

    return SimpleNamespace(init=init, shutdown=lambda: calls.append("shutdown")), calls


def test_a_slow_start_is_repeated_once(capsys: pytest.CaptureFixture[str]) -> None:
    ray, calls = slow_ray(Exception(TOO_SLOW))
    start_embedded_ray(ray, num_cpus=2)
    assert calls == ["init {'num_cpus': 2}", "shutdown", "init {'num_cpus': 2}"]
    assert "starting it again" in capsys.readouterr().err


def test_two_slow_starts_have_one_message() -> None:
    ray, calls = slow_ray(Exception(TOO_SLOW), Exception(TOO_SLOW))
    with pytest.raises(UserError, match="did not start within 30 s, twice"):
        start_embedded_ray(ray)
    assert calls[-1] == "shutdown"


def test_another_failure_is_not_repeated() -> None:
    ray, calls = slow_ray(RuntimeError("no port"))
    with pytest.raises(RuntimeError, match="no port"):
        start_embedded_ray(ray)
    assert calls == ["init {}"]


def test_a_lost_node_ends_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[dict[str, Any]] = [{"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": False}]
    context = SimpleNamespace(get_node_id=lambda: "a")
    monkeypatch.setattr(installed_ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(installed_ray, "nodes", lambda: nodes)
    monkeypatch.setattr(connect, "INTERVAL_S", 0.0)
    listener = TrialListener(lambda *_: None, lambda *_: None)
    # The loss of another node is not that of the command.
    listener.on_step_begin(0, [])
    nodes[0]["Alive"] = False
    with pytest.raises(UserError, match="Ray lost the node of this command"):
        listener.on_step_begin(1, [])


def test_the_head_is_asked_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed_ray, "nodes", lambda: pytest.fail("asked"))
    connect.OwnNodeCheck().require_alive()
