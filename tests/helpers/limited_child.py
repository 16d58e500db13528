"""Run an action in a forked child with limits of memory and time, for hostile files."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

#: Beyond the present size of the process.
MEMORY_BYTES = 2 * 2**30
SECONDS = 60


def run_limited(action: Callable[[], object]) -> None:
    """Run an action that must end in time, within the memory, and without an exception.

    A child of its own: a hang or an abort of a library in C or Rust costs the example only.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            limit = pages * resource.getpagesize() + MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            # A library that holds Python's lock runs no handler: the signal itself ends the child.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            action()
            code = 0
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}"[:2000].encode(errors="replace"))
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        problem = stream.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code == 0, problem or f"ended by signal {-code}"
