"""Each node of a cluster looks around and tells what it sees, in a task of its own."""

import contextlib
import os
import secrets
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillnet_platform import storage
from skillnet_platform.checks.finding import Finding
from skillnet_platform.cluster import versions
from skillnet_platform.cluster.resource_request import ResourceRequest, runs_directory
from skillnet_platform.errors import first_line
from skillnet_platform.storage import directories
from skillnet_platform.storage.location import join_location, parse_location
from skillnet_platform.storage.retry import PATIENCE_VARIABLE
from skillnet_platform.tracking import backend

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
#: A node's first task starts a process that imports what it needs.
NODE_TIMEOUT_S = 300.0
#: A node that looks at a store waits no longer for it.
STORE_PATIENCE_S = "10"
AGAIN = "run `ray up` again: it runs platform/deploy/setup_node.sh on every node"


@dataclass(frozen=True)
class NodeProbe:
    """What one node saw; plain values, because it crosses the cluster."""

    node: str
    versions: dict[str, str]
    auth_mode: str
    interfaces: dict[str, str]
    addresses: dict[str, str]
    name_resolves_to: str
    home: str
    write_problem: str
    files_seen: dict[str, list[str]]
    free_bytes: int
    tracker_problem: str
    access_problem: str = ""


def probe_nodes(
    ray: Any, nodes: Sequence[Mapping[str, Any]], request: ResourceRequest
) -> tuple[list[NodeProbe], list[Finding]]:
    """One task a node: first each leaves a file in the storage, then each says what it sees."""
    places: Sequence[str] = request.locations
    if folder_of_tracker := tracker_folder():
        places = list(dict.fromkeys([*storage_roots(places), folder_of_tracker]))
    folder = f".doctor-{secrets.token_hex(4)}"
    written, problems = _on_each(ray, nodes, _leave_file, folder, places)
    seen: dict[str, Any] = {}
    if not problems:  # a node that is silent says nothing about the storage of the others
        seen, problems = _on_each(ray, nodes, _look_around, folder, places, request.run_dir)
    _clean_up(folder, places)
    told = [NodeProbe(**answer, write_problem=written[node]) for node, answer in seen.items()]
    return sorted(told, key=lambda each: each.node), problems


def _on_each(
    ray: Any, nodes: Sequence[Mapping[str, Any]], function: Any, *arguments: Any
) -> tuple[dict[str, Any], list[Finding]]:
    """Call ``function(address, *arguments)`` on every node; answers by address, and problems."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    tasks = {}
    for node in nodes:
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(function)
        tasks[task.remote(node["NodeManagerAddress"], *arguments)] = node["NodeManagerAddress"]
    done, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=NODE_TIMEOUT_S)
    answers, problems = {}, []
    for task in done:
        try:
            answers[tasks[task]] = ray.get(task)
        except Exception as problem:
            text = str(problem).strip().rsplit("\n", 1)[-1][:200]
            problems.append(Finding("node", "error", f"{tasks[task]}: {text}", AGAIN))
    for task in late:
        advice = "see `ray status`, and the logs of its raylet"
        what = f"{tasks[task]} did not answer within {NODE_TIMEOUT_S:.0f} s"
        problems.append(Finding("node", "error", what, advice))
    return answers, problems


def _leave_file(address: str, folder: str, places: Sequence[str]) -> str:
    """Write a file named after this node into each place; what went wrong, or nothing."""
    os.environ.setdefault(PATIENCE_VARIABLE, STORE_PATIENCE_S)
    for where in storage_roots(places):
        try:
            target = join_location(parse_location(where, storage.run_root()), folder, address)
            if isinstance(target, Path):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(address, encoding="utf-8")
            else:
                directories.write_bytes(target, address.encode())
        except Exception as problem:
            return f"{where}: {first_line(problem)}"
    return ""


def _look_around(
    address: str, folder: str, places: Sequence[str], run_dir: str = ""
) -> dict[str, Any]:
    import psutil

    addresses = {
        name: next((each.address for each in have if each.family == socket.AF_INET), "")
        for name, have in psutil.net_if_addrs().items()
    }
    try:
        resolved = socket.gethostbyname(socket.gethostname())
    except OSError as problem:
        resolved = str(problem)
    away, access = _tracker_problems()
    return {
        "node": address,
        "versions": versions.installed_versions(),
        "auth_mode": os.environ.get("RAY_AUTH_MODE", "(not set)"),
        "interfaces": {name: os.environ.get(name, "") for name in INTERFACES},
        "addresses": addresses,
        "name_resolves_to": resolved,
        "home": os.environ.get(storage.HOME_VARIABLE, ""),
        "files_seen": {where: _files_in(where, folder) for where in storage_roots(places)},
        "free_bytes": storage.free_bytes(runs_directory(run_dir)),
        "tracker_problem": away,
        "access_problem": access,
    }


def storage_roots(places: Sequence[str]) -> list[str]:
    """Where a run reads and writes: the places that it names, the run root where it names none."""
    return list(dict.fromkeys(str(name or storage.run_root()) for name in places or [""]))


def tracker_folder() -> str:
    """The folder of a tracker that is a file; empty if it is a server."""
    uri = backend.resolve_uri()
    return str(Path(uri.removeprefix("sqlite:///")).parent) if uri.startswith("sqlite:") else ""


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
    except Exception:  # shows as files that are not seen
        return []


def _clean_up(folder: str, places: Sequence[str]) -> None:
    for where in storage_roots(places):
        with contextlib.suppress(Exception):  # a finding already
            target = join_location(parse_location(where, storage.run_root()), folder)
            if isinstance(target, Path):
                shutil.rmtree(target)
            else:
                directories.remove_directory(target)


def _tracker_problems() -> tuple[str, str]:
    """What keeps this node from the tracker; and from what is behind the tracker's password."""
    try:
        uri = backend.resolve_uri()
        if uri.startswith("http"):
            backend.require_answer(uri)
    except ValueError as problem:
        return str(problem), ""
    try:
        backend.require_access(uri)
    except ValueError as problem:
        return "", str(problem)
    return "", ""
