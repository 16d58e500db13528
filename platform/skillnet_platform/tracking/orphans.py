"""Runs whose process was killed: found by a process tag and closed."""

import os
import socket
from pathlib import Path
from typing import Any

PROCESS_TAG = "skillnet.process"
#: Tag of a run that ended without success: the cause.
FAILURE_TAG = "failure"
#: MLflow writes an artifact under such a name first, and hides these files.
_PARTIAL_UPLOADS = ".artifact.uploading.*"


def this_process() -> str:
    """Return the identity of this process among all processes that use one tracker.

    It consists of the host name, the kernel's boot, the PID namespace, the process id and the
    start time. Containers can share a host name, and the system reuses process ids.
    """
    return f"{visible_processes()}:{os.getpid()}:{_started(os.getpid())}"


def has_ended(process: str) -> bool:
    """Return whether a process ended; False if it cannot be seen from here.

    A process of another machine, of another container or from before a restart cannot be seen. Its
    run stays RUNNING until it is resumed, because a living run must never be closed.

    Args:
        process: from :func:`this_process`.
    """
    where, _, started = process.rpartition(":")
    where, _, pid = where.rpartition(":")
    return where == visible_processes() and pid.isdigit() and _started(int(pid)) != started


def visible_processes() -> str:
    """Return the set of processes in which process ids of this process are valid."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").readlink().name.removeprefix("pid:")
    except OSError:
        boot = namespace = ""
    return f"{socket.gethostname()}:{boot}:{namespace}"


def close_abandoned(client: Any, experiment_id: str) -> int:
    """Close as KILLED the RUNNING runs whose process on this machine ended; return their number.

    Args:
        client: ``MlflowClient``.
        experiment_id: experiment to search.
    """
    closed = 0
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        if has_ended(run.data.tags.get(PROCESS_TAG, "")):
            client.set_tag(run.info.run_id, FAILURE_TAG, "the process was killed")
            client.set_terminated(run.info.run_id, "KILLED")
            closed += 1
    return closed


def reopen_run(client: Any, run_id: str) -> None:
    """Set a run to RUNNING for this process, and remove the cause of its earlier end.

    Args:
        client: ``MlflowClient``.
        run_id: MLflow's identifier of the run.
    """
    client.update_run(run_id, status="RUNNING")
    # The old tag names an ended process, so the next start would close this run.
    client.set_tag(run_id, PROCESS_TAG, this_process())
    # Otherwise a run that finishes after a kill would still show the kill as its failure.
    run = client.get_run(run_id)
    if FAILURE_TAG in run.data.tags:
        client.delete_tag(run_id, FAILURE_TAG)
    _remove_partial_uploads(run.info.artifact_uri, client.tracking_uri)


def _remove_partial_uploads(artifact_uri: str, tracking_uri: str) -> None:
    """Remove the files that a killed process began to store as artifacts of a run.

    Only a folder of this machine has such files. The run belongs to this process, so no other
    process is storing one.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    folder = get_artifact_repository(artifact_uri, tracking_uri=tracking_uri)
    if isinstance(folder, LocalArtifactRepository):
        for path in Path(folder.artifact_dir).rglob(_PARTIAL_UPLOADS):
            path.unlink(missing_ok=True)


def _started(pid: int) -> str:
    try:
        # The name in parentheses may contain spaces, so the fields are counted after it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
