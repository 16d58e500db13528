"""Processes that tests start, and end."""

import contextlib
import subprocess

import psutil


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
