"""Elastic training: fewer workers when a node leaves, more workers when a node returns.

Ray Train's elastic policy decides when to check, asks the autoscaler and restarts the workers.
This module adds four rules:

- A node gets no worker if it does not answer or was asked to leave, although Ray's head still
  lists it: a restart on that node would only time out.
- ``strict_spread`` counts one worker per node.
- Workers write a checkpoint before the group grows.
- The loss of a node is not a failure of the run.

The order of rows and the global batch do not depend on the number of workers.
"""

import math
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import (
    WorkerGroupPollStatus,
    WorkerGroupState,
)
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from skillnet_platform import console
from skillnet_platform.ray_internals.errors import InsufficientWorkersError, WorkerGroupResize
from skillnet_platform.ray_internals.failure_policy import (
    FailFastOnUserError,
    PolicyTrainer,
    is_user_error,
)
from skillnet_platform.storage.local import environment_variables

NODE_ID_LABEL = "ray.io/node-id"

#: Seconds without a worker on a node that was asked to leave. Clouds give two minutes' notice.
LEAVING_NODE_S = 180.0

#: Seconds for a raylet to accept a connection.
CONNECT_TIMEOUT_S = 3.0
#: Seconds between two checks while too few nodes are available.
RETRY_INTERVAL_S = 1.0

#: Seconds for workers to start. The slots were counted before, so a longer wait means a lost node.
START_TIMEOUT_S = 45.0
START_TIMEOUT_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"

#: Seconds in which a number of workers that could not be placed is not tried again.
FAILED_SIZE_S = 600.0

#: Slots of a node that sets no limit.
UNLIMITED_SLOTS = 10**6

#: Seconds for the coordinator of resources to answer.
COORDINATOR_TIMEOUT_S = 10.0


@dataclass
class PlacementState:
    """State that the scaling and the failure policy of one controller share.

    Ray sends each policy to the controller's process separately. They share :data:`PLACEMENT`.

    Args:
        hosts: ids of the nodes that could take workers when the group started.
        leaving: node id -> time on the monotonic clock until which the node gets no worker.
        max_workers: largest number of workers after a larger number could not be placed.
        max_workers_until: time on the monotonic clock until which that limit holds.
    """

    hosts: set[str] = field(default_factory=set)
    leaving: dict[str, float] = field(default_factory=dict)
    max_workers: float = math.inf
    max_workers_until: float = 0.0

    def exclude_hosts(self, hosts: list[str], now: float) -> None:
        """Place no worker on these nodes for :data:`LEAVING_NODE_S`."""
        self.leaving |= dict.fromkeys(hosts, now + LEAVING_NODE_S)

    def excluded_hosts(self, now: float) -> set[str]:
        """Return the ids of the nodes that get no worker."""
        return {host for host, until in self.leaving.items() if until > now}

    def record_failed_size(self, workers: int, now: float) -> None:
        """Try fewer than ``workers`` workers for :data:`FAILED_SIZE_S`."""
        self.max_workers, self.max_workers_until = workers - 1, now + FAILED_SIZE_S

    def worker_limit(self, now: float) -> float:
        """Return the largest number of workers to try; infinity without a limit."""
        return self.max_workers if now < self.max_workers_until else math.inf


PLACEMENT = PlacementState()


def count_worker_slots(
    nodes: Mapping[str, Mapping[str, float]], worker: Mapping[str, float], one_per_node: bool
) -> dict[str, int]:
    """Return node id -> number of workers that fit on the node.

    Args:
        nodes: node id -> resources of the node.
        worker: resources of one worker.
        one_per_node: place at most one worker on a node.
    """
    most = 1 if one_per_node else UNLIMITED_SLOTS
    slots = {}
    for node, resources in nodes.items():
        fits = [resources.get(name, 0.0) // need for name, need in worker.items() if need > 0]
        slots[node] = int(min([most, *fits]))
    return slots


def probe_raylets(nodes: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return node id -> resources of the nodes that are alive and accept a connection.

    Ray's head needs up to half a minute to notice a lost node. A connection is refused at once.

    Args:
        nodes: result of ``ray.nodes()``.
    """
    alive = [node for node in nodes if node["Alive"]]
    if not alive:
        return {}
    # In parallel, because each silent node costs the complete timeout.
    with ThreadPoolExecutor(min(len(alive), 32)) as pool:
        answers = list(pool.map(_accepts_connection, alive))
    return {
        str(node["NodeID"]): dict(node["Resources"])
        for node, is_up in zip(alive, answers, strict=True)
        if is_up
    }


def _accepts_connection(node: dict[str, Any]) -> bool:
    try:
        address = (node["NodeManagerAddress"], node["NodeManagerPort"])
        socket.create_connection(address, timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def find_eligible_nodes() -> dict[str, dict[str, float]]:
    """Return node id -> resources of all nodes that may take a worker now."""
    draining = set(ray._private.state.state.get_draining_nodes())
    excluded = PLACEMENT.excluded_hosts(time.monotonic()) | draining
    return {node: has for node, has in probe_raylets(ray.nodes()).items() if node not in excluded}


class SkillNetScalingPolicy(ElasticScalingPolicy):
    """Number of workers of an elastic run, and the nodes on which none may start.

    Args:
        scaling_config: number and resources of the fit, with ``num_workers=(min_workers,
            max_workers)``.
        stop_requested: returns whether the driver was asked to stop.
        request_resize: asks a worker, in its process, to end with ``WorkerGroupResize``.
    """

    def __init__(
        self,
        scaling_config: ScalingConfig,
        stop_requested: Callable[[], bool],
        request_resize: Callable[[], None],
    ) -> None:
        super().__init__(scaling_config)
        self._stop_requested = stop_requested
        self._request_resize = request_resize
        self._last_size: int | None = None
        self._warned = False
        self._resized_group: float | None = None

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Return as many workers as fit, or wait for nodes.

        Raises:
            InsufficientWorkersError: the driver was asked to stop while too few nodes were there.
        """
        if self._stop_requested():
            # A driver that was asked to stop must not wait for nodes that may never come.
            raise InsufficientWorkersError
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, ResizeDecision):
            self._warned = False
            self._log_size(decision.num_workers)
            return decision
        if not self._warned:
            fewest = self.scaling_config.min_workers
            console.print_warning(
                f"fewer than {fewest} worker(s) fit on the cluster; waiting for nodes"
            )
            self._warned = True
        time.sleep(RETRY_INTERVAL_S)  # the controller asks again without a pause
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Ask the workers for a checkpoint and a restart if more fit; never resize directly."""
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        workers = worker_group_state.workers
        if (
            isinstance(decision, ResizeDecision)
            and decision.num_workers > len(workers)
            # Ask each group once: its workers need time to write the checkpoint.
            and self._resized_group != worker_group_state.start_time
            # Without a free slot the restart would end with the same number of workers.
            and self._has_free_slot({worker.metadata.node_id for worker in workers})
        ):
            console.print_note(
                f"{decision.num_workers} workers fit: writing a checkpoint to resize"
            )
            workers[0].execute_async(self._request_resize)
            self._resized_group = worker_group_state.start_time
        return NoopDecision()

    def on_controller_start_worker_group(
        self, *, scaling_config: ScalingConfig, num_workers: int
    ) -> dict[str, str] | None:
        """Return a label selector that keeps workers off nodes that are lost or leaving."""
        # The failure policy compares these nodes with the living ones to detect a loss.
        PLACEMENT.hosts = set(find_eligible_nodes())
        known = {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}
        barred = sorted(known - PLACEMENT.hosts)
        return {NODE_ID_LABEL: f"!in({','.join(barred)})"} if barred else None

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        # The coordinator's reservation is this run's share beside other fits. Its location may be
        # a lost node or, for strict_spread, too few nodes.
        share = super()._count_possible_workers(reserved_resources)
        slots = sum(self._count_slots(find_eligible_nodes()).values())
        return int(min(share, slots, PLACEMENT.worker_limit(time.monotonic())))

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        """Return this run's share of the cluster as it is now, not as it was at the last tick."""
        try:
            reserved: dict[str, dict[str, float]] = ray.get(
                self._autoscaling_coordinator.get_reserved_resources.remote(
                    self._requester_id, recompute=True
                ),
                timeout=COORDINATOR_TIMEOUT_S,
            )
        except ray.exceptions.RayError as error:
            console.print_warning(f"the number of workers does not change: {error}".splitlines()[0])
            return None
        return reserved

    def _count_slots(self, nodes: Mapping[str, Mapping[str, float]]) -> dict[str, int]:
        config = self.scaling_config
        # Ray's coordinator reserves bundles packed and would count several workers per node.
        one_per_node = config.placement_strategy == "STRICT_SPREAD"
        return count_worker_slots(nodes, config._resources_per_worker_not_none, one_per_node)

    def _has_free_slot(self, used_nodes: set[str]) -> bool:
        """Return whether one more worker fits beside the workers on ``used_nodes``."""
        free = ray._private.state.available_resources_per_node()
        eligible = {node: free.get(node, {}) for node in find_eligible_nodes()}
        if self.scaling_config.placement_strategy == "STRICT_SPREAD":
            eligible = {node: has for node, has in eligible.items() if node not in used_nodes}
        return sum(self._count_slots(eligible).values()) > 0

    def _log_size(self, workers: int) -> None:
        most = self.scaling_config.max_workers
        if workers < most or self._last_size not in (None, workers):
            console.print_note(f"training with {workers} of {most} workers")
        self._last_size = workers


class HostLossPolicy(FailFastOnUserError):
    """Failure policy of an elastic run: the loss of a node is no failure."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Return whether the workers restart or the run ends."""
        error, now = training_failed_error, time.monotonic()
        if isinstance(error, WorkerGroupError):
            for failure in error.worker_failures.values():
                if isinstance(failure, WorkerGroupResize):
                    if failure.leaving:
                        console.print_warning(
                            f"{len(failure.leaving)} node(s) were asked to leave and get no worker"
                        )
                    PLACEMENT.exclude_hosts(failure.leaving, now)
                    return FailureDecision.RETRY
        elif isinstance(error, ControllerError):
            cause = error.controller_failure
            if isinstance(cause, WorkerGroupStartupTimeoutError):
                # The same number would fail again, each time after the complete timeout.
                PLACEMENT.record_failed_size(cause.num_workers, now)
            elif isinstance(cause, InsufficientWorkersError):
                return FailureDecision.RAISE
        # The raylets are asked: Ray's head lists a dead node for up to half a minute.
        lost = PLACEMENT.hosts - set(probe_raylets(ray.nodes()))
        if lost and not is_user_error(error):
            console.print_warning(
                f"{len(lost)} node(s) left; resuming from the newest valid checkpoint"
            )
            # Not counted against `training.max_failures`: the node failed, not the program.
            return FailureDecision.RETRY
        return super().make_decision(error)


class ElasticTrainer(PolicyTrainer):
    """Trainer of an elastic run.

    Args:
        arguments: positional arguments of ``DataParallelTrainer``.
        stop_requested: see :class:`SkillNetScalingPolicy`.
        request_resize: see :class:`SkillNetScalingPolicy`.
        options: keyword arguments of ``DataParallelTrainer``.
    """

    def __init__(
        self,
        *arguments: Any,
        stop_requested: Callable[[], bool],
        request_resize: Callable[[], None],
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._stop_requested, self._request_resize = stop_requested, request_resize

    def create_policies(self, failures: FailureConfig) -> dict[str, Any]:
        """Return the scaling and the failure policy of an elastic run."""
        # Ray annotates it with the class of its first version.
        config: Any = self.scaling_config
        scaling = SkillNetScalingPolicy(config, self._stop_requested, self._request_resize)
        return {"scaling_policy": scaling, "failure_policy": HostLossPolicy(failures)}

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        # Set for this fit only: other fits of the process keep their limit.
        with environment_variables({START_TIMEOUT_VARIABLE: str(START_TIMEOUT_S)}):
            return super()._initialize_and_run_controller(**arguments)
