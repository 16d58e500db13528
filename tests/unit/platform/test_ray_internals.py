"""Private names of Ray are used in one subpackage only, and its policies decide as documented."""

import ast
import logging
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from skillnet_platform.errors import UserError
from skillnet_platform.ray_internals.errors import InsufficientWorkersError, WorkerGroupResize

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "platform/skillnet_platform/ray_internals"
SOURCES = (
    "platform/skillnet_platform",
    "pipelines",
    "sweeps",
    "skillnet",
    "benchmarks",
    "lab",
    "tools",
)

#: Modules of Ray without a leading underscore that its documentation does not name.
UNDOCUMENTED = ("ray.train.v2", "ray.dashboard", "ray.experimental", "ray.core")


def is_hidden(name: str) -> bool:
    """Return whether a part of a dotted name starts with one underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def is_private(name: str) -> bool:
    """Return whether a dotted name of Ray is private or undocumented."""
    undocumented = any(name == each or name.startswith(f"{each}.") for each in UNDOCUMENTED)
    return name.startswith("ray.") and (is_hidden(name) or undocumented)


def dotted(node: ast.expr) -> str:
    """Return ``a.b.c`` of an attribute chain; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (start := dotted(node.value)):
        return f"{start}.{node.attr}"
    return ""


def private_names(path: Path) -> Iterator[str]:
    """Yield the private names of Ray that a source file imports, reads or names in a string."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {"ray": "ray"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Constant) and is_hidden(str(node.value)):
            yield str(node.value)
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            first, _, rest = dotted(node).partition(".")
            start = imported.get(first, "")
            # The name of an imported class stands for its public members.
            if start == "ray" or start.startswith("ray._private") or is_hidden(rest):
                yield f"{start}.{rest}"


def used_in(path: Path) -> set[str]:
    """Return all private names of Ray in a file."""
    return {name for name in private_names(path) if is_private(name)}


@pytest.mark.parametrize("folder", SOURCES)
def test_no_other_module_uses_private_names_of_ray(folder: str) -> None:
    paths = [path for path in (ROOT / folder).rglob("*.py") if PACKAGE not in path.parents]
    found = {str(path.relative_to(ROOT)): used_in(path) for path in paths}
    assert {path: names for path, names in found.items() if names} == {}
    assert used_in(PACKAGE / "elastic.py"), "the search finds them"


def test_the_controller_of_a_training_does_not_import_torch() -> None:
    """Its process would start two seconds later and need 500 MB more."""
    modules = "elastic", "failure_policy"
    names = [f"skillnet_platform.ray_internals.{name}" for name in modules]
    imports = ", ".join(["sys", *names, "pipelines.training.loop.ray_train.rendezvous"])
    script = (
        f"import {imports}; assert 'ray.train' in sys.modules; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=300, check=False).returncode == 0


def test_ray_is_bounded_to_one_minor_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    train = project["optional-dependencies"]["train"]
    (bound,) = [line for line in train if line.startswith("ray[")]
    assert bound == "ray[default,train,tune,data,serve]>=2.60,<2.61"


CLUSTER = {"a": {"CPU": 4.0, "GPU": 1.0}, "b": {"CPU": 1.0}, "c": {"memory": 9.0}}


@pytest.mark.parametrize(
    ("worker", "one_per_node", "expected"),
    [
        ({"CPU": 1.0}, False, {"a": 4, "b": 1, "c": 0}),
        ({"CPU": 1.0}, True, {"a": 1, "b": 1, "c": 0}),
        ({"CPU": 1.5}, False, {"a": 2, "b": 0, "c": 0}),
        ({"CPU": 1.0, "GPU": 1.0}, False, {"a": 1, "b": 0, "c": 0}),
        ({"CPU": 0.0}, True, {"a": 1, "b": 1, "c": 1}),
    ],
)
def test_worker_slots_are_counted_per_node(
    worker: dict[str, float], one_per_node: bool, expected: dict[str, int]
) -> None:
    from skillnet_platform.ray_internals import elastic

    assert elastic.count_worker_slots(CLUSTER, worker, one_per_node) == expected
    free = elastic.count_worker_slots(CLUSTER, {}, one_per_node=False)
    assert min(free.values()) > 1000


def test_a_node_that_refuses_connections_is_lost_although_ray_lists_it() -> None:
    from skillnet_platform.ray_internals import elastic

    with socket.socket() as listening, socket.socket() as bound:
        for each in (listening, bound):
            each.bind(("127.0.0.1", 0))
        listening.listen()
        nodes = [
            {
                "NodeID": name,
                "Alive": alive,
                "NodeManagerAddress": "127.0.0.1",
                "NodeManagerPort": door.getsockname()[1],
                "Resources": {"CPU": 2.0},
            }
            for name, alive, door in [
                ("up", True, listening),
                ("lost", True, bound),
                ("known to be dead", False, listening),
            ]
        ]
        assert elastic.probe_raylets(nodes) == {"up": {"CPU": 2.0}}
    assert elastic.probe_raylets([]) == {}


def test_leaving_nodes_and_failed_sizes_are_avoided_for_a_while() -> None:
    from skillnet_platform.ray_internals import elastic

    state = elastic.PlacementState()
    state.exclude_hosts(["a", "b"], now=100.0)
    assert state.excluded_hosts(100.0 + elastic.LEAVING_NODE_S - 1) == {"a", "b"}
    assert state.excluded_hosts(100.0 + elastic.LEAVING_NODE_S) == set()
    assert state.worker_limit(100.0) == float("inf")
    state.record_failed_size(3, now=100.0)
    assert state.worker_limit(101.0) == 2
    assert state.worker_limit(100.0 + elastic.FAILED_SIZE_S) == float("inf")


def test_policies_restart_lost_nodes_and_raise_user_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2._internal.execution.failure_handling import FailureDecision
    from ray.train.v2.api.config import FailureConfig
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    from skillnet_platform.ray_internals import elastic
    from skillnet_platform.ray_internals.failure_policy import FailFastOnUserError

    monkeypatch.setattr(elastic, "PLACEMENT", elastic.PlacementState(hosts={"a", "b"}))
    nodes = {"a": {"CPU": 1.0}, "b": {"CPU": 1.0}}
    monkeypatch.setattr(elastic, "probe_raylets", lambda listed: nodes)
    monkeypatch.setattr(elastic.ray, "nodes", list)
    retry, end = FailureDecision.RETRY, FailureDecision.RAISE

    def failed(error: Exception) -> WorkerGroupError:
        return WorkerGroupError("words", {1: error})

    for kind in (FailFastOnUserError, elastic.HostLossPolicy):
        policy = kind(FailureConfig(max_failures=1))
        assert policy.make_decision(failed(UserError("the disk is full"))) == end
        assert policy.make_decision(failed(RuntimeError())) == retry
        assert policy.make_decision(failed(RuntimeError())) == end
    policy = elastic.HostLossPolicy(FailureConfig(max_failures=0))
    assert policy.make_decision(failed(WorkerGroupResize(["b"]))) == retry
    assert set(elastic.PLACEMENT.leaving) == {"b"}
    assert policy.make_decision(ControllerError(InsufficientWorkersError())) == end
    policy.make_decision(ControllerError(WorkerGroupStartupTimeoutError(2)))
    assert elastic.PLACEMENT.max_workers == 1
    assert policy.make_decision(failed(RuntimeError())) == end
    del nodes["b"]
    assert policy.make_decision(failed(RuntimeError())) == retry


def test_resize_requests_stay_out_of_the_log() -> None:
    from skillnet_platform.ray_internals import failure_policy

    def record(text: str) -> logging.LogRecord:
        return logging.LogRecord("ray", logging.ERROR, "", 1, text, None, None)

    resize = f"Error in training function:\n{WorkerGroupResize.__module__}.WorkerGroupResize"
    assert not failure_policy.is_not_resize(record(resize))
    assert failure_policy.is_not_resize(record("RuntimeError"))
