"""Start of a Ray that stays on one node and listens on loopback only, and its abrupt end.

Ray 2.47 and later detects ``uv run`` as the driver's parent. It then uploads the working directory
and starts every worker through ``uv run``, which may install other versions or fail.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil

#: Read by the processes that ``ray.init`` starts.
CLUSTER_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextlib.contextmanager
def disable_clusters() -> Iterator[None]:
    """Make ``ray.init`` use the address 127.0.0.1, as on macOS and Windows.

    On Linux ``ray.init`` replaces that address by an outer one, and Ray's servers then listen on
    every interface. Set :data:`CLUSTER_VARIABLE` to "0" in the environment of the same block.
    """
    from ray._private import ray_constants

    # Ray reads the variable at import, which may have happened long ago in this process.
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def halt_own_node() -> None:
    """Stop the raylet that this process started, and end its workers; no other node has one.

    The raylet is stopped, not ended: this process would end inside Ray's client, with an exit code
    of Ray, once the raylet's sockets are closed. The kernel ends the raylet with this process.
    """
    import psutil
    from ray._private import worker
    from ray._private.ray_constants import PROCESS_TYPE_RAYLET

    node = worker._global_node
    started: list[Any] = node.all_processes.get(PROCESS_TYPE_RAYLET, []) if node else []
    for each in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            raylet = psutil.Process(each.process.pid)
            raylet.suspend()
            while _kill_living(raylet.children(recursive=True)):
                time.sleep(0.01)


def _kill_living(processes: "list[psutil.Process]") -> bool:
    """Kill processes; return whether one of them may still live."""
    import psutil

    has_living = False
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            # A stopped raylet does not reap its children.
            if each.status() != psutil.STATUS_ZOMBIE:
                each.kill()
                has_living = True
    return has_living


def make_job_config() -> Any:
    """Return a job whose workers do not import from the driver's working directory.

    Ray puts that directory first on the import path of every worker. A downloaded corpus in it may
    hold a file with the name of a library. What the driver itself imports from is in PYTHONPATH.
    """
    from ray.job_config import JobConfig

    class InstalledCodeJobConfig(JobConfig):  # type: ignore[misc]
        """Job whose workers import as the driver does."""

        def _serialize(self) -> Any:
            self._py_driver_sys_path.clear()
            return super()._serialize()

    return InstalledCodeJobConfig()


UV_RUN_VARIABLE = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"


def apply_uv_run_setting() -> None:
    """Apply ``RAY_ENABLE_UV_RUN_RUNTIME_ENV`` in a process that imported Ray before it was set.

    Ray reads the variable at import.
    """
    from ray._private import ray_constants

    if os.environ.get(UV_RUN_VARIABLE) == "0":
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
