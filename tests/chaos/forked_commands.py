"""Run commands in forked children, which have their libraries loaded already.

    python -m tests.chaos.forked_commands MODULE…

The parent loads the modules. Then it reads one JSON line per command from its standard input:
``words``, the file for the ``output``, and the ``patience`` in seconds. It answers with the exit
code. The child has a session of its own; the parent kills what a command leaves in it.
"""

import contextlib
import importlib
import json
import mmap
import os
import signal
import struct
import sys
import time
from pathlib import Path


def announce_driver() -> None:
    """Write this process id into the control file, so that a kill includes this process."""
    path = Path(os.environ["SKILLNET_CRASH_CONTROL"])
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as control:
        struct.pack_into("q", control, 16, os.getpid())


def run_child(words: list[str], output: str) -> None:
    """Become the command; never returns."""
    os.setsid()
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for descriptor in (1, 2):
        os.dup2(target, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    announce_driver()
    code = 1
    try:
        result = importlib.import_module(words[0]).main(words[1:])
        code = int(result or 0)
        # As at the end of a process: libraries flush and remove what they hold.
        import atexit

        atexit._run_exitfuncs()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(child: int, patience: float) -> int:
    """Return the exit code of a child; kill it when the patience ends."""
    end = time.monotonic() + patience
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


def main() -> None:
    """Answer orders until the input ends."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            run_child(order["words"], order["output"])
        print(wait_for(child, order["patience"]), flush=True)


if __name__ == "__main__":
    main()
