"""Brings a notice to leave into Ray's workers. Imports Ray: only a fit on Ray imports this."""

from ray.train.v2._internal.execution.callback import WorkerCallback

from pipelines.training import notice


class ListenInWorker(WorkerCallback):
    """Each worker takes SIGTERM as a notice.

    Ray runs the training function in a thread, where Python allows no signal handlers; this runs
    in the worker's main thread, before it.
    """

    def after_init_train_context(self) -> None:
        notice.listen_in_worker()
