"""Observers of a training that a configuration names: callbacks on every rank, loggers on rank 0.

:func:`find_observers` finds them by the entry points ``skillnet.callbacks`` and
``skillnet.loggers``, which name a class without arguments.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from skillnet_files.entry_points import find_entries
from skillnet_platform.errors import UserError, suggest_name

CALLBACKS, LOGGERS = "skillnet.callbacks", "skillnet.loggers"


class LoopCallback(Protocol):
    """Hooks of the training loop, called on all ranks.

    Ray serializes a callback that Python passes to a run, so its class must be importable in the
    workers. One that the configuration names is made in each worker.
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


class RunLogger(Protocol):
    """Receiver of the metrics of a run beside MLflow. Rank 0 makes and calls it."""

    def start(self, folder: Path, config: dict[str, Any]) -> None:
        """Begin, or continue after an interruption.

        Args:
            folder: directory of the run, for files of the logger.
            config: configuration of the run in plain values, without secrets.
        """

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        """Record metrics, named ``task/metric``.

        Args:
            values: name -> value.
            step: steps done.
        """

    def finish(self) -> None:
        """End; called once, also if the training fails."""


def find_observers(group: str, names: Sequence[str], key: str) -> list[Any]:
    """Return the class of each named entry point.

    Args:
        group: :data:`CALLBACKS` or :data:`LOGGERS`.
        names: names in the configuration. A name only selects; nothing else is imported.
        key: key of the configuration, for messages.

    Raises:
        UserError: no installed package has the name, or its entry cannot be loaded.
    """
    known, found = find_entries(group), []
    for name in names:
        if name not in known:
            hint = suggest_name(name, known) if known else ""
            raise UserError(
                f"{key}: no installed package has an entry point {group}:{name}{hint}. Install the "
                "package that has it"
            )
        try:
            found.append(known[name].load())
        except (ImportError, AttributeError) as error:
            raise UserError(f"{key}: {group}:{name} cannot be loaded: {error}") from error
    return found
