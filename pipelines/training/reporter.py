"""TODO: pipelines.training.reporter."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config.run import FinetuneConfig
from pipelines.runs.progress_log import PROGRESS, ProgressFile
from pipelines.runs.uploads import Uploads
from pipelines.training.loop import Reporter
from skillnet.multitask_model import TaskModel
from skillnet_platform import console
from skillnet_platform.tracking import Tracker

if TYPE_CHECKING:
    pass

#: So often a worker whose progress file the driver does not see says how far it is.
ALOUD_S = 10.0
#: Called with the tidy rows of an evaluation during training, and the step.
OnEvaluation = Callable[[list[dict[str, Any]], int], None]


class RunReporter(Reporter):
    """Writes metrics to MLflow and to the run's progress file.

    Args:
        config: of the run, with absolute paths.
        run: folder of the run.
        tracker: of the run, or none.
        on_evaluation: told about each evaluation, or none.
        uploads: sends checkpoints to a store, or none.
        world: number of workers; recorded where it may change.
        aloud: the driver does not see the progress file: say now and then how far it is. Ray
            passes on what workers say.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        run: Path,
        tracker: Tracker | None,
        on_evaluation: OnEvaluation | None = None,
        uploads: Uploads | None = None,
        world: int = 1,
        aloud: bool = False,
    ) -> None:
        self._uploads, self._world = uploads, world
        self._next_words = time.monotonic() if aloud else float("inf")
        self._config, self._run, self._tracker = config, run, tracker
        self._on_evaluation = on_evaluation
        self._file = ProgressFile(run / PROGRESS)

    def start(self, step: int) -> None:
        self.progress(step, "")
        if self._config.training.min_workers:
            self.metrics({"training/workers": self._world}, step)

    def metrics(self, values: dict[str, float], step: int) -> None:
        self._file.say(step=step, metrics=values)
        if self._tracker is not None:
            self._tracker.metrics(values, step)

    def progress(self, step: int, words: str) -> None:
        self._file.say(step=step, words=words)
        if time.monotonic() >= self._next_words:
            self._next_words = time.monotonic() + ALOUD_S
            said = f", {words}" if words else ""
            console.note(f"training: step {step} of {self._config.training.steps}{said}")

    def evaluate(self, model: TaskModel, step: int) -> None:
        from pipelines.evaluation import reconstructions
        from pipelines.evaluation.evaluator import evaluate_model
        from pipelines.evaluation.tables import flat_metrics

        tasks = self._config.measured
        rows = evaluate_model(
            model,
            str(self._config.data),
            list(tasks),
            ["validation"],
            seed=self._config.seed,
            corpora={name: task.corpus for name, task in tasks.items()},
            limits={name: task.max_length for name, task in tasks.items()},
            precision=self._config.training.precision,
            samples=0,
            masks=self._config.training.masking,
        )
        self.metrics(flat_metrics(rows), step)
        reconstructions.record(self._config, model, self._run, self._tracker, step)
        if self._on_evaluation is not None:
            self._on_evaluation(rows, step)

    def checkpoint(self, path: Path, step: int) -> None:
        if self._uploads is not None:
            self._uploads.checkpoint(path)

    def close(self) -> None:
        """Send what waits and close the file."""
        if self._tracker is not None:
            self._tracker.flush()
        self._file.close()


class _Others(Reporter):
    """Ranks but the first: they only take part in what all ranks do after an evaluation."""

    def __init__(self, on_evaluation: OnEvaluation | None) -> None:
        self._on_evaluation = on_evaluation

    def evaluate(self, model: TaskModel, step: int) -> None:
        if self._on_evaluation is not None:
            self._on_evaluation([], step)
