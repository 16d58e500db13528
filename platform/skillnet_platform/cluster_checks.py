"""Checks of a cluster, made from inside it: one task on each node looks around and tells.

Each finding names what was seen, and what to do about it.
"""

import contextlib
import math
import os
import secrets
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from skillnet_platform import remote, storage, store, versions
from skillnet_platform.errors import first_line
from skillnet_platform.needs import Needs
from skillnet_platform.places import below, place
from skillnet_platform.preflight import FREE_DISK_BYTES, Finding
from skillnet_platform.remote_errors import PATIENCE_VARIABLE
from skillnet_platform.remote_objects import is_uri

#: Where `ray up` leaves the cluster's file on the head: what the autoscaler may still start.
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
#: A node's first task starts a process that imports what it needs.
NODE_TIMEOUT_S = 300.0
#: A node that looks at a store waits no longer for it.
STORE_PATIENCE_S = "10"
AGAIN = "run `ray up` again: it runs platform/deploy/setup_node.sh on every node"


@dataclass(frozen=True)
class Seen:
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


def cluster_findings(ray: Any, asked: Needs) -> list[Finding]:
    """All checks of the cluster that ``ray`` is connected to, for a run that asks for that."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    seen, silent = _look_everywhere(ray, nodes, asked.places)
    if silent:
        return [*silent, *enough(nodes, asked, _growth())]
    found = [*same_versions(seen), *enough(nodes, asked, _growth()), *models(asked.models)]
    found += [*authentication(seen), *shared_storage(seen, _roots(asked.places)), *room(seen)]
    return [*found, *trackers(seen), *meeting(seen, asked)]


def _look_everywhere(
    ray: Any, nodes: Sequence[Mapping[str, Any]], places: Sequence[str]
) -> tuple[list[Seen], list[Finding]]:
    """One task a node: first each leaves a file in the storage, then each says what it sees."""
    if tracker := _tracker_folder():
        places = list(dict.fromkeys([*_roots(places), tracker]))
    folder = f".doctor-{secrets.token_hex(4)}"
    written, problems = _on_each(ray, nodes, _leave_file, folder, places)
    seen: dict[str, Any] = {}
    if not problems:  # a node that is silent says nothing about the storage of the others
        seen, problems = _on_each(ray, nodes, _look_around, folder, places)
    _clean_up(folder, places)
    told = [Seen(**answer, write_problem=written[node]) for node, answer in seen.items()]
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
    for where in _roots(places):
        try:
            target = below(place(where, storage.run_root()), folder, address)
            if isinstance(target, Path):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(address, encoding="utf-8")
            else:
                remote.write_bytes(target, address.encode())
        except Exception as problem:
            return f"{where}: {first_line(problem)}"
    return ""


def _look_around(address: str, folder: str, places: Sequence[str]) -> dict[str, Any]:
    import psutil

    addresses = {
        name: next((each.address for each in have if each.family == socket.AF_INET), "")
        for name, have in psutil.net_if_addrs().items()
    }
    try:
        resolved = socket.gethostbyname(socket.gethostname())
    except OSError as problem:
        resolved = str(problem)
    return {
        "node": address,
        "versions": versions.installed(),
        "auth_mode": os.environ.get("RAY_AUTH_MODE", "(not set)"),
        "interfaces": {name: os.environ.get(name, "") for name in INTERFACES},
        "addresses": addresses,
        "name_resolves_to": resolved,
        "home": os.environ.get(storage.HOME_VARIABLE, ""),
        "files_seen": {where: _files_in(where, folder) for where in _roots(places)},
        "free_bytes": storage.free_bytes(storage.run_root()),
        "tracker_problem": _tracker_problem(),
    }


def _roots(places: Sequence[str]) -> list[str]:
    """Where a run reads and writes: the places that it names, the run root where it names none."""
    return list(dict.fromkeys(str(name or storage.run_root()) for name in places or [""]))


def _tracker_folder() -> str:
    """The folder of a tracker that is a file; empty if it is a server."""
    uri = store.resolve_uri()
    return str(Path(uri.removeprefix("sqlite:///")).parent) if uri.startswith("sqlite:") else ""


def _files_in(where: str, folder: str) -> list[str]:
    os.environ.setdefault(PATIENCE_VARIABLE, STORE_PATIENCE_S)
    try:
        target = below(place(where, storage.run_root()), folder)
        if isinstance(target, Path):
            return sorted(path.read_text(encoding="utf-8") for path in target.iterdir())
        names = [entry.name for entry in remote.list_files(target)]
        return sorted(remote.read_bytes(remote.join(target, name)).decode() for name in names)
    except Exception:  # shows as files that are not seen
        return []


def _clean_up(folder: str, places: Sequence[str]) -> None:
    for where in _roots(places):
        with contextlib.suppress(Exception):  # a finding already
            target = below(place(where, storage.run_root()), folder)
            if isinstance(target, Path):
                shutil.rmtree(target)
            else:
                remote.remove_directory(target)


def _tracker_problem() -> str:
    try:
        uri = store.resolve_uri()
        if uri.startswith("http"):
            store.require_answer(uri)
    except ValueError as problem:
        return str(problem)
    return ""


def same_versions(seen: Sequence[Seen]) -> list[Finding]:
    """All nodes have the versions of the node that runs this, and those of the sender."""
    found = []
    sent, here = versions.expected(), versions.installed()
    for each in seen:
        for name, version in each.versions.items():
            if version != here[name]:
                what = f"{name} {version or 'is missing'} on {each.node}, {here[name]} on the head"
                found.append(Finding("versions", "error", what, AGAIN))
    for name, version in sent.items():
        have = here.get(name, "")
        if version == have or (name == "python" and _minor(version) == _minor(have)):
            continue
        what = f"{name} {have or 'is missing'} on the cluster, {version} where the job was sent"
        advice = "pin anew (python -m skillnet_platform.environment), then `ray up`"
        found.append(Finding("versions", "warning", what, advice))
    if not found:
        some = ", ".join(f"{name} {here[name]}" for name in ("python", "ray", "torch"))
        found.append(Finding("versions", "ok", f"{some} on {len(seen)} nodes"))
    return found


def enough(
    nodes: Sequence[Mapping[str, Any]], asked: Needs, growth: Sequence[Mapping[str, float]]
) -> list[Finding]:
    """CPUs and GPUs for the run: now, or once the autoscaler has started what it may."""
    now = [dict(node.get("Resources", {})) for node in nodes]
    cpus, gpus = (sum(each.get(key, 0) for each in now) for key in ("CPU", "GPU"))
    on = "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"
    have = f"{cpus:g} CPUs, {gpus:g} GPUs on {on}; asked: {asked.words()}"
    later = enough(nodes, asked.then, growth) if asked.then else []
    return [_resources(now, [*now, *growth], asked, have), *later]


def _resources(
    now: Sequence[Mapping[str, float]],
    most: Sequence[Mapping[str, float]],
    asked: Needs,
    have: str,
) -> Finding:
    if _places(now, asked) >= asked.workers:
        return Finding("resources", "ok", have)
    if _places(most, asked) >= asked.workers:
        advice = "nothing: the autoscaler starts more nodes, which takes minutes"
        return Finding("resources", "warning", have, advice)
    if asked.least and (found := _places(most, asked)) >= asked.least:
        advice = f"nothing: the run trains with {found}, and with more when there are hosts"
        return Finding("resources", "warning", have, advice)
    if asked.spread and _places(most, replace(asked, spread=False)) >= asked.workers:
        advice = f"use placement pack or spread, or have {asked.least or asked.workers} nodes"
        return Finding("resources", "error", f"too few nodes: {have}", advice)
    advice = "lower --training.workers, or raise max_workers in the cluster's file"
    if asked.cpus != 1 or asked.gpus not in (0, asked.workers):
        advice = f"lower resources.cpus or resources.gpus; or {advice}"
    return Finding("resources", "error", f"never enough: {have}", advice)


def _places(nodes: Sequence[Mapping[str, float]], asked: Needs) -> int:
    """For how many of the workers there is a place at once."""
    gpus = asked.gpus / asked.workers
    found = [
        # As in Ray, three tenths three times are nine tenths.
        int(
            min(
                node.get("CPU", 0) / asked.cpus + 1e-6,
                node.get("GPU", 0) / gpus + 1e-6 if gpus else math.inf,
            )
        )
        for node in nodes
    ]
    return sum(min(count, 1) if asked.spread else count for count in found)


def _growth() -> list[dict[str, float]]:
    """Resources of the nodes that the autoscaler may start, from the file `ray up` left here."""
    try:
        told = yaml.safe_load(BOOTSTRAP.expanduser().read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return []
    if told["provider"]["type"] == "local":
        return []  # machines one owns are there or not
    kinds = told.get("available_node_types", {})
    most = [
        (kind.get("resources", {}), kind.get("max_workers", 0))
        for name, kind in kinds.items()
        if name != told.get("head_node_type")
    ]
    return [dict(resources) for resources, count in most for _ in range(count)]


def authentication(seen: Sequence[Seen]) -> list[Finding]:
    """Every node asks for the token."""
    open_ = [each.node for each in seen if each.auth_mode != "token"]
    if not open_:
        return [Finding("authentication", "ok", "by token on every node")]
    advice = f"RAY_AUTH_MODE=token belongs into every node's environment; {AGAIN}"
    what = f"whoever reaches these nodes may run code there: {', '.join(open_)}"
    return [Finding("authentication", "warning", what, advice)]


def shared_storage(seen: Sequence[Seen], places: Sequence[str]) -> list[Finding]:
    """Every node writes to those places and reads what the others wrote."""
    advice = (
        f"set {storage.HOME_VARIABLE} in the cluster's file to a path that all nodes mount, or "
        "name a store: --data s3://… --run_dir s3://…"
    )
    if len({each.home for each in seen}) > 1:
        told = ", ".join(f"{each.node}: {each.home or '(not set)'}" for each in seen)
        return [Finding("storage", "error", told, advice)]
    failed = [each for each in seen if each.write_problem]
    if failed:
        what = f"cannot be written from {failed[0].node}: {failed[0].write_problem}"
        return [Finding("storage", "error", what, advice)]
    found = []
    for where in sorted(places):
        if blind := _unseen(seen, where):
            found.append(Finding("storage", "error", blind, advice))
        else:
            what = f"{where}: each of {len(seen)} nodes reads what all wrote"
            found.append(Finding("storage", "ok", what))
    return found


def models(wanted: Sequence[str]) -> list[Finding]:
    """The driver, which runs on this node, finds the models that the run starts from."""
    os.environ.setdefault(PATIENCE_VARIABLE, STORE_PATIENCE_S)
    found = []
    for name in wanted:
        try:
            target = place(name, storage.run_root())
            there = target.exists() if isinstance(target, Path) else bool(remote.list_files(target))
            if not there and not is_uri(name) and (storage.run_root() / name).exists():
                there = True  # a run's name may have a folder before it
            seen = name if there else f"{name}: not there, as seen from the head"
        except Exception as problem:
            there, seen = False, f"{name}: {first_line(problem)}"
        advice = "" if there else "a path on the cluster, or the URI of a place in a store"
        found.append(Finding("model", "ok" if there else "error", seen, advice))
    return found


def _unseen(seen: Sequence[Seen], where: str) -> str:
    """Words on a node that does not see what another one wrote in a place; empty if all do."""
    wanted = {each.node for each in seen}
    for each in seen:
        for missing in sorted(wanted - set(each.files_seen.get(where, []))):
            return f"{where}: {each.node} does not see what {missing} wrote there"
    return ""


def room(seen: Sequence[Seen]) -> list[Finding]:
    """Space for checkpoints in the run root of every node."""
    least = min(seen, key=lambda each: each.free_bytes)
    free = storage.human_bytes(least.free_bytes)
    if least.free_bytes < FREE_DISK_BYTES:
        advice = "free some, keep fewer checkpoints (--training.keep 1), or use a larger disk"
        return [Finding("checkpoints", "warning", f"{free} free on {least.node}", advice)]
    return [Finding("checkpoints", "ok", f"at least {free} free")]


def trackers(seen: Sequence[Seen]) -> list[Finding]:
    """Every node reaches the MLflow server."""
    for each in seen:
        if each.tracker_problem:
            advice = f"{store.URI_VARIABLE} must name an address that every node reaches"
            what = f"{each.node}: {each.tracker_problem}"
            return [Finding("tracker on nodes", "error", what, advice)]
    uri = store.resolve_uri()
    if len(seen) > 1 and not uri.startswith("http"):
        advice = f"start `skillnet tracker` and set {store.URI_VARIABLE} in the cluster's file"
        if blind := _unseen(seen, _tracker_folder()):
            return [Finding("tracker on nodes", "error", f"{uri}: a file. {blind}", advice)]
        what = f"{uri}: a file, to which several nodes would write"
        return [Finding("tracker on nodes", "warning", what, advice)]
    return [Finding("tracker on nodes", "ok", uri)]


def meeting(seen: Sequence[Seen], asked: Needs) -> list[Finding]:
    """Workers on different nodes find each other: gloo and NCCL need the right interface."""
    if len(seen) < 2:
        return []
    wanted = INTERFACES if asked.gpus else INTERFACES[:1]
    for each in seen:
        for name in wanted:
            interface = each.interfaces.get(name, "")
            if not interface and each.name_resolves_to.startswith("127."):
                what = f"{each.node}: its name leads to {each.name_resolves_to}, {name} is not set"
                advice = f"the workers would wait for each other for ever; {AGAIN}"
                return [Finding("interface", "error", what, advice)]
            if interface and each.addresses.get(interface) != each.node:
                known = f"{name}={interface} has {each.addresses.get(interface) or 'no address'}"
                what = f"{each.node}: {known}, the cluster knows it as {each.node}"
                advice = "set SKILLNET_INTERFACE on that node to the interface of that address"
                return [Finding("interface", "error", what, advice)]
    told = ", ".join(f"{e.node} by {e.interfaces.get(wanted[0]) or 'its name'}" for e in seen)
    return [Finding("interface", "ok", told)]


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
