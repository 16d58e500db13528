"""Processes that tests start, and end."""

import contextlib
import subprocess

import psutil


def kill_family(process: "subprocess.Popen[str] | subprocess.Popen[bytes]") -> None:
    """Kill a process with all that it started, if it still runs.

    A worker left alone may reach its end before Ray ends it.
    """
    if process.poll() is None:
        family = [psutil.Process(process.pid)]
        family += family[0].children(recursive=True)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.communicate()
