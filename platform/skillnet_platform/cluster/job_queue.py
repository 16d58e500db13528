"""Queue of independent jobs on Ray: a lost worker or host costs its own job time, and no other job.

:func:`run_jobs` calls one function per job, each in a task of Ray. The function must resume its
work when it is called again with the same arguments. Called by ``skillnet grow --tasks``.
"""

import contextlib
import os
import platform
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from skillnet_platform.cli import user_error_message
from skillnet_platform.cluster.connect import OwnNodeCheck, ray_session
from skillnet_platform.errors import TerminatedError, first_line
from skillnet_platform.signals import terminate_as_interrupt
from skillnet_platform.storage.locks import LEASE_S, LockHeldError

JobState = Literal["waiting", "running", "done", "failed"]

#: Seconds between two looks at the jobs, which take hours. The end of a job is seen at once.
POLL_S = 2.0


@dataclass
class QueuedJob:
    """Job of a queue, and its state.

    Args:
        name: name for people.
        arguments: plain values for the function.
        log: file for the output of its processes, on a disk that all nodes share.
        count_progress: returns a number that grows while the job advances, such as its steps.
        cpus: CPUs that it reserves.
        gpus: GPUs that it reserves.
        max_failures: restarts after its process died without progress. A lost host and a process
            that advanced do not count.
        state: waiting, running, done or failed.
        result: result of the function.
        error: reason of a failure.
        is_user_error: whether the user can remove that reason.
        restarts: number of times that its process or host was lost.
        seconds: from its first start to its end.
    """

    name: str
    arguments: dict[str, Any]
    log: Path
    count_progress: Callable[[], float]
    cpus: float = 1.0
    gpus: float = 0.0
    max_failures: int = 1
    state: JobState = "waiting"
    result: Any = None
    error: str | None = None
    is_user_error: bool = False
    restarts: int = 0
    seconds: float = 0.0
    _log_start: int = field(default=0, repr=False)
    _began: float | None = field(default=None, repr=False)
    _best: float = field(default=0.0, repr=False)
    _idle_deaths: int = field(default=0, repr=False)
    _locked_since: float | None = field(default=None, repr=False)

    def wait(self) -> None:
        """Note that it waits for its process."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.state, self._log_start = "waiting", self._log_bytes()

    def refresh(self) -> None:
        """Note whether its process has started: the process writes the first line of the log."""
        if self.state == "waiting" and self._log_bytes() > self._log_start:
            self.state = "running"
            self._began = self._began or time.monotonic()

    def end(
        self, *, result: Any = None, error: str | None = None, is_user_error: bool = False
    ) -> None:
        """Note its result, or the reason of its failure."""
        self.refresh()
        self.state = "done" if error is None else "failed"
        self.result, self.error, self.is_user_error = result, error, is_user_error
        if self._began is not None:
            self.seconds = time.monotonic() - self._began

    def may_restart(self, *, lost_host: bool) -> bool:
        """Return whether the job starts again after its process or host was lost.

        Args:
            lost_host: the host was lost, which says nothing about the job.
        """
        self.restarts += 1
        progress = self.count_progress()
        if lost_host or progress > self._best:
            self._idle_deaths, self._best = 0, max(progress, self._best)
            return True
        self._idle_deaths += 1
        return self._idle_deaths <= self.max_failures

    def may_wait_for_lock(self) -> bool:
        """Return whether another process may still leave the folder of the job."""
        # Ray needs a moment to end the processes of a dead driver, and a lease needs its time.
        self._locked_since = self._locked_since or time.monotonic()
        return time.monotonic() - self._locked_since < 2 * LEASE_S

    def _log_bytes(self) -> int:
        return self.log.stat().st_size if self.log.is_file() else 0


def run_jobs(
    jobs: Sequence[QueuedJob],
    function: Callable[[dict[str, Any]], Any],
    *,
    environment: Mapping[str, str],
    show: Callable[[], None],
) -> None:
    """Run every job to its end, as many at the same time as the CPUs and GPUs of Ray allow.

    A failed job does not end the others. If this process ends, Ray ends the jobs; the same jobs in
    a new queue resume.

    Args:
        jobs: jobs whose states are updated.
        function: importable on every node; is called with the arguments of a job.
        environment: variables of the processes.
        show: called after every look at the jobs.

    Raises:
        UserError: the node of this process is lost.
    """
    with ray_session() as ray:
        task = ray.remote(
            # The loop below decides, because Ray counts a lost host like a crash of the job.
            max_retries=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": dict(environment)},
        )(_run_job)

        def start(job: QueuedJob) -> Any:
            job.wait()
            reserved = task.options(num_cpus=job.cpus, num_gpus=job.gpus)
            return reserved.remote(function, job.arguments, str(job.log))

        waiting = {start(job): job for job in jobs}
        own_node = OwnNodeCheck()
        while waiting:
            ended, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
            for reference in ended:
                job = waiting.pop(reference)
                if _must_repeat(ray, reference, job):
                    waiting[start(job)] = job
            for job in waiting.values():
                job.refresh()
            own_node.require_alive()
            show()


def _must_repeat(ray: Any, reference: Any, job: QueuedJob) -> bool:
    """Settle a job whose task has ended; return whether it runs again."""
    try:
        outcome, value = ray.get(reference)
    except (ray.exceptions.RayTaskError, ray.exceptions.RuntimeEnvSetupError) as error:
        job.end(error=first_line(error))
        return False
    except ray.exceptions.RayError as error:
        job.refresh()
        lost_host = isinstance(error, ray.exceptions.NodeDiedError)
        if job.may_restart(lost_host=lost_host):
            return True
        job.end(
            error=f"its process ended {job.max_failures + 1} times without progress "
            f"({first_line(error)}); its log is {job.log}"
        )
        return False
    if outcome == "left" or (outcome == "locked" and job.may_wait_for_lock()):
        return True
    if outcome == "done":
        job.end(result=value)
    else:
        job.end(error=value, is_user_error=outcome != "failed")
    return False


def _run_job(
    function: Callable[[dict[str, Any]], Any], arguments: dict[str, Any], log: str
) -> tuple[str, Any]:
    """Call the function in this process, with its output in a log; return how it ended."""
    with (
        open(log, "a", encoding="utf-8", buffering=1) as stream,  # noqa: PTH123
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        print(f"started on {platform.node()} as process {os.getpid()}")
        try:
            with terminate_as_interrupt():
                return "done", function(arguments)
        except TerminatedError as error:
            # A notice to this host: the job wrote a checkpoint and continues elsewhere.
            print(error)
            return "left", None
        except LockHeldError as error:
            return "locked", str(error)
        except Exception as error:
            traceback.print_exc()
            message = user_error_message(error)
            if message is not None:
                return "refused", message
            return "failed", f"{type(error).__name__}: {first_line(error)}; its log is {log}"
