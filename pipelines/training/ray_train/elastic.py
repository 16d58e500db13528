"""Fewer workers when a host leaves, and more when one is there again: Ray Train's elastic policy.

Ray Train decides when to look, asks the autoscaler, and starts the workers again. Added to it is
what it does not know of: hosts that GCS still believes in, or that were asked to leave, get no
worker (a restart there would only wait); ``strict_spread`` counts a worker a host; workers write a
checkpoint before they make room for more; the loss of a host is no failure of the run.

The order of rows and the global batch do not hang on the number of workers, see
:mod:`pipelines.loading.dataloader`. Imports Ray: only an elastic fit imports this.
"""

import math
import os
import socket
import time
from collections.abc import Mapping
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

from pipelines.training import preemption
from pipelines.training.ray_train.failure_policy import MistakesEnd, Trainer, is_mistake
from skillnet_platform import console

NODE_ID = "ray.io/node-id"

#: Seconds without a worker on a host that was asked to leave; clouds give two minutes' notice.
LEAVING_S = 180.0

#: Seconds for a raylet to take a connection, and between two looks for hosts.
ANSWER_S, LOOK_S = 3.0, 1.0

#: Seconds for workers to find the places that were counted; more would be waiting for a host.
PLACE_S = 45.0
PLACE_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"

#: Seconds in which a number of workers that found no place is not tried again.
UNPLACED_S = 600.0

#: Workers on a host that it sets no limit to.
MANY = 10**6

#: Seconds that the coordinator of resources may take to answer.
COORDINATOR_S = 10.0


@dataclass
class Group:
    """What the two policies of a controller know together.

    Ray sends each of them to the controller's process on its own; they meet in :data:`GROUP`.

    Args:
        hosts: ids of the hosts that could take workers when the group was started.
        leaving: host id -> until when, on the monotonic clock, it gets no worker.
        most: workers that could be placed at last, if a larger number could not.
        most_until: until when that holds.
    """

    hosts: set[str] = field(default_factory=set)
    leaving: dict[str, float] = field(default_factory=dict)
    most: float = math.inf
    most_until: float = 0.0

    def leave(self, hosts: list[str], now: float) -> None:
        """Place no worker there for a while."""
        self.leaving |= dict.fromkeys(hosts, now + LEAVING_S)

    def shunned(self, now: float) -> set[str]:
        """Hosts that get no worker."""
        return {host for host, until in self.leaving.items() if until > now}

    def unplaced(self, workers: int, now: float) -> None:
        """So many workers found no place."""
        self.most, self.most_until = workers - 1, now + UNPLACED_S

    def limit(self, now: float) -> float:
        """More workers than this are not worth a try."""
        return self.most if now < self.most_until else math.inf


GROUP = Group()


def slots(
    resources: Mapping[str, Mapping[str, float]], worker: Mapping[str, float], apart: bool
) -> dict[str, int]:
    """Host id -> workers that fit there.

    Args:
        resources: host id -> what it has.
        worker: what one worker takes.
        apart: no two on a host.
    """
    most = 1 if apart else MANY
    found = {}
    for host, has in resources.items():
        fits = [has.get(name, 0.0) // need for name, need in worker.items() if need > 0]
        found[host] = int(min([most, *fits]))
    return found


def answering(nodes: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Host id -> its resources, of those that are alive and whose raylet takes a connection.

    GCS needs up to half a minute to see that a host is gone; a connection is refused at once.

    Args:
        nodes: as ``ray.nodes()`` gives them.
    """
    alive = [node for node in nodes if node["Alive"]]
    if not alive:
        return {}
    with ThreadPoolExecutor(min(len(alive), 32)) as pool:
        there = list(pool.map(_answers, alive))
    return {
        str(node["NodeID"]): dict(node["Resources"])
        for node, answers in zip(alive, there, strict=True)
        if answers
    }


def _answers(node: dict[str, Any]) -> bool:
    try:
        where = (node["NodeManagerAddress"], node["NodeManagerPort"])
        socket.create_connection(where, timeout=ANSWER_S).close()
    except OSError:
        return False
    return True


def hosts_now() -> dict[str, dict[str, float]]:
    """Host id -> its resources, of all that may take a worker."""
    shunned = GROUP.shunned(time.monotonic()) | set(ray._private.state.state.get_draining_nodes())
    return {host: has for host, has in answering(ray.nodes()).items() if host not in shunned}


class Elastic(ElasticScalingPolicy):
    """How many workers there are, and where none may start.

    Args:
        scaling_config: of the fit, with ``num_workers=(fewest, most)``.
        leave: the sign by which a driver tells that it was asked to leave.
    """

    def __init__(self, scaling_config: ScalingConfig, leave: preemption.Sign) -> None:
        super().__init__(scaling_config)
        self._leave = leave
        self._had: int | None = None
        self._told_waiting = False
        self._asked_of: float | None = None

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """As many workers as find a place, or waiting for hosts.

        Raises:
            TooFewHosts: the driver was asked to leave meanwhile.
        """
        if self._leave.is_up():
            raise preemption.TooFewHosts
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, ResizeDecision):
            self._told_waiting = False
            self._tell(decision.num_workers)
            return decision
        if not self._told_waiting:
            fewest = self.scaling_config.min_workers
            console.warn(f"fewer than {fewest} worker(s) find a place; waiting for hosts")
            self._told_waiting = True
        time.sleep(LOOK_S)  # the controller would ask again at once
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Never resized while it runs: the workers are asked to make room, with a checkpoint."""
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        workers = worker_group_state.workers
        if (
            isinstance(decision, ResizeDecision)
            and decision.num_workers > len(workers)
            and self._asked_of != worker_group_state.start_time
            and self._room_beside({worker.metadata.node_id for worker in workers})
        ):
            console.note(f"there is room for {decision.num_workers} workers: a checkpoint, then so")
            workers[0].execute_async(preemption.regroup)
            self._asked_of = worker_group_state.start_time
        return NoopDecision()

    def on_controller_start_worker_group(
        self, *, scaling_config: ScalingConfig, num_workers: int
    ) -> dict[str, str] | None:
        """Keep workers off hosts that are gone or about to go."""
        GROUP.hosts = set(hosts_now())
        known = {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}
        barred = sorted(known - GROUP.hosts)
        return {NODE_ID: f"!in({','.join(barred)})"} if barred else None

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        # What the coordinator reserved is our share beside other fits; where it lies, it may be
        # on a host that is gone, or, for strict_spread, on too few.
        share = super()._count_possible_workers(reserved_resources)
        places = sum(self._slots(hosts_now()).values())
        return int(min(share, places, GROUP.limit(time.monotonic())))

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        """Our share of the cluster as it is now, not as it was at the last tick."""
        try:
            found: dict[str, dict[str, float]] = ray.get(
                self._autoscaling_coordinator.get_reserved_resources.remote(
                    self._requester_id, recompute=True
                ),
                timeout=COORDINATOR_S,
            )
        except ray.exceptions.RayError as problem:
            console.warn(f"the number of workers stays as it is: {problem}".splitlines()[0])
            return None
        return found

    def _slots(self, resources: Mapping[str, Mapping[str, float]]) -> dict[str, int]:
        config = self.scaling_config
        apart = config.placement_strategy == "STRICT_SPREAD"
        return slots(resources, config._resources_per_worker_not_none, apart)

    def _room_beside(self, taken: set[str]) -> bool:
        """Whether a worker more finds a free place beside those that run, on these hosts."""
        free = ray._private.state.available_resources_per_node()
        eligible = {host: free.get(host, {}) for host in hosts_now()}
        if self.scaling_config.placement_strategy == "STRICT_SPREAD":
            eligible = {host: has for host, has in eligible.items() if host not in taken}
        return sum(self._slots(eligible).values()) > 0

    def _tell(self, workers: int) -> None:
        most = self.scaling_config.max_workers
        if workers < most or self._had not in (None, workers):
            console.note(f"training with {workers} of {most} workers")
        self._had = workers


class HostsMayLeave(MistakesEnd):
    """As other fits, but hosts that leave are no failure, nor what they bring about."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Start again or give up."""
        error, now = training_failed_error, time.monotonic()
        if isinstance(error, WorkerGroupError):
            for problem in error.worker_failures.values():
                if isinstance(problem, preemption.Regroup):
                    if problem.leaving:
                        console.warn(
                            f"{len(problem.leaving)} host(s) asked to leave: no worker there"
                        )
                    GROUP.leave(problem.leaving, now)
                    return FailureDecision.RETRY
        elif isinstance(error, ControllerError):
            cause = error.controller_failure
            if isinstance(cause, WorkerGroupStartupTimeoutError):
                GROUP.unplaced(cause.num_workers, now)
            elif isinstance(cause, preemption.TooFewHosts):
                return FailureDecision.RAISE
        gone = GROUP.hosts - set(answering(ray.nodes()))
        if gone and not is_mistake(error):
            console.warn(f"{len(gone)} host(s) left; going on from the newest whole checkpoint")
            return FailureDecision.RETRY
        return super().make_decision(error)


class ElasticTrainer(Trainer):
    """A trainer with these policies.

    Args:
        leave: see :class:`Elastic`.
        given: of ``TorchTrainer``.
    """

    def __init__(self, *args: Any, leave: preemption.Sign, **given: Any) -> None:
        super().__init__(*args, **given)
        self._leave = leave

    def policies(self, failures: FailureConfig) -> dict[str, Any]:
        """Both of these."""
        # Ray's type of it is that of its first version.
        scaling: Any = self.scaling_config
        return {
            "scaling_policy": Elastic(scaling, self._leave),
            "failure_policy": HostsMayLeave(failures),
        }

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        before = os.environ.get(PLACE_VARIABLE)
        os.environ[PLACE_VARIABLE] = str(PLACE_S)
        try:
            return super()._initialize_and_run_controller(**given)
        finally:
            if before is None:
                del os.environ[PLACE_VARIABLE]
            else:
                os.environ[PLACE_VARIABLE] = before
