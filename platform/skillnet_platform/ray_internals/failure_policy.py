"""Failure policy of Ray Train: restart failed workers, but stop at once on a user error.

A callback runs a function in the main thread of each worker.
"""

import logging
from collections.abc import Callable
from typing import Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.failure_handling import (
    DefaultFailurePolicy,
    FailureDecision,
    FailurePolicy,
)
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from skillnet_platform.errors import UserError
from skillnet_platform.ray_internals.errors import WorkerGroupResize

#: The controller logs the exceptions of the start of its workers under this name.
CONTROLLER_LOGGER = "ray.train.v2._internal.execution.controller.controller"


def hide_user_errors() -> None:
    """Keep user errors, which the driver prints, out of the controller's log."""
    logging.getLogger(CONTROLLER_LOGGER).addFilter(is_no_user_error)


def is_no_user_error(record: logging.LogRecord) -> bool:
    """Return False for the log lines of user errors."""
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))


def is_user_error(error: TrainingFailedError) -> bool:
    """Return whether a worker, or the start of the workers, failed with a user error."""
    if isinstance(error, ControllerError):
        return isinstance(error.controller_failure, UserError)
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    return any(isinstance(each, UserError) for each in failures.values())


class FailFastOnUserError(DefaultFailurePolicy):
    """Ray's default policy, except that a user error ends the run.

    A restart does not repair a full disk or an altered shard.
    """

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Return whether the workers restart or the run ends."""
        if is_user_error(training_failed_error):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class PolicyTrainer(DataParallelTrainer):
    """Trainer whose controller gets the policies of :meth:`create_policies`.

    It is no ``TorchTrainer``, because the controller would import torch, which costs two seconds
    and 500 MB.
    """

    def _create_default_callbacks(self) -> list[Any]:
        # Without a dataset of Ray Data this callback only starts an actor, for two seconds.
        return [
            each
            for each in super()._create_default_callbacks()
            if self.datasets or not isinstance(each, DatasetsCallback)
        ]

    def create_policies(self, failures: FailureConfig) -> dict[str, Any]:
        """Return keyword arguments that replace the policies of Ray's controller.

        Args:
            failures: number of restarts.
        """
        policy: FailurePolicy = FailFastOnUserError(failures)
        return {"failure_policy": policy}

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        # Ray annotates it with the class of its first version.
        failures: Any = self.run_config.failure_config or FailureConfig()
        policies = self.create_policies(failures)
        return super()._initialize_and_run_controller(**(arguments | policies))


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
