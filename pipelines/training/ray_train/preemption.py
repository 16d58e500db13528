"""Brings a notice to leave into Ray's workers. Imports Ray: only a fit on Ray imports this."""

import contextlib
import logging
import secrets

from ray.exceptions import RaySystemError
from ray.experimental import internal_kv
from ray.train.v2._internal.execution.callback import WorkerCallback

from pipelines.training import preemption

#: Of the module in which Ray logs what a training function raised, traceback and all.
LOGGER = "ray.train.v2._internal.util"

NAMESPACE = "skillnet-notice"


class RaySign:
    """A sign that every process of the cluster sees: a key in the store of Ray's head.

    Each has a key of its own, so that workers which outlive a killed driver are not asked by the
    next one. A look is one small message to the head.
    """

    def __init__(self) -> None:
        self._key = secrets.token_hex(8)

    def put_up(self) -> None:
        """Set the key."""
        internal_kv._internal_kv_put(self._key, "leave", namespace=NAMESPACE)

    def take_down(self) -> None:
        """Delete the key."""
        # A head that is gone has taken the key along.
        with contextlib.suppress(RaySystemError, AttributeError):
            internal_kv._internal_kv_del(self._key, namespace=NAMESPACE)

    def is_up(self) -> bool:
        """Whether the key is set."""
        return bool(internal_kv._internal_kv_exists(self._key, namespace=NAMESPACE))


class ListenInWorker(WorkerCallback):
    """Each worker takes SIGTERM as a notice.

    Ray runs the training function in a thread, where Python allows no signal handlers; this runs
    in the worker's main thread, before it.
    """

    def after_init_train_context(self) -> None:
        preemption.listen_in_worker()
        logging.getLogger(LOGGER).addFilter(is_no_regrouping)


def is_no_regrouping(record: logging.LogRecord) -> bool:
    """Whether a line of the log is about anything but workers that leave to start again."""
    return (
        f"{preemption.Regroup.__module__}.{preemption.Regroup.__name__}" not in record.getMessage()
    )
