"""Connection to Ray: embedded on this machine, or the cluster of ``RAY_ADDRESS``."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skillnet_platform import console, signals
from skillnet_platform.cluster import loopback
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.ray_internals.single_node import (
    UV_RUN_VARIABLE,
    apply_uv_run_setting,
    halt_own_node,
    make_job_config,
)
from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.storage.local import (
    is_private,
    name_user_directory,
    prepare_user_environment,
    private_directory,
)

#: Ray's variable: it keeps sessions in ``$RAY_TMPDIR/ray``, and locks beside that directory.
DIRECTORY_VARIABLE = "RAY_TMPDIR"

#: Linux limits the path of a socket.
_LONGEST_SOCKET_BYTES = 107
#: The longest path of a socket inside the directory of sessions.
_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/dash_TaskEventsHead"
_SESSION_ADVICE = f"Set {DIRECTORY_VARIABLE} to a directory of your own, with a short path"

#: Environment of Ray, set before its import unless the user has set it.
DEFAULTS = {
    # The end of a run and report() wait for the controller's next poll, so the default of 2 s
    # dominates a short run. Each poll interrupts the training, so 0.1 s costs a twentieth.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Under `uv run` Ray would replace every worker's interpreter and upload the directory.
    UV_RUN_VARIABLE: "0",
    # A call of Ray after ray.shutdown(), as by a thread of Ray Serve, would start a second Ray.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Ray would start a process per CPU, but those of a run and of a trial have an environment of
    # their own: 1.8 s of each start of Ray.
    "RAY_prestart_worker_first_driver": "0",
    # With Ray's niceness of 15 a run starves beside other programs (decision 71).
    "RAY_worker_niceness": "0",
    # After its default of 60 s, a busy machine would get Ray's exception.
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
}
#: The same on a cluster. Ray Train waits one minute for workers to start, four times. A node that
#: the autoscaler starts needs several minutes.
ON_A_CLUSTER = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1800"}
#: Shared memory of the embedded Ray.
OBJECT_STORE_BYTES = 512 * 2**20
#: Part of Ray's message if its processes need more than 30 s to start, which is a fixed time.
STARTUP_TIMEOUT = "timed out during startup"


def prepare_ray_environment() -> None:
    """Set Ray's environment unless the user has set it. Call before the first ``import ray``."""
    prepare_user_environment()
    defaults = DEFAULTS | (ON_A_CLUSTER if os.environ.get("RAY_ADDRESS") else {})
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS"):
        # Processes with different modes cannot talk; the embedded Ray chooses its own mode.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")


def _share_import_path() -> None:
    """Let workers import modules of this process from outside its installation.

    A checkout that is not installed, or pytest's ``pythonpath``, is on ``sys.path`` of the driver
    only. Ray passes on the environment, not ``sys.path``.
    """
    inside = (sys.prefix, sys.base_prefix)
    own = [os.path.abspath(p) for p in sys.path if os.path.isdir(p or ".")]  # noqa: PTH100, PTH112
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    # Workers use the same interpreter and find its own folders without help.
    kept = [p for p in [*own, *given] if p and not p.startswith(inside)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(kept))


def ensure_ray(cpus: int | None = None) -> Any:
    """Initialize Ray once and return the ``ray`` module; later calls use the running Ray.

    Args:
        cpus: CPUs of the embedded Ray, by default all CPUs of this process. A larger number is
            allowed and means slots. Ignored on a cluster.

    Raises:
        UserError: ``RAY_ADDRESS`` does not answer, or is the address of a job server; or the
            directory of Ray's sessions is not private; or the embedded Ray does not start.
    """
    prepare_ray_environment()
    import logging

    import ray

    if ray.is_initialized():
        return ray
    apply_uv_run_setting()
    address = SecretUri(os.environ.get("RAY_ADDRESS", ""))
    if address:
        if address.startswith(("http://", "https://")):
            raise UserError(
                f"RAY_ADDRESS={address} is the address of a cluster's job server. Send the "
                "command with `skillnet submit`, or unset RAY_ADDRESS to use this machine alone"
            )
        try:
            with signals.keep_handlers():
                ray.init(address=address.reveal(), log_to_driver=True, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise UserError(
                f"RAY_ADDRESS={address}: no Ray answers there ({first_line(error)}). "
                "Start the cluster, or unset RAY_ADDRESS to use this machine alone."
            ) from error
        _warn_about_shared_sessions(ray)
        return ray
    _share_import_path()
    sessions = prepare_session_directory()
    with loopback.loopback_environment({DIRECTORY_VARIABLE: str(sessions)}):
        start_embedded_ray(
            ray,
            # By default Ray joins any cluster whose address a file in its directory names.
            address="local",
            job_config=make_job_config(),
            _temp_dir=str(sessions / "ray"),
            num_cpus=cpus or len(os.sched_getaffinity(0)),
            # Tune and Train clean up through the State API of the dashboard; without it sweeps
            # can stall without a message.
            include_dashboard=True,
            dashboard_host=loopback.ADDRESS,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=True,
        )
    # The setting is private to Ray, and another version may ignore it.
    loopback.require_loopback(ray)
    return ray


def start_embedded_ray(ray: Any, **options: Any) -> None:
    """Start Ray on this machine, and once more if the machine was too slow.

    Args:
        ray: the module.
        options: further arguments of ``ray.init``.

    Raises:
        UserError: it did not start in time.
    """
    for is_last in (False, True):
        try:
            # Ray's own handlers would print a C++ stack and end the process.
            with signals.keep_handlers():
                ray.init(**options)
            return
        except Exception as error:
            if STARTUP_TIMEOUT not in str(error):
                raise
            ray.shutdown()
            if is_last:
                raise UserError(
                    "Ray did not start within 30 s, twice. Other programs use the processor or the "
                    "disk of this machine: wait for them, or end them, and repeat the command"
                ) from None
            console.print_warning("Ray did not start within 30 s; starting it again")


def _warn_about_shared_sessions(ray: Any) -> None:
    """Warn if other users of this node can replace the sockets of the cluster's Ray."""
    sessions = ray.get_runtime_context().get_temp_dir()
    # The file system of a pod belongs to one user.
    if "KUBERNETES_SERVICE_HOST" in os.environ or is_private(sessions):
        return
    console.print_warning(
        f"{sessions}: other users of this node can take over Ray's sessions there. Set "
        f"{DIRECTORY_VARIABLE} to a directory of mode 0700 before `ray start`, as "
        "platform/deploy/setup_node.sh does."
    )


def pin_to_this_node(ray: Any) -> dict[str, Any]:
    """Return options of a task that must run on this node, because it needs the node's disk."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    # Not soft: on another node the files would be missing.
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


@contextlib.contextmanager
def ray_session(cpus: int | None = None) -> Iterator[Any]:
    """Provide Ray for a block; shut it down afterwards only if this block started it.

    A program that a signal or Ctrl-C asked to end halts Ray instead, see :func:`halt_if_asked`.
    """
    prepare_ray_environment()
    import ray

    already = ray.is_initialized()
    ensure_ray(cpus)
    try:
        yield ray
    finally:
        if not already and not halt_if_asked():
            ray.shutdown()


def halt_if_asked() -> bool:
    """Halt Ray if this process is a program that was asked to end; return whether it was.

    Ray's client has threads that may submit tasks at this moment. Its teardown would abort the
    process with a stack trace, so Ray is not used again: :func:`leave_process` ends the program.
    Workers of this machine end now, so that files can be removed that they would write.
    """
    if not signals.must_leave():
        return False
    halt_own_node()
    return True


def leave_process(code: int) -> None:
    """End a program that failed or was asked to end, if it is still connected to Ray.

    Workers of this machine end first, and the kernel ends Ray's other processes together with this
    one. A cluster notices that its driver has left.

    Args:
        code: exit code of the process.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or not (code or signals.must_leave()):
        return
    # A worker that lives on would finish its shard after the command has reported its failure.
    halt_own_node()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def prepare_session_directory() -> Path:
    """Create the private directory of Ray's sessions.

    Ray gives its sessions mode 0777 (``/tmp/ray``). A user who can replace a socket there receives
    the token and can run code in the session. The directory, of mode 0700, is ``skillnet-UID`` in
    ``RAY_TMPDIR``, in the system's temporary directory, or in ``/tmp`` if that path is too long for
    sockets.

    Returns:
        The value of ``RAY_TMPDIR`` for Ray's processes. Ray creates its directory ``ray`` there.

    Raises:
        UserError: the directory is not private, or its path is too long.
    """
    name = name_user_directory()
    given = os.environ.get(DIRECTORY_VARIABLE)
    base = Path(given or tempfile.gettempdir()).absolute()
    # setup_node.sh sets the variable to the private directory.
    directory = base if base.name == name else base / name
    if _socket_bytes(directory) > _LONGEST_SOCKET_BYTES:
        if given:
            raise UserError(
                f"{DIRECTORY_VARIABLE}={given}: too long for Ray's sockets. {_SESSION_ADVICE}."
            )
        directory = Path("/tmp") / name  # noqa: S108
    return private_directory(directory, _SESSION_ADVICE)


def _socket_bytes(directory: Path) -> int:
    return len(os.fsencode(f"{directory}/ray{_SOCKET}"))


#: Seconds between two questions to Ray's head.
INTERVAL_S = 5.0


class OwnNodeCheck:
    """Asks Ray's head from time to time whether the node of this process is alive."""

    def __init__(self) -> None:
        self._next = time.monotonic() + INTERVAL_S

    def require_alive(self) -> None:
        """Raise an error if the node is lost; at most one question in :data:`INTERVAL_S`.

        Raises:
            UserError: Ray's head counts the node as dead.
        """
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + INTERVAL_S
        import ray

        own = ray.get_runtime_context().get_node_id()
        if any(node["NodeID"] == own and not node["Alive"] for node in ray.nodes()):
            raise UserError(
                "Ray lost the node of this command: its raylet ended, so nothing more can run on "
                "it. Run the same command again; finished parts are kept"
            )
