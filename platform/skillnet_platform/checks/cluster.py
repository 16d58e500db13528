"""Checks of a cluster: the probes of its nodes become findings with advice."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from skillnet_platform import storage
from skillnet_platform.checks.finding import FREE_DISK_BYTES, Finding, Level
from skillnet_platform.checks.gpu import check_gpu_memory, check_gpus, gpu_nodes
from skillnet_platform.checks.node_probe import (
    AGAIN,
    INTERFACES,
    STORE_PATIENCE_S,
    NodeProbe,
    probe_nodes,
    storage_roots,
    tracker_folder,
)
from skillnet_platform.checks.node_sums import check_sums
from skillnet_platform.cluster import loopback, versions
from skillnet_platform.cluster.capacity import (
    count_places,
    list_startable_nodes,
    list_startable_types,
)
from skillnet_platform.cluster.resource_request import ResourceRequest, estimate_checkpoint_bytes
from skillnet_platform.errors import first_line
from skillnet_platform.storage import directories
from skillnet_platform.storage.location import parse_location
from skillnet_platform.storage.objects import is_uri
from skillnet_platform.storage.retry import PATIENCE_VARIABLE
from skillnet_platform.terminal_text import format_plural
from skillnet_platform.tracking import backend

ENTRY = (
    "--env_from MLFLOW_TRACKING_USERNAME,MLFLOW_TRACKING_PASSWORD, before the command; or "
    "~/.mlflow/credentials on every node"
)


def check_cluster(ray: Any, request: ResourceRequest) -> list[Finding]:
    """Run all checks of the connected cluster.

    Args:
        ray: the ``ray`` module, connected.
        request: resources of the run that the checks are for.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    seen, silent = probe_nodes(ray, nodes, request)
    # The comparisons below need the answers of all nodes.
    if silent:
        return [*silent, *check_resources(nodes, request, list_startable_nodes())]
    having = gpu_nodes(nodes, seen)
    found = [
        *check_node_versions(seen),
        *check_resources(nodes, request, list_startable_nodes()),
        *check_gpus(having, request),
        *check_gpu_memory(having, list_startable_types(), request),
        *check_models(request.models),
    ]
    found += [
        *check_authentication(seen, _dashboard(ray)),
        *check_shared_storage(seen, storage_roots(request.locations)),
    ]
    return [
        *found,
        *check_checkpoint_space(seen, request),
        *check_node_trackers(seen, request),
        *check_interfaces(seen, request),
        *check_sums(ray, nodes, seen, request),
    ]


def check_node_versions(seen: Sequence[NodeProbe]) -> list[Finding]:
    """Check that all nodes have the versions of this node and of the job's sender."""
    found = []
    sent, here = versions.expected_versions(), versions.installed_versions()
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
        advice = "run `skillnet pin-nodes`, then `ray up`"
        found.append(Finding("versions", "warning", what, advice))
    if not found:
        some = ", ".join(f"{name} {here[name]}" for name in ("python", "ray", "torch"))
        found.append(Finding("versions", "ok", f"{some} on {len(seen)} nodes"))
    return found


def check_resources(
    nodes: Sequence[Mapping[str, Any]],
    request: ResourceRequest,
    growth: Sequence[Mapping[str, float]],
) -> list[Finding]:
    """Check that the cluster has CPUs and GPUs for the run, now or after autoscaling.

    Args:
        nodes: living nodes, as ``ray.nodes()`` lists them.
        request: resources of the run.
        growth: resources of each node that the autoscaler may start.
    """
    now = [dict(node.get("Resources", {})) for node in nodes]
    cpus, gpus = (sum(each.get(key, 0) for each in now) for key in ("CPU", "GPU"))
    on = format_plural(len(nodes), "node")
    have = f"{cpus:g} CPUs, {gpus:g} GPUs on {on}; requested: {request.format()}"
    later = check_resources(nodes, request.next_stage, growth) if request.next_stage else []
    return [_resources(now, [*now, *growth], request, have), *later]


def _resources(
    now: Sequence[Mapping[str, float]],
    most: Sequence[Mapping[str, float]],
    request: ResourceRequest,
    have: str,
) -> Finding:
    if count_places(now, request) >= request.workers:
        return Finding("resources", "ok", have)
    if count_places(most, request) >= request.workers:
        advice = "none needed: the autoscaler starts more nodes within minutes"
        return Finding("resources", "warning", have, advice)
    if request.min_workers and (found := count_places(most, request)) >= request.min_workers:
        advice = f"none needed: the run trains with {found} workers, and with more on more nodes"
        return Finding("resources", "warning", have, advice)
    if request.spread and count_places(most, replace(request, spread=False)) >= request.workers:
        advice = (
            f"use placement pack or spread, or have {request.min_workers or request.workers} nodes"
        )
        return Finding("resources", "error", f"too few nodes: {have}", advice)
    advice = "lower --training.workers, or raise max_workers in the cluster's file"
    if request.cpus != 1 or request.gpus not in (0, request.workers):
        advice = f"lower resources.cpus or resources.gpus; or {advice}"
    return Finding("resources", "error", f"never enough: {have}", advice)


def check_authentication(seen: Sequence[NodeProbe], dashboard: str = "") -> list[Finding]:
    """Check that every node and the job server require the token.

    Args:
        seen: probes of the nodes.
        dashboard: address of the job server. Empty skips its check.
    """
    advice = f"set RAY_AUTH_MODE=token in every node's environment; {AGAIN}"
    open_ = [each.node for each in seen if each.auth_mode != "token"]
    if open_:
        # Only users of the same machine reach a loopback address.
        level: Level = "warning" if all(map(loopback.is_loopback_host, open_)) else "error"
        what = f"these nodes run code without a token: {', '.join(open_)}"
        return [Finding("authentication", level, what, advice)]
    if dashboard and _answers_anybody(dashboard):
        what = f"{dashboard} accepts jobs without a token"
        return [Finding("authentication", "error", what, advice)]
    return [Finding("authentication", "ok", "every node requires the token")]


def _dashboard(ray: Any) -> str:
    """Return the address of the cluster's job server; empty if it is unknown."""
    try:
        from skillnet_platform.ray_internals.job_server import find_job_server_url

        return find_job_server_url(ray.get_runtime_context().gcs_address)
    except Exception:  # no dashboard: only the nodes' settings are checked
        return ""


def _answers_anybody(url: str) -> bool:
    """Return whether the job server answers a request without a token."""
    import requests

    try:
        return requests.get(f"{url}/api/jobs/", timeout=10).status_code == 200
    except requests.RequestException:
        return False


def check_shared_storage(seen: Sequence[NodeProbe], places: Sequence[str]) -> list[Finding]:
    """Check that every node writes to the locations and reads the files of the others.

    Args:
        seen: probes of the nodes.
        places: paths and URIs.
    """
    advice = (
        f"set {storage.HOME_VARIABLE} in the cluster's file to a path that all nodes mount, or "
        "name a store: --data s3://… --run_dir s3://…"
    )
    # With different run roots a node does not find the checkpoints of another node.
    if len({each.home for each in seen}) > 1:
        reported = ", ".join(f"{each.node}: {each.home or '(not set)'}" for each in seen)
        return [Finding("storage", "error", reported, advice)]
    failed = [each for each in seen if each.write_problem]
    if failed:
        what = f"cannot be written from {failed[0].node}: {failed[0].write_problem}"
        return [Finding("storage", "error", what, advice)]
    found = []
    for where in sorted(places):
        if blind := _unseen(seen, where):
            found.append(Finding("storage", "error", blind, advice))
        else:
            what = f"{where}: each of {len(seen)} nodes reads the files of all"
            found.append(Finding("storage", "ok", what))
    return found


def check_models(wanted: Sequence[str]) -> list[Finding]:
    """Check that the driver, which runs on this node, finds the models that the run reads."""
    os.environ.setdefault(PATIENCE_VARIABLE, STORE_PATIENCE_S)
    found = []
    for name in wanted:
        try:
            target = parse_location(name, storage.run_root())
            there = (
                target.exists()
                if isinstance(target, Path)
                else bool(directories.list_files(target))
            )
            if not there and not is_uri(name) and (storage.run_root() / name).exists():
                there = True  # a run's name may contain a folder
            seen = name if there else f"{name}: does not exist on the head"
        except Exception as error:
            there, seen = False, f"{name}: {first_line(error)}"
        advice = "" if there else "give a path on the cluster, or the URI of an object store"
        found.append(Finding("model", "ok" if there else "error", seen, advice))
    return found


def _unseen(seen: Sequence[NodeProbe], where: str) -> str:
    """Return a text about a node that does not see another node's file; empty if all do."""
    wanted = {each.node for each in seen}
    for each in seen:
        for missing in sorted(wanted - set(each.files_seen.get(where, []))):
            return f"{where}: {each.node} does not see the file of {missing}"
    return ""


def check_checkpoint_space(
    seen: Sequence[NodeProbe], request: ResourceRequest | None = None
) -> list[Finding]:
    """Check the free space for checkpoints on every node."""
    request = request or ResourceRequest()
    least = min(seen, key=lambda each: each.free_bytes)
    free = storage.human_bytes(least.free_bytes)
    advice = (
        "free space, keep fewer checkpoints (--training.keep_checkpoints 1), or use a larger disk"
    )
    needed = estimate_checkpoint_bytes(request)
    if needed > least.free_bytes:
        what = f"{free} free on {least.node}; the run needs {storage.human_bytes(needed)}"
        return [Finding("checkpoints", "error", what, advice)]
    if least.free_bytes < FREE_DISK_BYTES and not needed:
        return [Finding("checkpoints", "warning", f"{free} free on {least.node}", advice)]
    return [Finding("checkpoints", "ok", f"at least {free} free")]


def check_node_trackers(
    seen: Sequence[NodeProbe], request: ResourceRequest | None = None
) -> list[Finding]:
    """Check that every node reaches the MLflow server and has its credentials."""
    records = request is not None and request.uses_tracker
    for each in seen:
        if each.tracker_problem:
            advice = f"{backend.URI_VARIABLE} must name an address that every node reaches"
            what = f"{each.node}: {each.tracker_problem}"
            return [Finding("tracker on nodes", "error", what, advice)]
        if each.access_problem:
            level: Level = "error" if records else "warning"
            return [
                Finding("tracker on nodes", level, f"{each.node}: {each.access_problem}", ENTRY)
            ]
    uri = backend.resolve_uri()
    if len(seen) > 1 and not uri.startswith("http"):
        advice = f"start `skillnet tracker` and set {backend.URI_VARIABLE} in the cluster's file"
        if blind := _unseen(seen, tracker_folder()):
            return [Finding("tracker on nodes", "error", f"{uri}: a file. {blind}", advice)]
        what = f"{uri}: a file, to which several nodes would write"
        return [Finding("tracker on nodes", "warning", what, advice)]
    return [Finding("tracker on nodes", "ok", uri)]


def check_interfaces(seen: Sequence[NodeProbe], request: ResourceRequest) -> list[Finding]:
    """Check the network interface by which gloo and NCCL connect workers of different nodes."""
    if len(seen) < 2:
        return []
    # NCCL connects GPUs only.
    wanted = INTERFACES if request.gpus else INTERFACES[:1]
    for each in seen:
        for name in wanted:
            interface = each.interfaces.get(name, "")
            # gloo resolves the name. On Debian it is 127.0.1.1, and workers of two nodes never
            # meet.
            if not interface and each.name_resolves_to.startswith("127."):
                what = (
                    f"{each.node}: its name resolves to {each.name_resolves_to}; {name} is not set"
                )
                advice = f"the workers would not find each other; {AGAIN}"
                return [Finding("interface", "error", what, advice)]
            if interface and each.addresses.get(interface) != each.node:
                known = f"{name}={interface} has {each.addresses.get(interface) or 'no address'}"
                what = f"{each.node}: {known}, the cluster knows it as {each.node}"
                advice = "set SKILLNET_INTERFACE on that node to the interface of that address"
                return [Finding("interface", "error", what, advice)]
    reported = ", ".join(f"{e.node} by {e.interfaces.get(wanted[0]) or 'its name'}" for e in seen)
    return [Finding("interface", "ok", reported)]


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
