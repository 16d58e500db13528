"""Evaluation of the final model by the workers that trained it, on their devices.

:func:`evaluate_final` is called by :mod:`pipelines.training.loop.worker`. The driver only reads the
results: it may run on a node without a GPU, where the same evaluation takes hours.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.training.loop import preemption
from pipelines.training.loop.run_evaluation import EVALUATION_CSV, evaluate_run
from pipelines.training.runs import layout
from skillnet_platform.storage import write_json

if TYPE_CHECKING:
    from pipelines.training.evaluation.ranks import EvaluationRanks
    from pipelines.training.loop.reporter import LoopReporter
    from pipelines.training.loop.resolved_run import ResolvedRun
    from skillnet.multitask_model import TaskModel

#: Bootstrap samples of a confidence interval.
BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True)
class FinalEvaluation:
    """Request to evaluate the final model of a run. Its values are plain, for Ray.

    Args:
        splits: to evaluate on; None takes the test splits if ``config.evaluate`` is set.
        brief: write no intervals, for a run that is only ranked among others.
        source: folder of a model that is evaluated too, on the tasks that take no steps; the run
            grew from it.
    """

    splits: tuple[str, ...] | None = None
    brief: bool = False
    source: str | None = None


class EvaluationStoppedError(Exception):
    """The final evaluation was asked to stop; the same command repeats it."""


def evaluate_final(
    run: "ResolvedRun",
    model: "TaskModel",
    request: FinalEvaluation,
    ranks: "EvaluationRanks",
    reporter: "LoopReporter",
    step: int,
) -> list[dict[str, Any]]:
    """Evaluate the final model; the first rank writes tables and outcomes to the run.

    Args:
        run: settings with their corpora, tasks and sizes resolved.
        model: the final model, on the device of this worker.
        request: splits and extent.
        ranks: that share the rows; all call this.
        reporter: receiver of progress of this rank; shows progress.
        step: steps done.

    Returns:
        Tidy rows; none without an evaluation, or on ranks other than the first.

    Raises:
        EvaluationStoppedError: on all ranks, if one of them was asked to stop.
    """
    from pipelines.training.evaluation.outcomes import OUTCOMES_FILE, OutcomeTable, write_outcomes
    from pipelines.training.evaluation.tables import write_evaluation_csv

    config, folder = run.config, run.folder

    def begin_split(task: str, split: str, rows: int) -> None:
        # All ranks stop before the same split.
        if ranks.is_any(preemption.stop_requested()):
            raise EvaluationStoppedError
        reporter.begin_split(f"{task} {split}", rows, step)

    if not config.evaluate and request.splits is None:
        return []
    outcomes = OutcomeTable()
    rows = evaluate_run(
        config,
        model,
        request.splits,
        step=step,
        bootstrap_samples=0 if request.brief else BOOTSTRAP_SAMPLES,
        outcomes=outcomes,
        on_split=begin_split,
        ranks=ranks,
    )
    if ranks.is_first:
        write_evaluation_csv(rows, folder / EVALUATION_CSV)
        write_outcomes(outcomes, folder / OUTCOMES_FILE)
    kept = [name for name, task in config.measured.items() if task.eval_only]
    if request.source is not None and kept:
        _evaluate_source(run, request.source, kept, ranks, begin_split)
    return rows


def _evaluate_source(
    run: "ResolvedRun",
    source: str,
    tasks: list[str],
    ranks: "EvaluationRanks",
    begin_split: Any,
) -> None:
    """Evaluate the source of a growth as the grown model was, because both must be equal."""
    from pipelines.training.evaluation.outcomes import OUTCOMES_FILE, OutcomeTable, write_outcomes
    from pipelines.training.loop.setup import pick_device
    from pipelines.training.runs.model_source import ModelSource, load_source_model

    device = pick_device(run.config.training.use_gpu)
    model = load_source_model(ModelSource(source, Path(source))).to(device)
    outcomes = OutcomeTable()
    rows = evaluate_run(
        run.config,
        model,
        None,
        bootstrap_samples=BOOTSTRAP_SAMPLES,
        tasks=tasks,
        outcomes=outcomes,
        on_split=begin_split,
        ranks=ranks,
    )
    if ranks.is_first:
        write_outcomes(outcomes, run.folder / f"{layout.SOURCE}-{OUTCOMES_FILE}")
        write_json(run.folder / layout.SOURCE_ROWS, rows)
