"""Capacity of a cluster: how many workers of a request its nodes hold, now or after autoscaling.

Commands call :func:`require_gpus` before they start workers. The driver may run on a node without
a GPU, so the cluster is asked, not this process. ``skillnet doctor`` uses the same counts.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from skillnet_platform import console
from skillnet_platform.cluster.connect import prepare_ray_environment, ray_session
from skillnet_platform.cluster.gpu_types import NodeType, read_node_types
from skillnet_platform.cluster.resource_request import ResourceRequest
from skillnet_platform.errors import UserError

#: Where `ray up` leaves the cluster's file on the head: what the autoscaler may still start.
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
#: Resources of one node, such as ``{"CPU": 8, "GPU": 1}``.
NodeResources = Mapping[str, float]
#: CPUs that a worker with a GPU reserves at most: threads that build its batches.
MOST_CPUS_PER_GPU = 8


def count_places(nodes: Sequence[NodeResources], request: ResourceRequest) -> int:
    """Return the number of workers of a request that fit at the same time.

    Args:
        nodes: resources of each node.
        request: CPUs and GPUs of the workers, and whether each needs a node of its own.
    """
    gpus = request.gpus / request.workers
    found = [
        # As in Ray, 3 × 0.3 CPUs fit into 0.9 CPUs.
        int(
            min(
                node.get("CPU", 0) / request.cpus + 1e-6,
                node.get("GPU", 0) / gpus + 1e-6 if gpus else math.inf,
            )
        )
        for node in nodes
    ]
    return sum(min(count, 1) if request.spread else count for count in found)


def list_living_nodes(ray: Any) -> list[dict[str, float]]:
    """Return the resources of each living node.

    Args:
        ray: the ``ray`` module, connected.
    """
    return [dict(node.get("Resources", {})) for node in ray.nodes() if node["Alive"]]


def list_startable_types() -> list[NodeType]:
    """Return the types of nodes that the autoscaler may start, from `ray up`'s file."""
    try:
        return read_node_types(BOOTSTRAP)
    except UserError:
        return []  # this cluster was not started by `ray up`


def list_startable_nodes() -> list[dict[str, float]]:
    """Return the resources of each node that the autoscaler may start, from `ray up`'s file."""
    return [dict(kind.resources) for kind in list_startable_types() for _ in range(kind.most)]


def share_of_cpus(nodes: Sequence[NodeResources]) -> int:
    """Return the CPUs that each worker with a GPU can reserve on any node with GPUs, 1 to 8.

    Args:
        nodes: resources of each node.
    """
    shares = [
        int(node.get("CPU", 0) // math.ceil(node["GPU"])) for node in nodes if node.get("GPU", 0)
    ]
    return max(1, min([MOST_CPUS_PER_GPU, *shares]))


def require_gpus(request: ResourceRequest, gpus_here: int) -> None:
    """Check that the cluster has the GPUs of a run, or that its autoscaler may start them.

    Without ``RAY_ADDRESS`` and without a running Ray, this machine is the cluster.

    Args:
        request: workers of the run, each with a GPU.
        gpus_here: GPUs of this machine that torch can use.

    Raises:
        UserError: too few GPUs.
    """
    prepare_ray_environment()
    import ray

    if os.environ.get("RAY_ADDRESS") or ray.is_initialized():
        with ray_session() as session:
            nodes = [*list_living_nodes(session), *list_startable_nodes()]
        where = "the cluster"
    else:
        # Workers of the embedded Ray are slots: there are always enough CPUs.
        nodes = [{"GPU": gpus_here, "CPU": math.inf}]
        where = "this machine"
    if count_places(nodes, request) >= (request.min_workers or request.workers):
        return
    if "KUBERNETES_SERVICE_HOST" in os.environ and not BOOTSTRAP.expanduser().exists():
        # The operator's autoscaler does not state the pods that it may start.
        console.print_warning(
            f"{describe_shortage(request, nodes, where)}. The run waits for the autoscaler"
        )
        return
    remedy = (
        "Lower training.workers, train without GPUs (--training.use_gpu false), or use a cluster "
        "with more GPUs"
    )
    if not gpus_here and where == "this machine":
        remedy = (
            "Set RAY_ADDRESS to a cluster with GPUs, install a build of torch for them, or train "
            "without GPUs (--training.use_gpu false)"
        )
    raise UserError(f"{describe_shortage(request, nodes, where)}. {remedy}")


def describe_shortage(request: ResourceRequest, nodes: Sequence[NodeResources], where: str) -> str:
    """Return the sentence that states the GPUs which a run needs and those which exist.

    Args:
        request: CPUs, GPUs and workers that the run needs.
        nodes: resources of each node, present and future.
        where: "the cluster" or "this machine".
    """
    workers = request.min_workers or request.workers
    key = "training.min_workers" if request.min_workers else "training.workers"
    gpus = workers * request.gpus / request.workers
    have = sum(node.get("GPU", 0) for node in nodes)
    need = f"{key} {workers} with training.use_gpu need {gpus:g} GPU{'s' * (gpus != 1)}"
    if have < gpus:
        return f"{need}; {where} has {have:g}"
    if count_places(nodes, replace(request, spread=False)) >= workers:
        return f"{need} on as many nodes; {where} has {have:g} GPUs on fewer"
    places = count_places(nodes, request)
    cpus = f"{request.cpus:g} CPU{'s' * (request.cpus != 1)}"
    return f"{need} with {cpus} each; the nodes of {where} have room for {places} of them"
