"""Wait for another process or thread."""

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TypeVar

from tests.helpers.processes import kill_family

Result = TypeVar("Result")

#: Factor of the longest time: other work may take most of a machine.
PATIENCE = 10


def wait_until(
    find: Callable[[], Result],
    seconds: float,
    explain: Callable[[], object] = str,
    *,
    process: "subprocess.Popen[str] | subprocess.Popen[bytes] | None" = None,
    pause: float = 0.05,
) -> Result:
    """Call a function until it returns a true value.

    Args:
        find: the function.
        seconds: the longest time on an idle machine.
        explain: returns what a failure shows.
        process: must run until then. A failure kills it and shows its output.
        pause: seconds between two calls.

    Returns:
        The true value.

    Raises:
        AssertionError: the time was over, or the process ended.
    """
    end = time.monotonic() + seconds * PATIENCE
    while not (result := find()):
        code = process.poll() if process is not None else None
        if code is not None or time.monotonic() > end:
            reason = (
                f"not within {seconds * PATIENCE:g} s" if code is None else f"ended with {code}"
            )
            output = kill_family(process) if process is not None else ""
            raise AssertionError(f"{reason}: {explain()}\n{output}")
        time.sleep(pause)
    return result


def wait_for_answer(
    address: str,
    seconds: float,
    explain: Callable[[], object] = str,
    *,
    process: "subprocess.Popen[str] | subprocess.Popen[bytes] | None" = None,
    accepts_refusal: bool = False,
) -> None:
    """Wait until a server answers a request.

    Args:
        address: HTTP address.
        seconds: the longest time on an idle machine.
        explain: returns what a failure shows.
        process: the server. It must run until it answers.
        accepts_refusal: whether an error status is an answer, too.

    Raises:
        AssertionError: the time was over, or the server ended.
    """

    def has_answer() -> bool:
        try:
            urllib.request.urlopen(address, timeout=10).close()
        except OSError as error:
            return accepts_refusal and isinstance(error, urllib.error.HTTPError)
        return True

    wait_until(has_answer, seconds, explain, process=process, pause=0.1)
