"""Work with a time limit, in a thread."""

import threading
from collections.abc import Callable


def run_within(seconds: float, work: Callable[[threading.Event], None]) -> bool:
    """Run work in a thread, and return whether it ended in time.

    After the time limit an event is set. A thread that does not check it is abandoned.
    """
    is_late, errors = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            work(is_late)
        except BaseException as error:
            errors.append(error)

    # A daemon thread does not keep the process alive if it hangs.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    in_time = not thread.is_alive()
    is_late.set()
    # The thread checks the event after each row. Then its counts no longer change.
    thread.join(0.5)
    if errors:
        raise errors[0]
    return in_time
