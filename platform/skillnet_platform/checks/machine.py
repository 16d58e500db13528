"""Checks of one machine: packages, CPUs, memory, disk, ports, tracker and Ray."""

import functools
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from skillnet_platform import cluster, storage
from skillnet_platform.checks.distributions import check_distributions
from skillnet_platform.checks.finding import FREE_DISK_BYTES, GIB, Finding, Level
from skillnet_platform.cluster.resource_request import (
    ResourceRequest,
    estimate_checkpoint_bytes,
    runs_directory,
)
from skillnet_platform.cluster.versions import PACKAGES
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.package_version import find_version
from skillnet_platform.tracking import backend

FREE_MEMORY_BYTES = 4 * GIB
SHARED_MEMORY_BYTES = cluster.OBJECT_STORE_BYTES + 2**26
OPEN_FILES = 4096


def list_machine_checks(
    with_ray: bool = True, request: ResourceRequest | None = None
) -> list[Callable[[], list[Finding]]]:
    """Return all checks of this machine, fast checks first.

    Args:
        with_ray: include the check that starts Ray (about 8 s).
        request: resources of the run that the checks are for.
    """
    checks: list[Callable[[], list[Finding]]] = [
        check_packages,
        check_distributions,
        check_cpus,
        check_memory,
        check_shared_memory,
        functools.partial(check_disk, request),
        check_open_files,
        check_loopback,
        functools.partial(check_tracker, request),
    ]
    return [*checks, check_ray] if with_ray else checks


def check_packages() -> list[Finding]:
    """Check the versions of Python and of the main packages."""
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    advice = "" if good else "use Python 3.11, 3.12 or 3.13"
    found = [Finding("python", "ok" if good else "error", platform.python_version(), advice)]
    for name in PACKAGES:
        version = find_version(name)
        if version:
            found.append(Finding(name, "ok", version))
        else:
            found.append(Finding(name, "error", "not installed", "pip install -e '.[train]'"))
    return found


def check_cpus() -> list[Finding]:
    """Check the number of usable CPUs, their load and the quota of a container."""
    # `os.cpu_count()` ignores the affinity of this process.
    usable = len(os.sched_getaffinity(0))
    busy = os.getloadavg()[0]
    found = [Finding("cpus", "ok", f"{usable} usable, load {busy:.1f}")]
    quota = _cpu_quota()
    # A quota does not change the affinity, so Ray counts more CPUs than it gets.
    if quota is not None and quota < usable:
        advice = f"start with --training.workers {max(int(quota), 1)}"
        found.append(Finding("cpu quota", "warning", f"{quota:.1f} CPUs allowed", advice))
    if usable < 2:
        advice = "Ray Data and a worker share one CPU: expect twice the time"
        found[0] = Finding("cpus", "warning", f"{usable} usable", advice)
    return found


def check_memory() -> list[Finding]:
    """Check the memory that is available without swapping."""
    free = _meminfo("MemAvailable")
    if free is None or free >= FREE_MEMORY_BYTES:
        seen = "unknown" if free is None else f"{storage.human_bytes(free)} available"
        return [Finding("memory", "ok", seen)]
    advice = f"a worker needs up to {storage.human_bytes(FREE_MEMORY_BYTES)}: close other programs"
    return [Finding("memory", "warning", f"{storage.human_bytes(free)} available", advice)]


def check_shared_memory() -> list[Finding]:
    """Check the space of the memory file system that holds Ray's objects."""
    folder = Path("/dev/shm")  # noqa: S108 - only its size is read
    if not folder.is_dir():
        return [Finding("shared memory", "warning", "no /dev/shm", "Ray falls back to /tmp")]
    free = shutil.disk_usage(folder).free
    if free >= SHARED_MEMORY_BYTES:
        return [Finding("shared memory", "ok", f"{storage.human_bytes(free)} free")]
    advice = "give the container more: --shm-size 2g"
    return [Finding("shared memory", "warning", f"{storage.human_bytes(free)} free", advice)]


def check_disk(request: ResourceRequest | None = None) -> list[Finding]:
    """Check free space and write permission in the directory of runs."""
    request = request or ResourceRequest()
    root = runs_directory(request.run_dir)
    advice = (
        "give another --run_dir"
        if request.run_dir
        else f"set {storage.HOME_VARIABLE} to a directory that you may write to"
    )
    try:
        if not request.run_dir:
            root.mkdir(parents=True, exist_ok=True)
        while not root.exists():
            root = root.absolute().parent  # a check must not create the directory of runs
        # A real write: permissions do not show a read-only mount or a full disk.
        with storage.atomic_write(root / ".doctor") as stream:
            stream.write(b"x")
        (root / ".doctor").unlink()
    except (OSError, UserError) as error:
        return [Finding("disk", "error", f"{root}: {error}", advice)]
    free, needed = storage.free_bytes(root), estimate_checkpoint_bytes(request)
    seen = f"{storage.human_bytes(free)} free in {root}"
    larger = (
        "free space, keep fewer checkpoints (--training.keep_checkpoints 1), or use a larger disk: "
        + ("another --run_dir" if request.run_dir else storage.HOME_VARIABLE)
    )
    if needed > free:
        seen += f"; the run's checkpoints take {storage.human_bytes(needed)}"
        return [Finding("disk", "error", seen, larger)]
    if free < FREE_DISK_BYTES and not needed:
        return [Finding("disk", "warning", seen, larger)]
    return [Finding("disk", "ok", seen)]


def check_open_files() -> list[Finding]:
    """Check how many files a process may open: Ray opens many."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= OPEN_FILES:
        return [Finding("open files", "ok", f"{soft} allowed")]
    return [Finding("open files", "warning", f"{soft} allowed", f"ulimit -n {min(hard, 65536)}")]


def check_loopback() -> list[Finding]:
    """Check that a port on 127.0.0.1 accepts connections, as Ray, gloo and MLflow need."""
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen(1)
            with socket.create_connection(server.getsockname(), timeout=2):
                pass
    except OSError as error:
        return [Finding("loopback", "error", str(error), "allow connections to 127.0.0.1")]
    return [Finding("loopback", "ok", "127.0.0.1 answers")]


def check_tracker(request: ResourceRequest | None = None) -> list[Finding]:
    """Check that the tracker answers and accepts the credentials.

    Missing credentials are only a warning for a command that does not use the tracker.
    """
    try:
        uri = backend.resolve_uri()
        if not uri.startswith("http"):
            return [Finding("tracker", "ok", uri)]
        backend.require_answer(uri)
    except UserError as error:
        return [Finding("tracker", "error", str(error), f"correct {backend.URI_VARIABLE}")]
    try:
        backend.require_access(uri)
    except UserError as error:
        advice = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        level: Level = "error" if request is None or request.uses_tracker else "warning"
        return [Finding("tracker", level, str(error), advice)]
    return [Finding("tracker", "ok", uri)]


def check_ray() -> list[Finding]:
    """Start Ray or connect to it, run a task and query the State API."""
    start = time.monotonic()
    try:
        with cluster.ray_session() as ray:
            answer = ray.get(ray.remote(platform.python_version).remote(), timeout=60)
            took = f"a task ran after {time.monotonic() - start:.1f} s"
            found = [Finding("ray", "ok", took)]
            if answer != platform.python_version():
                advice = "use the same Python on every node"
                found = [Finding("ray", "error", f"workers run Python {answer}", advice)]
            return [*found, check_state_api()]
    except Exception as error:
        return [Finding("ray", "error", first_line(error), "see the lines above")]


def check_state_api() -> Finding:
    """Query the State API, through which Tune and Train clean up."""
    from ray.util.state import list_nodes

    try:
        return Finding("ray state api", "ok", f"{len(list_nodes(timeout=20))} node(s)")
    except Exception as error:
        advice = "sweeps may stall without it: end other Ray processes of this machine"
        return Finding("ray state api", "warning", first_line(error), advice)


def _cpu_quota() -> float | None:
    """Return the CPUs that a container's control group allows; ``None`` without a limit."""
    try:
        allowed, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(allowed) / int(period)
    except (OSError, ValueError):
        return None


def _meminfo(name: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None
