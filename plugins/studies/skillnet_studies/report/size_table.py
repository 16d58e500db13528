"""Table of the sizes that baselines are matched to: :func:`build_size_table`."""

from typing import TYPE_CHECKING

from skillnet_platform.tables import ReportTable, TableCell
from skillnet_studies.analysis.comparison import SystemComparison
from skillnet_studies.analysis.finished_runs import FinishedRun
from sweeps.config.format import format_count, format_signed_points

if TYPE_CHECKING:
    from skillnet.systems import SizeMatch


def build_size_table(comparison: SystemComparison) -> ReportTable:
    """Return the aimed and the reached size of each baseline; no row without baselines.

    Args:
        comparison: computed results.
    """
    rows, mismatches = [], []
    for label, runs in comparison.systems.items():
        size = _measure_run(runs[0])
        if size is None:
            continue
        if size.is_mismatch:
            mismatches.append(label)
        rows.append(
            [
                TableCell(label),
                TableCell(size.quantity),
                TableCell(format_count(size.aimed)),
                TableCell(format_count(size.reached)),
                TableCell(
                    f"{format_signed_points(size.deviation)} %",
                    "mismatch" if size.is_mismatch else "",
                ),
            ]
        )
    names = ", ".join(mismatches)
    return ReportTable(
        "Sizes of baselines",
        ["system", "matched", "SkillNet", "system's layers", "difference"],
        rows,
        "Transformer layers, on average over the tasks that the runs train and evaluate. "
        "Operations are those of a token."
        + (f" Not the size of SkillNet, by more than 5 %: {names}." if names else ""),
        collapsed=not mismatches,
    )


def _measure_run(run: FinishedRun) -> "SizeMatch | None":
    """Return the sizes of a run's system; None if it is not matched or not installed here."""
    from pipelines.training.config.run import FinetuneConfig
    from pipelines.training.runs.baseline_size import measure_baseline_size
    from skillnet_platform import config as configuration

    try:
        config = configuration.build_config(FinetuneConfig, dict(run.settings))
        return measure_baseline_size(config.joint())
    # A report does not fail because of a system of a third party, or a checkpoint that is gone.
    except (ValueError, OSError):
        return None
