"""Table of differences after more steps: :func:`build_gap_table`.

Equal steps measure the speed of learning where learning is not finished. An arm with a multiple of
the steps shows whether a difference closes.
"""

import json
from collections.abc import Sequence
from typing import Any

from skillnet_platform.tables import ReportTable, TableCell
from skillnet_studies.analysis import statistics
from skillnet_studies.analysis.comparison import MEAN, SPLIT, SystemComparison
from skillnet_studies.analysis.finished_runs import FinishedRun, find_common_replicates
from skillnet_studies.analysis.statistics import DifferenceChange, SampleDifference
from sweeps.config.format import format_signed_points


def build_gap_table(comparison: SystemComparison) -> ReportTable:
    """Return differences from the reference at the usual steps and at more; no row without arms.

    Args:
        comparison: computed results. An arm has the settings of another system, but more steps.
    """
    arms = find_longer_arms(comparison)
    rows = []
    for label, longer in arms.items():
        if label == comparison.reference or comparison.reference not in arms:
            continue
        systems = (comparison.reference, label, arms[comparison.reference], longer)
        if comparison.has_folds and not find_common_replicates(comparison.runs, systems):
            continue
        for task in [*comparison.common_tasks, MEAN]:
            cells = [TableCell(f"{comparison.reference} − {label}"), TableCell(task)]
            rows.append(cells + _build_gap_cells(comparison, systems, task))
    steps = sorted({int(run.trained["step"]) for run in comparison.runs})
    # With folds, a difference on other folds would be no change of this one.
    pairs = "on the replicates that all four have" if comparison.has_folds else "paired by unit"
    return ReportTable(
        "Differences after more steps",
        ["systems", "task", f"{steps[0]} steps", f"{steps[-1]} steps", "change"],
        rows,
        f"Points with 95 % intervals, {pairs}. A difference that closes was one of the speed of "
        "learning.",
    )


def find_longer_arms(comparison: SystemComparison) -> dict[str, str]:
    """Return label -> label of the system with equal settings and more steps.

    Args:
        comparison: computed results.
    """
    groups: dict[str, list[tuple[int, str]]] = {}
    for label, runs in comparison.systems.items():
        key = json.dumps(_settings_without_steps(runs[0]), sort_keys=True, default=str)
        groups.setdefault(key, []).append((int(runs[0].trained["step"]), label))
    ordered = [sorted(members) for members in groups.values()]
    return {members[0][1]: members[-1][1] for members in ordered if members[0][0] < members[-1][0]}


def _settings_without_steps(run: FinishedRun) -> list[Any]:
    settings = run.settings
    training = {k: v for k, v in (settings.get("training") or {}).items() if k != "steps"}
    kept = [settings.get(key) for key in ("system", "options", "model", "tasks")]
    return [*kept, training, bool(settings.get("init_from"))]


def _build_gap_cells(
    comparison: SystemComparison, systems: Sequence[str], task: str
) -> list[TableCell]:
    """Return the difference of two systems, that of their longer arms, and the change."""
    samples = [comparison.samples[label, task, SPLIT] for label in systems]
    if comparison.has_folds:
        samples = statistics.select_common_seeds(samples)
    before, after = SampleDifference(*samples[:2]), SampleDifference(*samples[2:])
    spread = comparison.spreads[task, SPLIT]
    cells = []
    for each in (before, after, DifferenceChange(after, before)):
        gap = statistics.estimate_mean(each, spread)
        ends = f"{format_signed_points(gap.low)} to {format_signed_points(gap.high)}"
        cells.append(TableCell(format_signed_points(gap.value), ends))
    return cells
