"""The end of a run: its model is measured, described, recorded and registered."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config.run import FinetuneConfig
from pipelines.runs.progress_log import PROGRESS, history
from skillnet_platform import console
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from pipelines.evaluation.outcomes import Outcomes
    from skillnet.multitask_model import TaskModel
    from skillnet_platform.tracking import Tracker

#: Resamplings of an interval.
SAMPLES = 1000


def conclude(
    config: FinetuneConfig,
    run: Path,
    tracker: "Tracker",
    result: dict[str, Any],
    splits: Sequence[str] | None,
    brief: bool,
) -> list[dict[str, Any]]:
    """Evaluate the final model, and record figures, plots, costs and a description.

    Args:
        config: of the run.
        run: its folder, with the model.
        tracker: of its MLflow run.
        result: of the training; gets ``total_params``, the parameters of the whole model.
        splits: on which it is evaluated; none takes the test splits if ``config.evaluate`` is set.
        brief: no pictures and no intervals.

    Returns:
        Tidy rows; empty without an evaluation.
    """
    from pipelines.evaluation import reconstructions, tables
    from pipelines.evaluation.outcomes import FILE as OUTCOMES
    from pipelines.evaluation.outcomes import Outcomes, write_outcomes
    from skillnet import systems
    from skillnet.accounting import account_task

    model = systems.load_model(run / "model")
    costs = {task: account_task(model, task) for task in config.measured}
    # Whoever compares runs need not have their models.
    result["total_params"] = total = sum(p.numel() for p in model.parameters())
    tracker.metrics(
        {f"{task}/activated_params": cost.activated for task, cost in costs.items()}
        | {f"{task}/flops_per_example": cost.flops_per_example for task, cost in costs.items()}
        | {"training/total_params": total}
    )
    if not brief:
        past = history(run / PROGRESS)
        for name, figure in tables.training_figures(past, config.model).items():
            tracker.figure(figure, name)
        reconstructions.record(config, model, run, tracker, result["step"])
    outcomes = Outcomes()
    wanted = config.evaluate or splits is not None
    samples = 0 if brief else SAMPLES
    rows = _evaluate(config, model, result["step"], splits, outcomes, samples) if wanted else []
    if rows:
        from pipelines.evaluation.tables import write_csv

        tracker.metrics(tables.flat_metrics(rows), result["step"])
        write_csv(rows, run / "evaluation.csv")
        write_outcomes(outcomes, run / OUTCOMES)
        for file in ("evaluation.csv", OUTCOMES):
            tracker.artifact(run / file, "evaluation")
    facts = {
        "steps": result["step"],
        "training": f"{result['seconds'] / 60:.1f} min, {result['world']} worker(s)",
        "rows per second": f"{result['rows_per_second']:.0f}",
        "waiting for data": f"{100 * result['waiting']:.1f} % of the time",
        "seed": config.seed,
        "folder": f"`{run}`",
    }
    tracker.note(tables.description(rows, [], model.config, total, facts))
    return rows


def check_splits(
    config: FinetuneConfig,
    manifests: Mapping[str, Mapping[str, Any]],
    splits: Sequence[str] | None,
) -> None:
    """See that there is something to evaluate the final model on, before it is trained.

    Raises:
        UserError: no corpus has those splits, or without any a test split.
    """
    from skillnet.skills import find_task

    there = {name: manifests[task.corpus]["splits"] for name, task in config.measured.items()}
    masked = {n for n in there if find_task(n, config.model.tasks).objective == "masked"}
    if splits:
        absent = [s for s in splits if not any(s in found for found in there.values())]
    elif any(s.startswith("test") for n, found in there.items() for s in found if n not in masked):
        absent = []
    else:
        absent = [] if any("validation" in there[name] for name in masked) else ["test"]
    if absent:
        raise UserError(
            f"no corpus of the tasks {', '.join(there)} below {config.data} has a split "
            f"{absent[0]!r} to evaluate the model on; prepare one that has, or train with "
            "--evaluate false"
        )


def _evaluate(
    config: FinetuneConfig,
    model: "TaskModel",
    step: int,
    splits: Sequence[str] | None,
    outcomes: "Outcomes",
    samples: int,
) -> list[dict[str, Any]]:
    from pipelines.evaluation.evaluator import evaluate_model

    with console.progress("evaluating", None, "rows") as bar:
        return evaluate_model(
            model,
            str(config.data),
            list(config.measured),
            splits,
            seed=config.seed,
            corpora={name: task.corpus for name, task in config.measured.items()},
            limits={name: task.max_length for name, task in config.measured.items()},
            steps=step,
            samples=samples,
            on_split=lambda task, split, count: bar.advance(count, f"{task} {split}"),
            outcomes=outcomes,
            masks=config.training.masking,
        )
