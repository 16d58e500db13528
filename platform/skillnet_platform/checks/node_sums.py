"""Sums over two ranks on pairs of nodes: by NCCL on GPUs, else by gloo.

A cluster whose nodes cannot reach each other passes every other check, and the first step of a
training then waits for the time limit. :func:`check_sums` is called by the checks of a cluster.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from skillnet_platform.checks.finding import Finding
from skillnet_platform.checks.gpu import gpu_nodes
from skillnet_platform.checks.gpu_probe import run_sum
from skillnet_platform.checks.node_probe import NodeProbe, run_on_nodes
from skillnet_platform.cluster.resource_request import ResourceRequest
from skillnet_platform.terminal_text import format_plural


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
    """Add up a tensor over two ranks, so that every node takes part.

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
        address: of this node.
        roles: node -> its role.
    """
    role = roles[address]

    def run_rank(rank: int) -> str:
        device = rank if len(role.ranks) > 1 else 0
        return run_sum(rank, 2, role.address, role.backend, device)

    with ThreadPoolExecutor() as threads:
        return next(filter(None, threads.map(run_rank, role.ranks)), "")
