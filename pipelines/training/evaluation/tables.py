"""Presentation of evaluation rows: tables, CSV files, MLflow metrics and descriptions.

Evaluation rows are the dictionaries with the keys ``COLUMNS`` that
:func:`pipelines.training.evaluation.evaluator.evaluate_model` returns. Commands print them with
:func:`result_cells` and :func:`summary_cells`; training runs log them with :func:`flat_metrics` and
:func:`run_description`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skillnet.config import SkillNetConfig
from skillnet.objectives.base import NamedMetric, find_objective, list_objectives
from skillnet.skills import Task, default_tasks
from skillnet_evidence.cells import markdown_table
from skillnet_platform.storage import open_output
from skillnet_platform.tables import write_csv
from skillnet_platform.terminal_text import NO_BREAK_SPACE

#: Columns that name the measured rows, beside their split: the corpus, the digest of its manifest,
#: and ``2 of 5`` if the splits are those of a fold.
ORIGIN_COLUMNS = ("corpus", "corpus_digest", "fold")
COLUMNS = (
    "system",
    "task",
    "seed",
    *ORIGIN_COLUMNS,
    "split",
    "metric",
    "value",
    "low",
    "high",
    "activated_params",
    "flops_per_example",
    # Relative difference of a baseline to the size that it aims at; empty for other systems.
    "size_mismatch",
    "steps",
    "date",
    "machine",
)

#: One evaluation row, with the keys ``COLUMNS``.
EvaluationRow = dict[str, Any]

#: Primary metric -> whether higher values are better.
PRIMARY_METRICS = {each.primary.name: each.primary.higher_is_better for each in list_objectives()}

#: The same for tasks with labels.
SCORED_METRICS = {
    each.primary.name: each.primary.higher_is_better
    for each in list_objectives()
    if each.has_labels
}

#: System -> its label in tables.
SYSTEM_LABELS = {"chance": "chance", "simple_baseline": "simple baseline"}


def score_metric(metric: str, value: float) -> float:
    """Return the score of a primary metric, in [0, 1], where higher is better.

    Sweeps, studies and comparisons average these scores over tasks. An error rate above 1 and an R²
    below 0 are worth 0: a negative score would dominate the mean.

    Args:
        metric: name in evaluation rows.
        value: number that evaluation rows have for it.
    """
    return max(value if SCORED_METRICS[metric] else 1.0 - value, 0.0)


def mark_ranked_row(rows: Sequence[EvaluationRow], objective: str, chosen: str | None) -> None:
    """Give the row of the metric that a task chooses its ``score``; see :func:`find_ranked_row`.

    Args:
        rows: records of one task and split.
        objective: kind of the task.
        chosen: name of its metric; None for the primary one, whose score needs no mark.
    """
    known = {metric.name: metric for metric in find_objective(objective).metrics}
    for row in rows:
        if row["metric"] == chosen and chosen in known:
            row["score"] = score_chosen(known[chosen], float(row["value"]))


def score_chosen(metric: NamedMetric, value: float) -> float:
    """Return the score of a metric that a task chooses, at least 0, where higher is better.

    Args:
        metric: its direction and bounds.
        value: number that evaluation rows have for it.
    """
    if metric.higher_is_better:
        return max(value, 0.0)
    # 1 − RMSE would be 0 for most units.
    return 1.0 / (1.0 + value) if metric.scale == "free" else max(1.0 - value, 0.0)


def score_label(metric: str) -> str:
    """Return the label of the score of a metric, of which a higher one is better.

    Args:
        metric: name in evaluation rows.
    """
    label = metric_label(metric)
    return label if find_metric(metric).higher_is_better else f"1 − {label}"


def find_metric(name: str) -> NamedMetric:
    """Return the direction, bounds and label of a metric; an unknown one is a share.

    Args:
        name: as in evaluation rows.
    """
    known = (metric for each in list_objectives() for metric in each.metrics)
    return next((metric for metric in known if metric.name == name), NamedMetric(name))


def metric_label(metric: str) -> str:
    """Return the label of a metric: ``reverse_recall_at_10`` -> ``"R@10, X to text"``.

    Args:
        metric: name in evaluation rows.
    """
    base = metric.removeprefix("reverse_")
    label = find_metric(base).label or base.replace("_", " ")
    return label + (", X to text" if base != metric else "")


def format_metric(metric: str, value: float | None) -> str:
    """Format a metric: rates in per cent, ranks and losses as numbers.

    Args:
        metric: name in evaluation rows.
        value: its value; None and NaN give a dash.
    """
    if value is None or np.isnan(value):
        return "–"
    return f"{value:.4g}" if _is_unscaled(metric) else f"{100 * value:.1f} %"


def _is_unscaled(metric: str) -> bool:
    """Return whether a metric is shown as a number, and not in per cent."""
    return find_metric(metric).scale == "free"


def format_value_with_interval(row: Mapping[str, Any]) -> str:
    """Format a row's value with its interval: ``61.2 % (59.0–63.1)``.

    Args:
        row: with ``metric``, ``value``, and optionally ``low`` and ``high``.
    """
    text = format_metric(row["metric"], row["value"])
    low, high = row.get("low"), row.get("high")
    if low is None or high is None or np.isnan(low) or np.isnan(high):
        return text
    plain = _is_unscaled(row["metric"])
    return (
        f"{text} ({low:.4g}–{high:.4g})" if plain else f"{text} ({100 * low:.1f}–{100 * high:.1f})"
    )


def result_cells(rows: Sequence[EvaluationRow]) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells of evaluation rows: one line per task, split and direction.

    Args:
        rows: records of one system.
    """
    columns = ["task", "split", "metrics (95 % interval)"]
    groups: dict[tuple[str, str, bool], list[EvaluationRow]] = {}
    for row in rows:
        # Both directions of retrieval have the same metrics; one line for both is too long to read.
        key = (row["task"], row["split"], row["metric"].startswith("reverse_"))
        groups.setdefault(key, []).append(row)
    cells = []
    for (task, split, reverse), members in groups.items():
        parts = []
        for row in members:
            label = metric_label(row["metric"].removeprefix("reverse_"))
            # A line of the table ends between two metrics, not within one.
            part = f"{label} {format_value_with_interval(row)}"
            parts.append(part.replace(" ", NO_BREAK_SPACE))
        text = "   ".join(parts)
        cells.append([task, split + (", reverse" if reverse else ""), text])
    return columns, cells


def summary_cells(
    rows: Sequence[EvaluationRow],
    baseline_rows: Sequence[EvaluationRow],
    tasks: Mapping[str, Task],
    total_params: int,
) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells of the summary of a run: one line per task on ``test``.

    Args:
        rows: evaluation rows of the model.
        baseline_rows: evaluation rows of the systems ``chance`` and ``simple_baseline``; without
            rows, the table has no columns for these systems.
        tasks: name -> task.
        total_params: parameters of the complete model.
    """
    baselines = tuple(SYSTEM_LABELS) if baseline_rows else ()
    columns = ["task", "metric", *(SYSTEM_LABELS[name] for name in baselines)]
    columns += ["SkillNet (95 % interval)", "active"]
    cells = []
    for task in sort_rows(tasks):
        own, metric = find_ranked_row(rows, task, tasks[task].objective)
        # Masked tasks and tasks that were not requested have no row on the test split.
        if own is None:
            continue
        compared = [find_row(baseline_rows, task, metric.name, system) for system in baselines]
        cells.append(
            [
                task,
                metric_label(metric.name) + (" ↑" if metric.higher_is_better else " ↓"),
                *(format_metric(metric.name, row["value"]) if row else "–" for row in compared),
                format_value_with_interval(own),
                f"{100 * own['activated_params'] / total_params:.0f} %",
            ]
        )
    return columns, cells


def sort_rows(tasks: Iterable[str]) -> list[str]:
    """Return task names with the paper's five tasks first, in its order; the rest keep their order.

    Args:
        tasks: names.
    """
    names = list(tasks)
    known = [name for name in default_tasks() if name in names]
    return known + [name for name in names if name not in known]


def format_ranked_metrics(rows: Sequence[EvaluationRow], tasks: Mapping[str, Task]) -> str:
    """Format the metric of each task that ranks its models, in one line of Markdown.

    Args:
        rows: evaluation rows of the model.
        tasks: name -> task.
    """
    parts = []
    for task in sort_rows(tasks):
        row, metric = find_ranked_row(rows, task, tasks[task].objective)
        if row is not None:
            value = format_metric(metric.name, row["value"])
            parts.append(f"{task} {metric_label(metric.name)} **{value}**")
    return ", ".join(parts)


def find_row(
    rows: Sequence[EvaluationRow],
    task: str,
    metric: str,
    system: str | None = None,
    split: str = "test",
) -> EvaluationRow | None:
    """Return the first row of a task, metric and split, or None.

    Args:
        rows: to search.
        task: name of the task.
        metric: name of the metric.
        system: name of the system; None accepts every system.
        split: name of the split.
    """
    for row in rows:
        if (row["task"], row["metric"], row["split"]) == (task, metric, split) and system in (
            None,
            row["system"],
        ):
            return row
    return None


def find_ranked_row(
    rows: Sequence[EvaluationRow], task: str, objective: str, split: str = "test"
) -> tuple[EvaluationRow | None, NamedMetric]:
    """Return the row of the metric that ranks models of a task, or None, and the metric.

    It is the one that the run chose, which has a ``score``, else the primary one.

    Args:
        rows: records of one system.
        task: name of the task.
        objective: its kind.
        split: name of the split.
    """
    metrics = find_objective(objective).metrics
    found = [(find_row(rows, task, metric.name, split=split), metric) for metric in metrics]
    chosen = [pair for pair in found if "score" in (pair[0] or {})]
    return (chosen or found)[0]


def flat_metrics(rows: Sequence[EvaluationRow]) -> dict[str, float]:
    """Return rows as MLflow metrics: ``text_to_image/test_recall_at_10`` -> value.

    Of the test splits, only the primary and the chosen metrics on ``test`` are here. MLflow draws a
    chart of each metric, and a final figure would be a chart of one point. The CSV file has all,
    with bounds.

    Args:
        rows: evaluation rows of the model.
    """
    return {
        name_metric(row["task"], row["split"], row["metric"]): float(row["value"])
        for row in rows
        if not row["split"].startswith("test")
        or (row["split"] == "test" and (row["metric"] in PRIMARY_METRICS or "score" in row))
    }


def name_metric(task: str, split: str, metric: str) -> str:
    """Return the name under which runs log a metric: ``text_to_image/test_recall_at_10``."""
    return f"{task}/{split}_{metric}"


def run_description(
    rows: Sequence[EvaluationRow],
    baseline_rows: Sequence[EvaluationRow],
    config: SkillNetConfig,
    total_params: int,
    facts: Mapping[str, Any] | None = None,
    weak_tests: Sequence[str] = (),
) -> str:
    """Return the Markdown description on a run's MLflow page: results, active skills and facts.

    Args:
        rows: records of the model; empty without an evaluation.
        baseline_rows: evaluation rows of the systems ``chance`` and ``simple_baseline``.
        config: shape of the model.
        total_params: parameters of the complete model.
        facts: name -> value to list (steps, minutes, version).
        weak_tests: reasons why the figures prove little.
    """
    parts = [
        f"One sparse model of {total_params / 1e6:.1f} M parameters in {len(config.skills)} "
        f"skills, trained jointly on {len(config.tasks)} tasks."
    ]
    if rows:
        # MLflow folds the note after a few lines, so the metrics come first.
        place = "On held-out data"
        if weak_tests:
            place = "On test rows that prove little"
            parts += [f"**The test proves little.** {sentence}." for sentence in weak_tests]
        parts.append(f"{place}: {format_ranked_metrics(rows, config.tasks)}.")
        parts += [
            "#### Test results",
            markdown_table(*summary_cells(rows, baseline_rows, config.tasks, total_params)),
        ]
        parts += [
            "*active*: share of the parameters that the task reads. Intervals: over held-out "
            "units of the test. The CSV files in `evaluation/` under Artifacts contain all "
            "metrics, with the other test sets and the reverse direction."
        ]
    parts += ["#### Active skills of each tower", markdown_table(*activation_cells(config))]
    if facts:
        parts += ["#### Facts", "\n".join(f"- {key}: {value}" for key, value in facts.items())]
    return "\n\n".join(parts)


def run_facts(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts of a finished training run for its description.

    Args:
        result: as :func:`pipelines.finetune.finetune` returns it.
    """
    facts = {
        "steps": f"{result['step']}",
        "training": f"{result['seconds'] / 60:.1f} min, {result['world']} worker(s)",
        "rows per second": f"{result['rows_per_second']:.0f}",
        "waiting for data": f"{100 * result['waiting']:.1f} % of the time",
        "seed": f"{result['seed']}",
        "folder": f"`{result['run']}`",
    }
    if result.get("stopped_early"):
        facts["stopped early"] = str(result["stopped_early"])
    return facts


def activation_cells(config: SkillNetConfig) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells of the activation table: a line per tower, a dot per active skill.

    Args:
        config: shape of the model.
    """
    cells = []
    for name in sort_rows(config.tasks):
        towers = config.tasks[name].towers
        # The query comes before the candidates, as in the name of the task.
        for tower in find_objective(config.tasks[name].objective).towers:
            plan = towers[tower]
            label = name if len(towers) == 1 else f"{name}, {tower}"
            cells.append([label, *("●" if s in plan.skills else "" for s in config.skills)])
    return ["tower", *config.skills], cells


def write_evaluation_csv(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write evaluation rows as CSV with six significant digits.

    Args:
        rows: to write.
        path: file to write.
    """
    write_csv(path, rows, COLUMNS, open_file=open_output)


def compute_overall_score(
    rows: Sequence[Mapping[str, Any]], split: str
) -> tuple[float | None, dict[str, float]]:
    """Return the mean score of the tasks on a split, and the score of each task.

    The score of a task is its accuracy, its recall at 10, or 1 − token error rate; see
    :func:`pipelines.training.evaluation.tables.score_metric`. Tasks without labels count only if no
    task has labels, as in a pretraining. A row with a ``score`` counts for its task instead: the
    run chose its metric.

    Args:
        rows: evaluation rows of one system.
        split: that counts.

    Returns:
        None if no task has a row on the split.
    """
    chosen = [row for row in rows if row["split"] == split]
    scores = {
        str(row["task"]): score_metric(row["metric"], float(row["value"]))
        for row in chosen
        if row["metric"] in SCORED_METRICS
    }
    scores |= {str(row["task"]): row["score"] for row in chosen if row.get("score") is not None}
    # The score of a loss is exp(-loss), between 0 and 1 for pixels as well. Of masked tokens it is
    # the geometric mean of their probabilities.
    scores = scores or {
        str(row["task"]): _score_unlabelled(row["metric"], float(row["value"]))
        for row in chosen
        if row["metric"] in PRIMARY_METRICS
    }
    return (average_scores(scores) if scores else None), scores


def _score_unlabelled(metric: str, value: float) -> float:
    return value if PRIMARY_METRICS[metric] else math.exp(-value)


def average_scores(scores: Mapping[str, float]) -> float:
    """Return the mean of the scores of tasks.

    Args:
        scores: task -> score; at least one.
    """
    return sum(scores.values()) / len(scores)
