"""Actions in forked children that die before their n-th file-system event.

The events are those of Python's auditing. ``tests.chaos.crash_points`` sees libraries too, and
needs a C compiler.
"""

import os
import sys
from collections.abc import Callable

#: Events of Python's auditing that change files.
EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"}
KILLED = 9


class EventCounter:
    """Counter of file-system events, which ends its process at one of them.

    Args:
        number: index of the event, from 1.
    """

    def __init__(self, number: int) -> None:
        self._number, self._count = number, 0

    def __call__(self, event: str, arguments: tuple[object, ...] = ()) -> None:
        """Count an event; an audit hook."""
        is_write = event == "open" and arguments[1] in ("w", "wb", "ab")
        if event in EVENTS or is_write:
            self._count += 1
            if self._count == self._number:
                os._exit(KILLED)


def run_killed(action: Callable[[EventCounter], None], number: int) -> bool:
    """Run an action in a child that dies before its n-th event; return whether it was killed.

    Args:
        action: gets the counter, for changes of files that Python does not audit.
        number: index of the event, from 1.
    """
    child = os.fork()
    if not child:
        try:
            counter = EventCounter(number)
            sys.addaudithook(counter)
            action(counter)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED)
    return code == KILLED
