"""A sweep ends with a message if Ray lost the node of its command."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from skillnet_platform.cluster import connect
from skillnet_platform.errors import UserError
from sweeps.trials.ray_tune import TrialListener


def test_a_lost_node_ends_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[dict[str, Any]] = [{"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": False}]
    context = SimpleNamespace(get_node_id=lambda: "a")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(connect, "INTERVAL_S", 0.0)
    listener = TrialListener(lambda *_: None, lambda *_: None)
    # The loss of another node is not that of the command.
    listener.on_step_begin(0, [])
    nodes[0]["Alive"] = False
    with pytest.raises(UserError, match="Ray lost the node of this command"):
        listener.on_step_begin(1, [])


def test_the_head_is_asked_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: pytest.fail("asked"))
    connect.OwnNodeCheck().require_alive()
