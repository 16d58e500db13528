"""Interface of callbacks that take part in the training loop on every rank."""

from pathlib import Path
from typing import Protocol


class LoopCallback(Protocol):
    """Hooks of the training loop.

    Ray serializes each callback for the workers, so its class must be importable there. The
    loop calls the hooks on all ranks; :class:`pipelines.training.loop.reporter.LoopReporter` is the
    interface for results of rank 0.
    """

    def on_train_start(self, folder: Path | None, rank: int) -> None:
        """Run before the first step of this process.

        Args:
            folder: directory of the run; None if nothing is kept on disk.
            rank: index of this worker, from 0.
        """

    def on_step_start(self, step: int) -> None:
        """Run before a step, after the checkpoint of the steps before it.

        Args:
            step: steps done.
        """
