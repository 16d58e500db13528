"""Connecting to Ray: a private one on this machine, or the cluster that ``RAY_ADDRESS`` names."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from skillnet_platform.cluster import loopback
from skillnet_platform.errors import UserError
from skillnet_platform.ray_internals.uv_run import UV_RUN_VARIABLE, apply_uv_run_setting

#: Set before Ray is imported, and only where the user has not set them.
DEFAULTS = {
    # report() waits for the controller's next poll; 2 s by default is most of a short run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Under `uv run` Ray would replace every worker's interpreter and upload the directory.
    UV_RUN_VARIABLE: "0",
}
#: The same on a cluster. Ray Train gives workers a minute to start, four times; a node that an
#: autoscaler starts needs several, and a host under load can need more than one.
ON_A_CLUSTER = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1800"}
OBJECT_STORE_BYTES = 512 * 2**20


def prepare_ray_environment() -> None:
    """Set Ray's environment where the user has not. Call before the first ``import ray``."""
    defaults = DEFAULTS | (ON_A_CLUSTER if os.environ.get("RAY_ADDRESS") else {})
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS"):
        # Processes that differ in it cannot talk; the embedded Ray chooses for itself.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")


def _share_import_path() -> None:
    """Let workers import what this process imports from outside its installation.

    A checkout that is not installed, or pytest's ``pythonpath``, is on ``sys.path`` of the
    driver only; Ray passes on the environment, not ``sys.path``.
    """
    inside = (sys.prefix, sys.base_prefix)
    own = [os.path.abspath(p) for p in sys.path if os.path.isdir(p or ".")]  # noqa: PTH100, PTH112
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = [p for p in [*own, *given] if p and not p.startswith(inside)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(kept))


def ensure_ray(cpus: int | None = None, object_store_bytes: int = OBJECT_STORE_BYTES) -> Any:
    """Initialise Ray once and return the ``ray`` module; later calls find it running.

    Args:
        cpus: CPUs of the embedded Ray, by default all that this process may use. More than
            the machine has is allowed: it is then a number of slots. Ignored on a cluster.
        object_store_bytes: shared memory of the embedded Ray.

    Raises:
        UserError: ``RAY_ADDRESS`` is set but nothing answers there, or it is of a job server.
    """
    prepare_ray_environment()
    import logging

    import ray

    if ray.is_initialized():
        return ray
    apply_uv_run_setting()
    address = os.environ.get("RAY_ADDRESS")
    if address:
        if address.startswith(("http://", "https://")):
            raise UserError(
                f"RAY_ADDRESS={address} is the address of a cluster's job server: send it the "
                "command with `skillnet submit`, or unset RAY_ADDRESS to use this machine alone"
            )
        try:
            ray.init(address=address, log_to_driver=True, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as problem:
            raise UserError(
                f"RAY_ADDRESS={address}: no Ray answers there ({problem}). Start the cluster, "
                "or unset RAY_ADDRESS to use this machine alone."
            ) from problem
        return ray
    _share_import_path()
    with loopback.loopback_environment():
        ray.init(
            num_cpus=cpus or len(os.sched_getaffinity(0)),
            # Tune and Train ask the State API, which lives in the dashboard, to clean up after
            # themselves; without it sweeps can stall in silence.
            include_dashboard=True,
            dashboard_host=loopback.ADDRESS,
            object_store_memory=max(object_store_bytes, 80 * 2**20),
            logging_level=logging.ERROR,
            log_to_driver=True,
        )
    loopback.require_loopback(ray)
    return ray


def pin_to_this_node(ray: Any) -> dict[str, Any]:
    """Options of a task that must run on the host of this process, whose disk it needs."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


@contextlib.contextmanager
def ray_session(cpus: int | None = None) -> Iterator[Any]:
    """Ray for the length of a block; shut down after it only if this block started it."""
    prepare_ray_environment()
    import ray

    already = ray.is_initialized()
    ensure_ray(cpus)
    try:
        yield ray
    finally:
        if not already:
            ray.shutdown()
