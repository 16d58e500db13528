"""Checks of a cluster: the probes of its nodes become findings with advice."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from skillnet_cluster import checked_command
from skillnet_cluster.checks import FREE_DISK_BYTES, GIB, Finding, Level
from skillnet_cluster.checks.gpu_probe import GpuDevice, run_sum
from skillnet_cluster.checks.node_probe import (
    AGAIN,
    NodeProbe,
    probe_nodes,
    run_on_nodes,
    storage_roots,
    tracker_folder,
)
from skillnet_files.entry_points import find_entries
from skillnet_platform import storage
from skillnet_platform.cluster import loopback
from skillnet_platform.cluster.capacity import (
    count_places,
    list_startable_nodes,
    list_startable_types,
)
from skillnet_platform.cluster.gpu_types import NodeType, describe_device
from skillnet_platform.cluster.resource_request import ResourceRequest
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.terminal_text import format_plural
from skillnet_platform.tracking import backend

#: Entry points that say whether runs fit a type of GPU: a function of (runs, GPU), which returns
#: the problem and its remedy, or None.
PLANNERS = "skillnet.planners"


def gpu_nodes(nodes: Sequence[Mapping[str, Any]], seen: Sequence[NodeProbe]) -> list[NodeProbe]:
    """Return the probes of the nodes whose GPUs Ray offers.

    Args:
        nodes: living nodes, as ``ray.nodes()`` lists them.
        seen: probes of the nodes.
    """
    offered = {
        node["NodeManagerAddress"] for node in nodes if node.get("Resources", {}).get("GPU", 0)
    }
    return [each for each in seen if each.node in offered]


def check_gpus(having: Sequence[NodeProbe], request: ResourceRequest) -> list[Finding]:
    """Check driver, build of torch and a product of bf16 matrices on each node with GPUs.

    Args:
        having: probes of the nodes with GPUs.
        request: resources of the run.
    """
    found = [
        Finding("GPU", "error", f"{each.node}: {_missing(each)}", f"install a driver; {AGAIN}")
        for each in having
        if not each.gpu.devices
    ]
    builds: dict[str, list[str]] = {}
    for each in having:
        builds.setdefault(each.gpu.build or "none", []).append(each.node)
    if len(builds) > 1:
        listed = "; ".join(f"torch {name} on {', '.join(on)}" for name, on in builds.items())
        advice = f"install one build of torch on all nodes with GPUs; {AGAIN}"
        found.append(Finding("torch build", "error", listed, advice))
    for each in having:
        for number, device in enumerate(each.gpu.devices):
            found += _check_device(f"{each.node}, GPU {number}", device, request)
    if having and not any(each.level == "error" for each in found):
        kinds = sorted({_describe(each) for each in having})
        on = format_plural(len(having), "node")
        found.append(Finding("GPU", "ok", f"{'; '.join(kinds)} on {on}"))
    return found


def _missing(each: NodeProbe) -> str:
    driver = f"driver {each.gpu.driver}" if each.gpu.driver else "no driver"
    build = f"torch {each.gpu.build}" if each.gpu.build else "torch"
    return f"{build} finds no GPU ({each.gpu.problem or 'no device'}; {driver})"


def _describe(each: NodeProbe) -> str:
    device, count = each.gpu.devices[0], len(each.gpu.devices)
    major, minor = device.capability
    return (
        f"{count} {device.name} with {device.total_bytes / GIB:.1f} GiB "
        f"({device.free_bytes / GIB:.1f} GiB free), compute capability {major}.{minor}, driver "
        f"{each.gpu.driver or 'unknown'}, torch {each.gpu.build}"
    )


def _check_device(place: str, device: GpuDevice, request: ResourceRequest) -> list[Finding]:
    if device.product_problem:
        what = f"{place}: {device.product_problem}"
        return [Finding("GPU", "error", what, "see the log of the driver with `dmesg`")]
    if device.capability < (8, 0) and request.gpus:
        what = f"{place}: {device.name} has no bf16 products; precision auto is fp32"
        return [Finding("GPU", "warning", what, "use a GPU of compute capability 8.0 or later")]
    return []


def check_gpu_memory(
    having: Sequence[NodeProbe],
    growth: Sequence[NodeType],
    request: ResourceRequest,
) -> list[Finding]:
    """Check that the run fits the smallest GPU that the cluster has or may start.

    Args:
        having: probes of the nodes with GPUs.
        growth: types of the nodes that the autoscaler may start.
        request: resources of the run.
    """
    planners = find_entries(PLANNERS)
    if not request.gpus or request.list_runs is None or not planners:
        return []
    kinds = [
        describe_device(device.name, device.total_bytes, device.capability)
        for each in having
        for device in each.gpu.devices
    ]
    kinds += [each.gpu for each in growth if each.gpu is not None and each.most]
    if not kinds:
        return []
    smallest = min(kinds, key=lambda each: each.memory_gb)
    for planner in planners.values():
        try:
            problem = planner.load()(request.list_runs(), smallest)
        except UserError as error:
            return [Finding("GPU memory", "warning", first_line(error), "none needed")]
        if problem is not None:
            what, remedy = problem
            return [Finding("GPU memory", "error", what, f"use {remedy}; see `skillnet plan`")]
    return [Finding("GPU memory", "ok", f"the run fits {smallest.describe()}")]


ENTRY = (
    "--env_from MLFLOW_TRACKING_USERNAME,MLFLOW_TRACKING_PASSWORD, before the command; or "
    "~/.mlflow/credentials on every node"
)


#: Seconds between the clocks of two nodes. Signatures of requests expire after minutes.
CLOCK_ERROR_S = 60


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
        check_state_api(),
        *check_node_versions(seen),
        *check_resources(nodes, request, list_startable_nodes()),
        *check_gpus(having, request),
        *check_gpu_memory(having, list_startable_types(), request),
    ]
    found += [
        *check_authentication(seen, _dashboard(ray)),
        *check_shared_storage(seen, storage_roots(request.locations)),
    ]
    return [
        *found,
        *check_checkpoint_space(seen, request),
        *check_node_trackers(seen, request),
        *check_clocks(seen),
        *check_sums(ray, nodes, seen, request),
    ]


def check_node_versions(seen: Sequence[NodeProbe]) -> list[Finding]:
    """Check that all nodes have the versions of this node and of the job's sender."""
    found = []
    sent, here = checked_command.expected_versions(), checked_command.installed_versions()
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
    needed = checked_command.estimate_checkpoint_bytes(request)
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


def check_clocks(seen: Sequence[NodeProbe]) -> list[Finding]:
    """Check that the clocks of the nodes agree with the clock of this node."""
    furthest = max(seen, key=lambda each: each.clock_error_s)
    if furthest.clock_error_s > CLOCK_ERROR_S:
        what = f"{furthest.node}: {furthest.clock_error_s:.0f} s from the clock of the head"
        advice = "set the clocks by NTP: object stores refuse requests of another time"
        return [Finding("clock", "error", what, advice)]
    return [Finding("clock", "ok", f"{len(seen)} nodes agree within {CLOCK_ERROR_S} s")]


def check_state_api() -> Finding:
    """Query the State API, through which Tune and Train clean up."""
    from ray.util.state import list_nodes

    try:
        return Finding("ray state api", "ok", f"{len(list_nodes(timeout=20))} node(s)")
    except Exception as error:
        advice = "sweeps may stall without it: end other Ray processes of this machine"
        return Finding("ray state api", "warning", first_line(error), advice)


@dataclass(frozen=True)
class SumRole:
    """Part of a node in a sum over two ranks.

    Args:
        ranks: its ranks. On one node each rank has a GPU of its own.
        address: ``HOST:PORT`` of rank 0.
        backend: ``nccl`` or ``gloo``.
        peer: address of the other node.
    """

    ranks: tuple[int, ...]
    address: str
    backend: str
    peer: str


def check_sums(
    ray: Any,
    nodes: Sequence[Mapping[str, Any]],
    seen: Sequence[NodeProbe],
    request: ResourceRequest,
) -> list[Finding]:
    """Add up a tensor over two ranks, so that every node takes part: by NCCL, else by gloo.

    Nodes that cannot reach each other pass every other check, and the first step of a training
    would wait for the time limit.

    Args:
        ray: the ``ray`` module, connected.
        nodes: living nodes, as ``ray.nodes()`` lists them.
        seen: probes of the nodes.
        request: resources of the run.
    """
    having = [each for each in gpu_nodes(nodes, seen) if each.gpu.devices]
    if not having and request.workers < 2:
        return []  # no workers that would add up
    backend = "nccl" if having else "gloo"
    found: list[Finding] = []
    done: set[str] = set()
    for roles in pair_nodes(having or seen, backend):
        places = [node for node in nodes if node["NodeManagerAddress"] in roles]
        answers, problems = run_on_nodes(ray, places, add_up_on_node, roles)
        done |= answers.keys()
        found += problems
        failed = {node: problem for node, problem in sorted(answers.items()) if problem}
        reported: set[str] = set()
        for node, problem in failed.items():
            peer = roles[node].peer
            if peer not in reported:  # both nodes of a pair fail together
                reported.add(node)
                what = f"{backend} between {node} and {peer}: {problem}"
                advice = "open all ports between the nodes, or set SKILLNET_INTERFACE on them"
                found.append(Finding("all-reduce", "error", what, advice))
    if done and not found:
        on = format_plural(len(done), "node")
        found.append(Finding("all-reduce", "ok", f"{backend}: pairs of ranks add up on {on}"))
    return found


def pair_nodes(seen: Sequence[NodeProbe], backend: str) -> list[dict[str, SumRole]]:
    """Return rounds of sums, node -> role: pairs of a round are disjoint and run together.

    NCCL takes no two ranks on one GPU. One node alone adds up if it has two GPUs.

    Args:
        seen: probes of the nodes that take part.
        backend: ``nccl`` or ``gloo``.
    """
    if len(seen) == 1:
        only = seen[0]
        if len(only.gpu.devices) < 2:
            return []
        address = f"{only.node}:{only.free_port}"
        return [{only.node: SumRole((0, 1), address, backend, only.node)}]
    pairs = [(seen[start], seen[start + 1]) for start in range(0, len(seen) - 1, 2)]
    rounds = [pairs] if pairs else []
    if len(seen) % 2 and seen:
        rounds.append([(seen[0], seen[-1])])
    return [
        {
            own.node: SumRole((rank,), f"{first.node}:{first.free_port}", backend, other.node)
            for first, second in pairs
            for rank, (own, other) in enumerate(((first, second), (second, first)))
        }
        for pairs in rounds
    ]


def add_up_on_node(address: str, roles: Mapping[str, SumRole]) -> str:
    """Take part in a sum as one node; return the error or "".

    Args:
        address: address of this node.
        roles: node -> its role.
    """
    role = roles[address]

    def run_rank(rank: int) -> str:
        device = rank if len(role.ranks) > 1 else 0
        return run_sum(rank, 2, role.address, role.backend, device)

    with ThreadPoolExecutor() as threads:
        return next(filter(None, threads.map(run_rank, role.ranks)), "")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
