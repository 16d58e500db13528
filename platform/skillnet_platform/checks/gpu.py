"""Checks of the GPUs of a cluster: driver, build of torch, a product, and memory for the run."""

from collections.abc import Mapping, Sequence
from typing import Any

from skillnet_files.entry_points import find_entries
from skillnet_platform.checks import GIB, Finding
from skillnet_platform.checks.gpu_probe import GpuDevice
from skillnet_platform.checks.node_probe import AGAIN, NodeProbe
from skillnet_platform.cluster.gpu_types import describe_device
from skillnet_platform.cluster.node_types import NodeType
from skillnet_platform.cluster.resource_request import ResourceRequest
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.terminal_text import format_plural

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
