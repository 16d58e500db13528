"""Runs whose process was killed: found by a process tag and closed."""

import os
import socket
from pathlib import Path
from typing import Any

PROCESS_TAG = "skillnet.process"


def this_process() -> str:
    """Return host, process id and start time: the system reuses process ids."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def close_abandoned(client: Any, experiment_id: str) -> int:
    """Close as KILLED the RUNNING runs whose process on this machine ended; return their number.

    Args:
        client: ``MlflowClient``.
        experiment_id: experiment to search.
    """
    closed = 0
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        host, _, rest = run.data.tags.get(PROCESS_TAG, "").partition(":")
        pid, _, started = rest.partition(":")
        # A process of another machine cannot be checked from here.
        if host == socket.gethostname() and pid.isdigit() and _started(int(pid)) != started:
            client.set_tag(run.info.run_id, "failure", "the process was killed")
            client.set_terminated(run.info.run_id, "KILLED")
            closed += 1
    return closed


def _started(pid: int) -> str:
    try:
        # The name in parentheses may contain spaces, so the fields are counted after it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
