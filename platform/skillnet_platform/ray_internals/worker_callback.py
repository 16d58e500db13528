"""Callback that runs a function in the main thread of each worker of Ray Train."""

import logging
from collections.abc import Callable

from ray.train.v2._internal.execution.callback import WorkerCallback

from skillnet_platform.ray_internals.errors import WorkerGroupResize

#: Ray logs the exception of a training function, with its traceback, under this name.
LOGGER = "ray.train.v2._internal.util"


class WorkerStartCallback(WorkerCallback):
    """Callback that calls ``on_start`` in each worker before training starts.

    Ray runs the training function in a thread, where Python allows no signal handlers. This
    callback runs in the main thread.

    Args:
        on_start: function without arguments; must be picklable.
    """

    def __init__(self, on_start: Callable[[], None]) -> None:
        self._on_start = on_start

    def after_init_train_context(self) -> None:
        """Call ``on_start``, and keep resize requests out of the log."""
        self._on_start()
        # A planned restart is no failure, but its traceback would look like one.
        logging.getLogger(LOGGER).addFilter(is_not_resize)


def is_not_resize(record: logging.LogRecord) -> bool:
    """Return False for the log lines of workers that stop in order to restart."""
    # The record holds the exception as text only, so its name identifies it.
    name = f"{WorkerGroupResize.__module__}.{WorkerGroupResize.__name__}"
    return name not in record.getMessage()
