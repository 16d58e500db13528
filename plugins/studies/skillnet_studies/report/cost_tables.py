"""Tables of the cost of each system: parameters, operations, time, and the way to dense's score.

They are called by :mod:`skillnet_studies.report.tables`.
"""

from collections.abc import Sequence

import numpy as np

from skillnet_platform.tables import ReportTable, TableCell
from skillnet_studies.analysis.comparison import MEAN, SystemComparison
from skillnet_studies.analysis.finished_runs import FinishedRun
from skillnet_studies.analysis.target_budget import BudgetRatio, estimate_budgets
from sweeps.config.format import format_count, format_duration


def build_cost_table(comparison: SystemComparison) -> ReportTable:
    """Return parameters, FLOPs and training time of each system."""
    rows = []
    pretrained = any(run.pretraining_seconds for run in comparison.runs)
    for label, runs in comparison.systems.items():
        cost = comparison.costs[label, MEAN]
        seconds = np.array([run.seconds for run in runs])
        # The range over runs, since training times depend on the load of the machine.
        ends = (format_duration(float(seconds.min())), format_duration(float(seconds.max())))
        spread = f"{ends[0]} to {ends[1]}" if ends[0] != ends[1] else ""
        rows.append(
            [
                TableCell(label),
                TableCell(format_count(runs[0].total_params) if runs[0].total_params else "–"),
                TableCell(format_count(cost.activated)),
                TableCell(format_count(cost.flops)),
                TableCell(format_duration(float(seconds.mean())), spread),
                *([TableCell(_pretraining_time(runs))] if pretrained else []),
                TableCell(
                    f"{np.mean([float(r.trained.get('rows_per_second', 0)) for r in runs]):.0f}"
                ),
                TableCell(f"{int(runs[0].trained['step'])}"),
            ]
        )
    return ReportTable(
        "Cost",
        [
            "system",
            "parameters, total",
            "activated, mean over tasks",
            "FLOPs per example, mean over tasks",
            "training",
            *(["pretraining"] if pretrained else []),
            "rows per second",
            "steps",
        ],
        rows,
        "Activated: parameters that one example reads. FLOPs: executed in a forward pass of one "
        "test example, counted alike for every system; one multiply-add counts as two. Training: "
        "time in the loop per run, without evaluation; for resumed runs and pretrainings the total "
        "time, estimated at the rate of the last part.",
        collapsed=True,
    )


def build_activated_table(comparison: SystemComparison) -> ReportTable:
    """Return the activated parameters by task."""
    return _build_cost_by_task_table(comparison, "Activated parameters by task", "activated")


def build_flops_table(comparison: SystemComparison) -> ReportTable:
    """Return the executed FLOPs by task."""
    return _build_cost_by_task_table(comparison, "FLOPs per example by task", "flops")


def _build_cost_by_task_table(comparison: SystemComparison, title: str, cost: str) -> ReportTable:
    rows = []
    for label in comparison.systems:
        costs = [comparison.costs.get((label, task)) for task in comparison.tasks]
        rows.append(
            [
                TableCell(label),
                *(TableCell(format_count(getattr(c, cost)) if c else "–") for c in costs),
            ]
        )
    columns = ["system", *(task.replace("_", " ") for task in comparison.tasks)]
    return ReportTable(title, columns, rows, collapsed=True)


def _pretraining_time(runs: Sequence[FinishedRun]) -> str:
    seconds = [run.pretraining_seconds for run in runs if run.pretraining_seconds]
    return format_duration(float(np.mean(seconds))) if seconds else "–"


def build_budget_table(comparison: SystemComparison) -> ReportTable:
    """Return what each system spends until it reaches dense's final score."""
    budgets = estimate_budgets(comparison)
    rows = [
        [
            TableCell(label),
            TableCell(own.against),
            TableCell(f"{own.reached} of {own.runs}"),
            *(_ratio_cell(each, own.is_bound) for each in (own.steps, own.flops, own.seconds)),
        ]
        for label, own in budgets.items()
    ]
    return ReportTable(
        "Budget until dense's final score",
        ["system", "target", "runs that reach it", "steps", "operations", "time"],
        rows,
        "Ratios of what a dense run spends in total: geometric mean over runs, with 95 % intervals "
        "over runs (Student's t on logarithms; each run is paired with one dense run). The target "
        "is the mean score on validation rows at the end of the dense run; the curve is "
        "interpolated between evaluations. ≥: some runs do not reach the target and count with all "
        "that they spent, so the ratio is a lower bound without an interval. Operations: steps "
        "times FLOPs per example, mean over tasks. Pretraining is not counted. The row of the "
        "dense system shows how early another dense run reaches such a score by chance.",
        collapsed=True,
    )


def _ratio_cell(ratio: BudgetRatio, is_bound: bool) -> TableCell:
    interval = "" if np.isnan(ratio.low) else f"{ratio.low:.2f}–{ratio.high:.2f}"
    return TableCell(f"{'≥ ' if is_bound else ''}{ratio.value:.2f}", interval)
