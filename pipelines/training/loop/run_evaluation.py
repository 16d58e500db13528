"""Evaluation of a run: its model, the record of the result, and the check of splits before it."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.training.config.data import MASKS
from pipelines.training.config.run import FinetuneConfig
from skillnet_platform.config import to_dict
from skillnet_platform.errors import UserError, check_known_names
from skillnet_platform.storage import read_json, read_record, write_json

if TYPE_CHECKING:
    from pipelines.training.evaluation.inference import EvaluationRanks
    from pipelines.training.evaluation.outcomes import OutcomeTable
    from pipelines.training.loop.resolved_run import ResolvedRun
    from skillnet.multitask_model import TaskModel
    from skillnet.systems import SizeMatch
    from skillnet_platform.tracking import Tracker

#: Sizes of this process' runs: models are built for them, which can take seconds. Checks, plans,
#: each evaluation and reports ask for the same one.
_measured: "dict[str, SizeMatch | None]" = {}


def measure_baseline_size(config: FinetuneConfig) -> "SizeMatch | None":
    """Return the aimed size and the size of the run's system; None if it is not matched.

    Args:
        config: settings of a run, with its reference tasks.

    Raises:
        ValueError: no model has the requested size.
    """
    from skillnet.systems import find_system

    key = repr((config.system, config.model, config.options))
    if key not in _measured:
        system = find_system(config.system)
        _measured[key] = system.measure_size(config.model, config.options)
    return _measured[key]


def find_size_mismatch(config: FinetuneConfig) -> str | None:
    """Return in a sentence how a baseline misses the size that it aims at; None within 5 %.

    Args:
        config: settings of a run, with its reference tasks.

    Raises:
        ValueError: no model has the requested size.
    """
    from skillnet.baselines.size_matching import reference_tasks

    size = measure_baseline_size(config)
    if size is None or not size.is_mismatch:
        return None
    tasks = ", ".join(reference_tasks(config.model))
    return (
        f"the layers of {config.system} miss SkillNet's size by {size.describe()}, on average over "
        f"{tasks}"
    )


def check_chosen_metrics(config: FinetuneConfig) -> None:
    """Check that each trained task that chooses a metric has it.

    Args:
        config: settings of the run.

    Raises:
        UserError: the objective of a task has no metric of this name.
    """
    from skillnet.objectives.base import find_objective
    from skillnet.skills import find_task

    for name, task in config.trained.items():
        if task.metric is not None:
            objective = find_objective(find_task(name, config.model.tasks).objective)
            known = [metric.name for metric in objective.metrics]
            check_known_names([task.metric], known, f"tasks.{name}.metric", "metric")


#: Result of the evaluation before it is logged and registered; ``result.json`` follows.
EVALUATED = "evaluated.json"
EVALUATION_CSV = "evaluation.csv"


def evaluate_run(
    config: FinetuneConfig,
    model: "TaskModel",
    splits: Sequence[str] | None,
    *,
    step: int | None = None,
    precision: str = "auto",
    bootstrap_samples: int = 0,
    tasks: Sequence[str] | None = None,
    outcomes: "OutcomeTable | None" = None,
    on_split: Callable[[str, str, int, int], None] | None = None,
    ranks: "EvaluationRanks | None" = None,
) -> list[dict[str, Any]]:
    """Evaluate a model on the corpora of its run.

    Args:
        config: settings of the run, with an absolute data path.
        model: on the device that it runs on.
        splits: names; None takes the test splits, and ``validation`` for masked tasks.
        step: training steps, copied into the rows.
        precision: number type of the forward passes; ``auto``, bf16, fp32 or fp64.
        bootstrap_samples: number of resamples of each interval; 0 leaves intervals out.
        tasks: names of the tasks to evaluate; None takes all that are measured.
        outcomes: receives the outcome of each row.
        on_split: see :func:`pipelines.training.evaluation.evaluator.evaluate_model`.
        ranks: that share the rows; all call this.

    Returns:
        Tidy rows, one per metric, task and split; none on ranks other than the first.
    """
    from pipelines.training.evaluation.evaluator import evaluate_model

    measured = {name: config.measured[name] for name in tasks or config.measured}
    rows = evaluate_model(
        model,
        str(config.data),
        list(measured),
        splits,
        seed=config.seed,
        corpora={name: task.corpus for name, task in measured.items()},
        limits={name: task.max_length for name, task in measured.items()},
        metrics={name: task.metric for name, task in measured.items()},
        steps=step,
        precision=precision,
        bootstrap_samples=bootstrap_samples,
        on_split=on_split,
        outcomes=outcomes,
        masks=MASKS[config.training.masking],
        ranks=ranks,
        fold=config.fold,
    )
    # Only the run knows the size that its baseline aims at.
    size = measure_baseline_size(config) if rows else None
    return rows if size is None else [row | {"size_mismatch": size.deviation} for row in rows]


def complete_result(
    config: FinetuneConfig,
    run: Path,
    tracker: "Tracker",
    result: dict[str, Any],
    splits: Sequence[str] | None,
    brief: bool,
) -> dict[str, Any]:
    """Complete the result of a run whose workers have evaluated its model; log all of it.

    Metrics, costs and a description are logged. The model is only counted here: the
    driver may have no GPU.

    The result is written to ``evaluated.json`` before its metrics are logged. A process that
    resumes after a kill logs the same metrics with the same times, which the tracker stores once.

    Args:
        config: settings of the run.
        run: its folder, with the model.
        tracker: client of its MLflow run.
        result: outcome of the training and of
            :func:`pipelines.training.loop.run_evaluation.evaluate_final`.
        splits: that the model was evaluated on; None took the test splits.
        brief: look for no weaknesses of the test, and log no score.

    Returns:
        The result with ``total_params``, the parameters of the complete model.
    """
    from pipelines.training.evaluation import tables
    from skillnet import systems
    from skillnet.accounting import account_task
    from skillnet_platform.tracking.backend import SCORE_METRIC

    model = systems.load_model(run / "model")
    # A comparison of runs reads this number: it may not have their models.
    total = sum(p.numel() for p in model.parameters())
    rows = result["evaluation"]
    # Lists of runs are sorted by it. The driver of a sweep logs its own.
    score, _ = tables.compute_overall_score(rows, splits[0] if splits else "test")
    scored = {} if brief or score is None else {SCORE_METRIC: score}
    weak = find_run_weaknesses(config, rows, splits) if not brief else []
    costs = {task: account_task(model, task) for task in config.measured}
    record: dict[str, Any] = {
        "result": result | {"total_params": total} | ({"weak_tests": weak} if weak else {}),
        "splits": list(splits) if splits is not None else None,
        "brief": brief,
        "costs": {f"{task}/activated_params": cost.activated for task, cost in costs.items()}
        | {f"{task}/flops_per_example": cost.flops_per_example for task, cost in costs.items()}
        | {"training/total_params": total},
        "metrics": tables.flat_metrics(rows) | scored,
        "note": tables.run_description(
            rows, [], model.config, total, tables.run_facts(result), weak
        ),
    }
    # Another machine may have evaluated the run before, and logged the same numbers.
    before = read_json(run / EVALUATED) if (run / EVALUATED).is_file() else {}
    is_equal = all(before.get(key) == record[key] for key in ("costs", "metrics"))
    record["time_ms"] = before["time_ms"] if is_equal else int(time.time() * 1000)
    write_json(run / EVALUATED, record)
    return _log_evaluation(run, tracker, record)


def find_run_weaknesses(
    config: FinetuneConfig, rows: list[dict[str, Any]], splits: Sequence[str] | None
) -> list[str]:
    """Return why figures of a run prove little; see ``evaluation.weak_tests``."""
    from pipelines.training.evaluation.weak_tests import find_weak_tests
    from pipelines.training.runs.model_source import list_training_reads

    evaluated = {row["task"] for row in rows}
    found = find_weak_tests(
        str(config.data),
        {name: task for name, task in config.model.tasks.items() if name in evaluated},
        list_training_reads(to_dict(config)),
        corpora={name: task.corpus for name, task in config.measured.items()},
        splits=splits,
        fold=config.fold,
    )
    return [each.sentence for each in found]


def resume_evaluation(
    run: "ResolvedRun", tracker: "Tracker", splits: Sequence[str] | None, brief: bool
) -> dict[str, Any] | None:
    """Log the evaluation that a killed process left, and return its result.

    Args:
        run: settings with their corpora, tasks and sizes resolved.
        tracker: client of its MLflow run.
        splits: see :func:`complete_result`.
        brief: see :func:`complete_result`.

    Returns:
        None if the training or its evaluation is not complete, or was of other data.

    Raises:
        UserError: ``evaluated.json`` is damaged.
    """
    path = run.folder / EVALUATED
    if not path.is_file():
        return None
    required: dict[str, type | tuple[type, ...]] = {
        "result": dict,
        "costs": dict,
        "metrics": dict,
        "note": str,
        "time_ms": int,
    }
    remedy = "remove it, and the same command evaluates the model again"
    record = read_record(path, required, remedy)
    result = record["result"]
    is_same = (
        (record.get("splits"), record.get("brief"))
        == (list(splits) if splits is not None else None, brief)
        and result.get("corpora") == {name: m["digest"] for name, m in run.manifests.items()}
        # A run that was stopped continues to train.
        and (
            result.get("step", -1) >= run.config.training.steps
            or result.get("has_converged") is True
        )
        and (run.folder / "model" / "manifest.json").is_file()
        # A node of the same run may have removed it to train again.
        and (run.folder / "trained.json").is_file()
    )
    return _log_evaluation(run.folder, tracker, record) if is_same else None


def _log_evaluation(run: Path, tracker: "Tracker", record: dict[str, Any]) -> dict[str, Any]:
    from pipelines.training.evaluation.outcomes import OUTCOMES_FILE

    result: dict[str, Any] = record["result"]
    tracker.constants(record["costs"])
    if result["evaluation"]:
        tracker.metrics(record["metrics"], result["step"], record["time_ms"])
        for file in (EVALUATION_CSV, OUTCOMES_FILE):
            tracker.artifact(run / file, "evaluation")
    tracker.note(record["note"])
    return result


def check_evaluation_splits(run: "ResolvedRun", splits: Sequence[str] | None) -> None:
    """Check before training that there are splits to evaluate the final model on.

    Args:
        run: settings with their corpora, tasks and sizes resolved.
        splits: requested splits; None requests test splits.

    Raises:
        UserError: no corpus has the requested split, or a row of one cannot be read.
    """
    from pipelines.training.evaluation.evaluator import choose_splits
    from pipelines.training.loading.task_columns import check_split_columns
    from skillnet.skills import find_task

    config = run.config
    specs = {name: find_task(name, config.model.tasks) for name in config.measured}
    evaluated = {}
    for name, settings in config.measured.items():
        corpus = run.corpora[settings.corpus]
        evaluated[name] = choose_splits(corpus, splits, task=specs[name])
    found = {split for names in evaluated.values() for split in names}
    absent = [split for split in splits or () if split not in found]
    if absent or not found:
        raise UserError(
            f"no corpus of the tasks {', '.join(config.measured)} in {config.data} has a split "
            f"{(absent or ['test'])[0]!r} to evaluate the model on; prepare one with this split, "
            "or train with --evaluate false"
        )
    for name, names in evaluated.items():
        corpus = run.corpora[config.measured[name].corpus]
        for split in names:
            check_split_columns(name, specs[name], corpus, split, config.model)
