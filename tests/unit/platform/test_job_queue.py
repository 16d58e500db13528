"""A queue of jobs: what a job does to its process costs no other job anything."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skillnet_platform.cluster.job_queue import JobState, QueuedJob, run_jobs
from skillnet_platform.errors import UserError
from skillnet_platform.storage.locks import LockHeldError
from skillnet_platform.terminal_text import format_plural

pytestmark = pytest.mark.integration


def do_work(arguments: dict[str, Any]) -> str:
    """Fail as the arguments say: in the first calls, or in all of them."""
    calls = Path(arguments["calls"])
    with calls.open("a", encoding="utf-8") as stream:
        stream.write("call\n")
    count = len(calls.read_text(encoding="utf-8").splitlines())
    if count > arguments["failing"]:
        return f"{arguments['what']} after {format_plural(count, 'call')}"
    if arguments["advances"]:
        calls.with_suffix(".steps").write_text(str(count), encoding="utf-8")
    match arguments["what"]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "leave":
            os.kill(os.getpid(), signal.SIGTERM)
        case "lock":
            raise LockHeldError("another process works here")
        case "user":
            raise UserError("cuonts: missing")
        case "defect":
            raise RuntimeError("a defect")
    time.sleep(60)
    return "not reached"


def count_steps(path: Path) -> Callable[[], float]:
    return lambda: float(path.read_text(encoding="utf-8")) if path.is_file() else 0.0


ALWAYS = 99
#: Name -> what it does, in how many calls, with progress; its end, restarts and result or error.
CASES: dict[str, tuple[str, int, bool, JobState, int, str]] = {
    "sound": ("nothing", 0, False, "done", 0, "nothing after 1 call"),
    "killed": ("kill", 1, False, "done", 1, "kill after 2 calls"),
    "killed after progress": ("kill", 3, True, "done", 3, "kill after 4 calls"),
    "kills itself": ("kill", ALWAYS, False, "failed", 2, "2 times without progress"),
    "asked to leave": ("leave", 1, False, "done", 0, "leave after 2 calls"),
    "locked": ("lock", 1, False, "done", 0, "lock after 2 calls"),
    "bad data": ("user", ALWAYS, False, "failed", 0, "cuonts: missing"),
    "defect": ("defect", ALWAYS, False, "failed", 0, "RuntimeError: a defect; its log is"),
}


def test_a_job_that_ends_in_any_way_leaves_the_others(ray_session: Any, tmp_path: Path) -> None:
    jobs = [
        QueuedJob(
            name,
            {"what": what, "failing": failing, "advances": advances, "calls": f"{tmp_path}/{n}"},
            tmp_path / "logs" / f"{n}.log",
            count_steps(tmp_path / f"{n}.steps"),
            cpus=0.5,
            max_failures=1,
        )
        for n, (name, (what, failing, advances, *_)) in enumerate(CASES.items())
    ]
    states: list[list[str]] = []
    run_jobs(
        jobs,
        do_work,
        environment={},
        show=lambda: states.append([str(job.state) for job in jobs]),
    )
    for job, (_, _, _, state, restarts, said) in zip(jobs, CASES.values(), strict=True):
        assert (job.state, job.restarts) == (state, restarts), job
        assert said in (job.result if state == "done" else job.error), job
        assert job.is_user_error == (job.name == "bad data")
        assert f"as process {os.getpid()}" not in job.log.read_text(encoding="utf-8")
        assert job.log.read_text(encoding="utf-8").count("started on") == (
            len(Path(job.arguments["calls"]).read_text(encoding="utf-8").splitlines())
        )
    assert states[-1] == [job.state for job in jobs]
    assert any("failed" in now and {"waiting", "running"} & set(now) for now in states)
