"""Processes that tests start, and end."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
NOTHING: Mapping[str, str] = MappingProxyType({})
#: Libraries that a process which trains or records loads after its start.
PRELOADED = (
    "pandas",
    "pipelines.training.loop.loop",
    "pipelines.training.loop.sharded_checkpoints",
    "pipelines.training.loop.sharding",
    "mlflow.store.tracking.sqlalchemy_store",
    "skillnet_platform.tracking.run",
)


def fork_context() -> multiprocessing.context.ForkServerContext:
    """Return the context whose processes are forks of one that has loaded its libraries.

    A fork takes milliseconds, and the libraries of a new process five seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def child_environment(variables: Mapping[str, str] = NOTHING) -> dict[str, str]:
    """The environment of this process with the checkout on Python's path, and more variables."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}", **variables}


def run_python(
    *words: object,
    before: Sequence[str] = (),
    variables: Mapping[str, str] = NOTHING,
    **options: Any,
) -> "subprocess.CompletedProcess[str]":
    """Run Python to its end, after the words of another program; its output is text."""
    settings = {"capture_output": True, "text": True, "timeout": 600} | options
    command = [*before, sys.executable, *map(str, words)]
    return subprocess.run(command, env=child_environment(variables), **settings)


def start_python(
    *words: object,
    until: str = "",
    before: Sequence[str] = (),
    variables: Mapping[str, str] = NOTHING,
    **options: Any,
) -> "subprocess.Popen[str]":
    """Start Python with a pipe for its output, and wait for its first line ``until``, if given."""
    settings = {"stdout": subprocess.PIPE, "text": True} | options
    command = [*before, sys.executable, *map(str, words)]
    process = subprocess.Popen(command, env=child_environment(variables), **settings)
    if until:
        assert process.stdout.readline() == f"{until}\n"
    return process


def kill_family(process: "subprocess.Popen[str] | subprocess.Popen[bytes]") -> str:
    """Kill a process with all that it started, if it still runs; return its unread output.

    A worker left alone may reach its end before Ray ends it.
    """
    if process.poll() is None:
        family = [psutil.Process(process.pid)]
        family += family[0].children(recursive=True)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    # After a failed wait, a test may call this again; a pipe is read once.
    if any(pipe is not None and pipe.closed for pipe in (process.stdout, process.stderr)):
        return ""
    parts = [part for part in process.communicate() if part is not None]
    return "\n".join(part if isinstance(part, str) else part.decode() for part in parts)


def make_counting(reported: list[int], folder: Path, stack: ExitStack) -> Callable[[float], None]:
    """Return a side of a benchmark that computes for a number of seconds in an empty folder.

    It is here because its process imports its module, which should be done at once.
    """
    assert not list(folder.iterdir())
    reported.append(0)

    def work(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return work
