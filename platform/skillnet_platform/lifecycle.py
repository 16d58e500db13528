"""Ends of runs that nobody meant: signals, killed processes; and the machine's own metrics."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from skillnet_platform.errors import Terminated

PROCESS_TAG = "skillnet.process"


def this_process() -> str:
    """Host, process id and its start time: an id alone is used again by the system."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def close_abandoned(client: Any, experiment_id: str) -> int:
    """End as KILLED the RUNNING runs whose process, on this machine, is gone; how many."""
    closed = 0
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        host, _, rest = run.data.tags.get(PROCESS_TAG, "").partition(":")
        pid, _, started = rest.partition(":")
        if host == socket.gethostname() and pid.isdigit() and _started(int(pid)) != started:
            client.set_tag(run.info.run_id, "failure", "the process was killed")
            client.set_terminated(run.info.run_id, "KILLED")
            closed += 1
    return closed


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM raises an interrupt inside the block, so that what is open gets closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        raise Terminated("ended by SIGTERM; the same command goes on")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as problem:
        if not asked or isinstance(problem, Terminated):
            raise
        # Ray, when it waits, makes a plain one of ours.
        raise Terminated("ended by SIGTERM; the same command goes on") from problem
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def system_metrics(
    run_id: str,
    uri: str,
    publish: Callable[[Mapping[str, float], int], None],
    every_s: float = 10.0,
) -> Iterator[None]:
    """Publish CPU, memory, disk, network and GPU figures, named ``system/…``, during the block.

    MLflow's monitors, our sending: its own thread stops for good at the first lost request.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, tracking_uri=uri)
    stop = threading.Event()

    def watch() -> None:
        step, ended = 0, False
        while not ended:
            monitor.collect_metrics()
            ended = stop.wait(every_s)
            values = monitor.aggregate_metrics()
            publish({f"system/{name}": value for name, value in values.items()}, step)
            for each in monitor.monitors:
                each.clear_metrics()
            step += 1

    thread = threading.Thread(target=watch, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=every_s)


def _started(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
