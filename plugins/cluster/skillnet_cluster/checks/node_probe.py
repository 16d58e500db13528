"""Probe of every node of a cluster: one task per node reports versions, storage and network."""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from skillnet_cluster import checked_command
from skillnet_cluster.checks import Finding
from skillnet_cluster.checks.gpu_probe import GpuProbe, probe_gpus
from skillnet_platform import storage
from skillnet_platform.cluster.loopback import choose_port
from skillnet_platform.cluster.resource_request import ResourceRequest
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.storage import directories
from skillnet_platform.storage.location import join_location, parse_location
from skillnet_platform.storage.retry import PATIENCE_VARIABLE
from skillnet_platform.tracking import backend
from skillnet_platform.tracking.backend import is_sqlite, sqlite_path

#: Seconds for a node's answer. Its first task starts a process and imports packages.
NODE_TIMEOUT_S = 300.0
#: Seconds of retries for an object store during a probe.
STORE_PATIENCE_S = "10"
AGAIN = "run `ray up` again, which runs platform/deploy/setup_node.sh on every node"


@dataclass(frozen=True)
class NodeProbe:
    """Observations of one node, as plain values for the transfer.

    Args:
        node: address of the node.
        versions: package -> version.
        auth_mode: value of RAY_AUTH_MODE.
        home: value of SKILLNET_HOME.
        write_problem: error of a write to the storage; empty if it worked.
        files_seen: location -> addresses of the nodes whose files this node read.
        free_bytes: free bytes of the directory of runs.
        tracker_problem: error of a request to the tracker; empty if it worked.
        access_problem: error about the tracker's credentials; empty if it worked.
        gpu: torch's build and the GPUs, on a node whose GPUs Ray offers.
        free_port: a port that no process of the node used.
        clock_error_s: seconds by which its clock surely differs from that of the head.
    """

    node: str
    versions: dict[str, str]
    auth_mode: str
    home: str
    write_problem: str
    files_seen: dict[str, list[str]]
    free_bytes: int
    tracker_problem: str
    access_problem: str = ""
    gpu: GpuProbe = field(default_factory=GpuProbe)
    free_port: int = 0
    clock_error_s: float = 0.0


def probe_nodes(
    ray: Any, nodes: Sequence[Mapping[str, Any]], request: ResourceRequest
) -> tuple[list[NodeProbe], list[Finding]]:
    """Run two tasks on every node: write a file to the storage, then report observations.

    Args:
        ray: the ``ray`` module, connected.
        nodes: living nodes, as ``ray.nodes()`` lists them.
        request: locations and directory of the run.

    Returns:
        Probes sorted by node, and findings about nodes that failed.
    """
    locations: Sequence[str] = request.locations
    if folder_of_tracker := tracker_folder():
        locations = list(dict.fromkeys([*storage_roots(locations), folder_of_tracker]))
    # Two checks may run at the same time in one store.
    folder = f".doctor-{secrets.token_hex(4)}"
    written, problems = run_on_nodes(ray, nodes, _leave_file, folder, locations)
    seen: dict[str, Any] = {}
    before = time.time()
    if not problems:  # without a node's file the other nodes cannot look for it
        with_gpus = [
            node["NodeManagerAddress"] for node in nodes if node.get("Resources", {}).get("GPU", 0)
        ]
        seen, problems = run_on_nodes(
            ray, nodes, _look_around, folder, locations, request.run_dir, with_gpus
        )
    after = time.time()
    _clean_up(folder, locations)
    probes = []
    for node, answer in seen.items():
        gpu, clock = GpuProbe.from_dict(answer.pop("gpu")), answer.pop("clock_s")
        # The node read its clock at some time between the two.
        error = max(before - clock, clock - after, 0.0)
        probes.append(
            NodeProbe(**answer, gpu=gpu, clock_error_s=error, write_problem=written[node])
        )
    return sorted(probes, key=lambda each: each.node), problems


def run_on_nodes(
    ray: Any, nodes: Sequence[Mapping[str, Any]], function: Any, *arguments: Any
) -> tuple[dict[str, Any], list[Finding]]:
    """Call ``function(address, *arguments)`` on every node, at the same time.

    Args:
        ray: the ``ray`` module, connected.
        nodes: as ``ray.nodes()`` lists them.
        function: a module's function.
        *arguments: plain values.

    Returns:
        Address -> answer, and findings about nodes that failed.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    tasks = {}
    for node in nodes:
        # Not soft: an answer from another node would hide the problem.
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        # Without a CPU the probe runs on a busy node; without retries a failure is a finding.
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(function)
        tasks[task.remote(node["NodeManagerAddress"], *arguments)] = node["NodeManagerAddress"]
    done, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=NODE_TIMEOUT_S)
    answers, problems = {}, []
    for task in done:
        try:
            answers[tasks[task]] = ray.get(task)
        except Exception as error:
            text = str(error).strip().rsplit("\n", 1)[-1][:200]
            problems.append(Finding("node", "error", f"{tasks[task]}: {text}", AGAIN))
    for task in late:
        advice = "see `ray status`, and the logs of its raylet"
        what = f"{tasks[task]} did not answer within {NODE_TIMEOUT_S:.0f} s"
        problems.append(Finding("node", "error", what, advice))
    return answers, problems


def _leave_file(address: str, folder: str, places: Sequence[str]) -> str:
    """Write a file named after this node into each location; return the error or ""."""
    # A check reports a dead store soon instead of after the usual two minutes.
    os.environ.setdefault(PATIENCE_VARIABLE, STORE_PATIENCE_S)
    for where in storage_roots(places):
        try:
            target = join_location(parse_location(where, storage.run_root()), folder, address)
            if isinstance(target, Path):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(address, encoding="utf-8")
            else:
                directories.write_bytes(target, address.encode())
        except Exception as error:
            return f"{where}: {first_line(error)}"
    return ""


def _look_around(
    address: str,
    folder: str,
    places: Sequence[str],
    run_dir: str = "",
    with_gpus: Sequence[str] = (),
) -> dict[str, Any]:
    away, access = _tracker_problems()
    return {
        "node": address,
        "versions": checked_command.installed_versions(),
        "auth_mode": os.environ.get("RAY_AUTH_MODE", "(not set)"),
        "home": os.environ.get(storage.HOME_VARIABLE, ""),
        "files_seen": {where: _files_in(where, folder) for where in storage_roots(places)},
        "free_bytes": storage.free_bytes(checked_command.runs_directory(run_dir)),
        "tracker_problem": away,
        "access_problem": access,
        # The process of the probe takes seconds, so only nodes with GPUs start it.
        "gpu": asdict(probe_gpus() if address in with_gpus else GpuProbe()),
        "free_port": choose_port("", 0),
        "clock_s": time.time(),
    }


def storage_roots(places: Sequence[str]) -> list[str]:
    """Return the locations of a run, with the run root for an empty name or none."""
    return list(dict.fromkeys(str(name or storage.run_root()) for name in places or [""]))


def tracker_folder() -> str:
    """Return the folder of a tracker that is a file; empty for a server."""
    uri = backend.resolve_uri()
    return str(sqlite_path(uri).parent) if is_sqlite(uri) else ""


def _files_in(where: str, folder: str) -> list[str]:
    os.environ.setdefault(PATIENCE_VARIABLE, STORE_PATIENCE_S)
    try:
        target = join_location(parse_location(where, storage.run_root()), folder)
        if isinstance(target, Path):
            return sorted(path.read_text(encoding="utf-8") for path in target.iterdir())
        names = [entry.name for entry in directories.list_files(target)]
        return sorted(
            directories.read_bytes(directories.join_uri(target, name)).decode() for name in names
        )
    except Exception:  # the missing files become a finding
        return []


def _clean_up(folder: str, places: Sequence[str]) -> None:
    for where in storage_roots(places):
        with contextlib.suppress(Exception):  # the probe reports the error
            target = join_location(parse_location(where, storage.run_root()), folder)
            if isinstance(target, Path):
                shutil.rmtree(target)
            else:
                directories.remove_directory(target)


def _tracker_problems() -> tuple[str, str]:
    """Return the error of a request to the tracker, and the error about its credentials."""
    try:
        uri = backend.resolve_uri()
        if uri.startswith("http"):
            backend.require_answer(uri)
    except ValueError as error:
        return str(error), ""
    try:
        require_access(uri)
    except ValueError as error:
        return "", str(error)
    return "", ""


def require_access(uri: str) -> None:
    """Check that a tracker accepts the user and password of the environment.

    Raises:
        UserError: the tracker requires a password, refuses the password, or fails.
    """
    if not uri.startswith("http"):
        return
    backend.prepare_mlflow_environment()
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import read_mlflow_creds

    try:
        backend.create_client(uri).search_experiments(max_results=1)
    except MlflowException as error:
        if error.error_code not in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise UserError(f"tracking.uri {uri}: {first_line(error)}") from None
        user = read_mlflow_creds().username
        raise UserError(
            f"tracking.uri {uri}: the server refuses the user {user} with this password"
            if user
            else f"tracking.uri {uri}: the server asks for a password, and none is set"
        ) from None
