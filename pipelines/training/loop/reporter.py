"""Observers of a training: its reporters, and callbacks and loggers that a configuration names.

Rank 0 reports metrics, progress, evaluations and checkpoints. :func:`find_observers` finds the
others by the entry points ``skillnet.callbacks`` (on every rank) and ``skillnet.loggers`` (on rank
0), which name a class without arguments.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipelines.training.config.run import FinetuneConfig, TrainingConfig
from pipelines.training.evaluation.inference import EvaluationRanks
from pipelines.training.runs.mirror import CheckpointUploads
from pipelines.training.runs.progress_log import PROGRESS, ProgressFile
from skillnet.multitask_model import TaskModel
from skillnet_files.entry_points import find_entries
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.errors import UserError, suggest_name
from skillnet_platform.package_version import describe_missing_extra
from skillnet_platform.tracking import Tracker

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
            missing = describe_missing_extra(error)
            raise UserError(
                f"{key}: {missing or f'{group}:{name} cannot be loaded: {error}'}"
            ) from error
    return found


#: Seconds between two progress lines of a worker whose progress file the driver does not see.
PROGRESS_NOTE_S = 10.0
#: Called with the tidy rows of an evaluation during training, and the step.
OnEvaluation = Callable[[list[dict[str, Any]], int], None]


class LoopReporter:
    """Receiver of the loop's results on rank 0. This base class ignores them.

    Attributes:
        evaluates_last: the last step is evaluated like the steps of ``training.evaluate_every``.
            A trial evaluates its final model itself, on the same rows.
    """

    evaluates_last = True

    def start(self, step: int) -> None:
        """Note that training begins after ``step`` steps of an earlier process."""

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Record metrics, named ``task/metric``."""

    def progress(self, step: int, losses: str) -> None:
        """Show that ``step`` steps are done."""

    def needs_evaluation(self, step: int, last: int, settings: TrainingConfig) -> bool:
        """Return whether the loop evaluates the model after a step.

        Args:
            step: steps done.
            last: step at which the loop ends.
            settings: hyperparameters of the training.
        """
        if not settings.evaluate_every:
            return False
        if step == settings.steps:
            return self.evaluates_last
        return step < last and step % settings.evaluate_every == 0

    def evaluate(self, model: TaskModel, step: int) -> list[dict[str, Any]] | None:
        """Evaluate the model; the loop waits until this returns.

        Returns:
            Tidy rows, on the first rank; None without an evaluation.
        """
        return None

    def checkpoint(self, path: Path, step: int) -> None:
        """Note that a valid checkpoint is at ``path``."""

    def begin_split(self, name: str, rows: int, left: int, step: int) -> None:
        """Show that the final evaluation begins with a split; its rows are among those left."""

    def log_final(self, rows: list[dict[str, Any]], step: int) -> None:
        """Record the tidy rows of the final model; none if the run was preempted."""

    def close(self) -> None:
        """End; called once, also if the training fails."""


class SilentReporter(LoopReporter):
    """Reporter of the other ranks, which infer their part of each evaluation.

    Args:
        config: settings of the run, with absolute paths.
        on_evaluation: called after each evaluation, or None.
        ranks: that evaluate together.
    """

    def __init__(
        self, config: FinetuneConfig, on_evaluation: OnEvaluation | None, ranks: EvaluationRanks
    ) -> None:
        self._config, self._on_evaluation, self._ranks = config, on_evaluation, ranks
        self.evaluates_last = on_evaluation is None

    def evaluate(self, model: TaskModel, step: int) -> list[dict[str, Any]]:
        rows = evaluate_validation(self._config, model, self._ranks)
        if self._on_evaluation is not None:
            self._on_evaluation([], step)
        return rows


class RunReporter(LoopReporter):
    """Writer of metrics to MLflow and to the run's progress file.

    Args:
        config: settings of the run, with absolute paths.
        run: folder of the run.
        tracker: client of the run's MLflow run, or None.
        on_evaluation: called after each evaluation, or None.
        uploads: sends checkpoints to an object store, or None.
        world: number of workers; an elastic run records it as a metric.
        is_remote: the driver does not see the progress file; print the progress from time to
            time, because Ray forwards the output of workers.
        ranks: that evaluate together; None is this process alone.
        loggers: beside those that the configuration names.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        run: Path,
        tracker: Tracker | None,
        on_evaluation: OnEvaluation | None = None,
        uploads: CheckpointUploads | None = None,
        world: int = 1,
        is_remote: bool = False,
        ranks: EvaluationRanks | None = None,
        loggers: Sequence[RunLogger] = (),
    ) -> None:
        self._ranks = ranks
        self._uploads, self._world = uploads, world
        self._next_note = time.monotonic() if is_remote else float("inf")
        self._config, self._tracker = config, tracker
        self._on_evaluation = on_evaluation
        self.evaluates_last = on_evaluation is None
        self._file = ProgressFile(run / PROGRESS)
        named = find_observers(LOGGERS, config.tracking.loggers, "tracking.loggers")
        self._loggers: list[RunLogger] = [*(kind() for kind in named), *loggers]
        for logger in self._loggers:
            logger.start(run, configuration.to_dict(config))

    def start(self, step: int) -> None:
        self.progress(step, "")
        if self._config.training.min_workers:
            self.metrics({"training/workers": self._world}, step)

    def metrics(self, values: dict[str, float], step: int) -> None:
        self._file.append(step=step, metrics=values)
        if self._tracker is not None:
            self._tracker.metrics(values, step)
        for logger in self._loggers:
            logger.log_metrics(values, step)

    def progress(self, step: int, losses: str) -> None:
        self._file.append(step=step, losses=losses)
        if time.monotonic() >= self._next_note:
            self._next_note = time.monotonic() + PROGRESS_NOTE_S
            suffix = f", {losses}" if losses else ""
            console.print_note(f"training: step {step} of {self._config.training.steps}{suffix}")

    def evaluate(self, model: TaskModel, step: int) -> list[dict[str, Any]]:
        from pipelines.training.evaluation.tables import flat_metrics

        rows = evaluate_validation(self._config, model, self._ranks)
        self.metrics(flat_metrics(rows), step)
        if self._on_evaluation is not None:
            self._on_evaluation(rows, step)
        return rows

    def checkpoint(self, path: Path, step: int) -> None:
        if self._uploads is not None:
            self._uploads.add_checkpoint(path)

    def begin_split(self, name: str, rows: int, left: int, step: int) -> None:
        self._file.append(step=step, evaluating=name, rows=rows, left=left)
        if time.monotonic() >= self._next_note:
            self._next_note = time.monotonic() + PROGRESS_NOTE_S
            console.print_note(f"evaluating: {name}, {rows} of {left} rows that are left")

    def log_final(self, rows: list[dict[str, Any]], step: int) -> None:
        """Give the evaluation to the loggers; the driver records it in MLflow."""
        from pipelines.training.evaluation.tables import name_metric

        values = {name_metric(r["task"], r["split"], r["metric"]): float(r["value"]) for r in rows}
        for logger in self._loggers if values else ():
            logger.log_metrics(values, step)

    def close(self) -> None:
        """Send buffered metrics, end the loggers and close the progress file."""
        for logger in self._loggers:
            logger.finish()
        if self._tracker is not None:
            self._tracker.flush()
        self._file.close()


def evaluate_validation(
    config: FinetuneConfig, model: TaskModel, ranks: EvaluationRanks | None
) -> list[dict[str, Any]]:
    """Evaluate a model on the validation splits, during training; all ranks call this.

    Args:
        config: settings of the run, with absolute paths.
        model: in training, on the device of this worker.
        ranks: that share the rows.

    Returns:
        Tidy rows; none on ranks other than the first.
    """
    from pipelines.training.loop.run_evaluation import evaluate_run

    # The same precision as in training; without intervals, which would slow the run down.
    precision = config.training.precision
    return evaluate_run(config, model, ["validation"], precision=precision, ranks=ranks)
