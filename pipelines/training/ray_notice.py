"""Brings a notice to leave into Ray's workers. Imports Ray: only a fit on Ray imports this."""

import logging

from ray.train.v2._internal.execution.callback import WorkerCallback

from pipelines.training import notice

#: Of the module in which Ray logs what a training function raised, traceback and all.
LOGGER = "ray.train.v2._internal.util"


class ListenInWorker(WorkerCallback):
    """Each worker takes SIGTERM as a notice.

    Ray runs the training function in a thread, where Python allows no signal handlers; this runs
    in the worker's main thread, before it.
    """

    def after_init_train_context(self) -> None:
        notice.listen_in_worker()
        logging.getLogger(LOGGER).addFilter(is_no_regrouping)


def is_no_regrouping(record: logging.LogRecord) -> bool:
    """Whether a line of the log is about anything but workers that leave to start again."""
    return f"{notice.Regroup.__module__}.{notice.Regroup.__name__}" not in record.getMessage()
