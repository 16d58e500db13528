"""Tables of a comparison, shown on the terminal and in the report.

:func:`build_tables` is called by ``skillnet_studies.report.report``.
"""

from collections.abc import Iterator

import numpy as np

from pipelines.training.evaluation.tables import score_metric
from skillnet_platform.tables import ReportTable, TableCell
from skillnet_studies.analysis.comparison import (
    MEAN,
    SPLIT,
    PairedTest,
    SystemComparison,
    TestVerdict,
    find_variant,
    name_score,
)
from skillnet_studies.analysis.run_figures import estimate_run_figures
from skillnet_studies.analysis.run_groups import find_differing_settings
from skillnet_studies.analysis.statistics import ScoreEstimate
from skillnet_studies.report.cost_tables import (
    build_activated_table,
    build_budget_table,
    build_cost_table,
    build_flops_table,
)
from skillnet_studies.report.gap_table import build_gap_table
from skillnet_studies.report.references import (
    REFERENCE_LABEL,
    ReferenceScores,
    average_references,
    describe_references,
)
from skillnet_studies.report.size_table import build_size_table
from skillnet_studies.report.variance_notes import (
    describe_false_marks,
    describe_means,
    describe_pairing,
    describe_tests,
    name_sources,
    warn_about_few,
)
from sweeps.config.format import (
    format_duration,
    format_interval,
    format_p_value,
    format_signed_points,
)

#: Marks of scores that are significantly better or worse than the reference's.
BETTER, WORSE = "▲", "▼"
#: Verdict of a paired test -> its mark.
MARKS: dict[TestVerdict, str] = {"higher": BETTER, "lower": WORSE, "not decided": ""}


def build_tables(
    comparison: SystemComparison, references: ReferenceScores | None = None
) -> list[ReportTable]:
    """Return all tables that need only the runs; empty tables are left out.

    Args:
        comparison: computed results; the tables list its systems in their order.
        references: scores of the simple references, by task and split.
    """
    known = references or {}
    built = [
        build_score_table(comparison, known),
        build_difference_table(comparison),
        build_pretraining_table(comparison),
        build_cost_table(comparison),
        build_size_table(comparison),
        build_gap_table(comparison),
        build_budget_table(comparison),
        build_other_splits_table(comparison, known),
        build_activated_table(comparison),
        build_flops_table(comparison),
        build_robust_table(comparison),
        build_test_table(comparison),
        build_seed_table(comparison),
        build_settings_table(comparison),
    ]
    return [table for table in built if table.rows]


def build_score_table(
    comparison: SystemComparison, references: ReferenceScores | None = None
) -> ReportTable:
    """Return the score of each task per system, the mean score and the relative score.

    Args:
        comparison: computed results.
        references: scores of the simple references, by task and split; a row of the table.
    """
    columns = ["system", f"{comparison.repeat_noun}s"]
    columns += [*(_heading(comparison, task) for task in comparison.tasks), "mean score"]
    # A study without specialists has no such scores.
    has_relative = any(not np.isnan(each.value.value) for each in comparison.relative.values())
    columns += ["relative to specialists"] if has_relative else []
    best = {task: _best_labels(comparison, task) for task in [*comparison.tasks, MEAN]}
    rows = []
    for label, runs in comparison.systems.items():
        row = [TableCell(label), TableCell(str(len(runs)))]
        row += [
            _score_cell(comparison, label, task, label in best[task])
            for task in [*comparison.tasks, MEAN]
        ]
        rows.append([*row, _relative_cell(comparison, label)] if has_relative else row)
    if references:
        cells = [_reference_cell(references, task, SPLIT) for task in comparison.tasks]
        mean = average_references(references, comparison.common_tasks)
        cells.append(TableCell("–" if mean is None else f"{100 * mean:.1f}"))
        row = [TableCell(REFERENCE_LABEL), TableCell("–"), *cells]
        rows.append([*row, TableCell("–")] if has_relative else row)
    names = (
        ", ".join(comparison.common_tasks)
        if len(comparison.common_tasks) < len(comparison.tasks)
        else "the tasks"
    )
    return ReportTable(
        "Results on held-out rows",
        columns,
        rows,
        "Scores in percent: higher is better in every column, speech is 1 − token error. "
        f"{describe_means(comparison)} {_describe_marks(comparison)}Bold: best of its column. The "
        f"mean is over {names}."
        + (
            " Relative: geometric mean over tasks of the mean score divided by the mean score of "
            f"{comparison.specialist} with the same pretraining."
            if has_relative
            else ""
        )
        + (describe_references(comparison) if references else "")
        + warn_about_few(comparison),
    )


def build_difference_table(comparison: SystemComparison) -> ReportTable:
    """Return the difference of each system from the reference, per task."""
    return ReportTable(
        "Differences from the reference",
        ["systems", *_name_tested_tasks(comparison)],
        [
            [TableCell(f"{system} − {against}"), *cells]
            for system, against, cells in _collect_changes(comparison, "system")
        ],
        _describe_changes(comparison, "Score of the first system minus score of the second"),
        collapsed=True,
    )


def build_pretraining_table(comparison: SystemComparison) -> ReportTable:
    """Return the gain from pretraining per task and system."""
    return ReportTable(
        "Gain from pretraining",
        ["system", *_name_tested_tasks(comparison)],
        [
            [TableCell(against), *cells]
            for _, against, cells in _collect_changes(comparison, "pretraining")
        ],
        _describe_changes(comparison, "Score with pretraining minus score without"),
        collapsed=True,
    )


def _describe_marks(comparison: SystemComparison) -> str:
    if not comparison.tests:
        return "No score is tested. "
    return (
        f"{BETTER} and {WORSE}: significantly better or worse than {comparison.reference} with the "
        f"same pretraining ({describe_pairing(comparison)}, Holm's correction over "
        f"{len(comparison.tests)} tests, 5 %).{describe_false_marks(comparison)} "
    )


def _name_tested_tasks(comparison: SystemComparison) -> list[str]:
    return [task.replace("_", " ") for task in [*comparison.tasks, MEAN]]


def _collect_changes(
    comparison: SystemComparison, kind: str
) -> Iterator[tuple[str, str, list[TableCell]]]:
    """Yield two systems that were tested, and the cell of each task."""
    pairs = dict.fromkeys((t.system, t.against) for t in comparison.tests if t.kind == kind)
    for system, against in pairs:
        tests = [comparison.find_test(system, against, task) for task in [*comparison.tasks, MEAN]]
        yield system, against, [_change_cell(test) for test in tests]


def _describe_changes(comparison: SystemComparison, change: str) -> str:
    return (
        f"{change}, in points; 95 % interval, {describe_pairing(comparison)}. {BETTER} {WORSE}: "
        f"significant after correction.{describe_false_marks(comparison)}"
    )


def build_other_splits_table(
    comparison: SystemComparison, references: ReferenceScores | None = None
) -> ReportTable:
    """Return the scores on test splits other than ``test``.

    Args:
        comparison: computed results.
        references: scores of the simple references, by task and split.
    """
    keys = [
        (task, split)
        for task in comparison.tasks
        for split in comparison.splits[task]
        if split != SPLIT
    ]
    rows = []
    for label in comparison.systems if keys else ():
        rows.append(
            [
                TableCell(label),
                *(
                    _estimate_cell(comparison.find_score(label, task, split))
                    for task, split in keys
                ),
            ]
        )
    if keys and references and any(key in references for key in keys):
        cells = [_reference_cell(references, task, split) for task, split in keys]
        rows.append([TableCell(REFERENCE_LABEL), *cells])
    return ReportTable(
        "Further test sets",
        [
            "system",
            *(
                f"{task.replace('_', ' ')}, {split.removeprefix('test_').replace('_', ' ')}, "
                f"{name_score(comparison, task)}"
                for task, split in keys
            ),
        ],
        rows,
        "Scores in percent, higher is better, with 95 % intervals over "
        f"{name_sources(comparison)}; no significance tests. A set of one unit has no interval.",
        collapsed=True,
    )


def build_robust_table(comparison: SystemComparison) -> ReportTable:
    """Return how the relative score depends on tasks and runs, per system."""
    figures, rows = estimate_run_figures(comparison), []
    for label, relative in comparison.relative.items():
        if relative.against == label or np.isnan(relative.value.value):
            continue
        row = [TableCell(label), TableCell(relative.against)]
        row.append(TableCell(_format_range(*(relative.without_one or (np.nan, np.nan)), 3) or "–"))
        for own in figures[label][1:] if label in figures else ():
            assert not isinstance(own, str)
            row.append(TableCell(f"{own.value:.3f}", _format_range(own.low, own.high, 3)))
        rows.append([*row, *[TableCell("–")] * (5 - len(row))])
    return ReportTable(
        "Relative to specialists: single tasks and runs",
        [
            "system",
            "against",
            "relative score without one task",
            "chance that a run is better",
            "interquartile mean",
        ],
        rows,
        "Without one task: the range of the relative score if any task is left out. Chance: that "
        "the score of a run is above that of a run of the specialists, mean over tasks "
        "(Bouthillier et al. 2021). Interquartile mean: of relative scores over tasks and runs "
        "(Agarwal et al. 2021). Their intervals resample runs and hold for these test rows only"
        f"{'; they ignore that replicates share training rows' if comparison.has_folds else ''}.",
        collapsed=True,
    )


def build_test_table(comparison: SystemComparison) -> ReportTable:
    """Return every paired test with its p-values."""
    rows = [
        [
            TableCell(test.system),
            TableCell(test.against),
            TableCell(test.task),
            TableCell(format_interval(test.difference)),
            TableCell(format_p_value(test.p)),
            TableCell(format_p_value(test.p_corrected)),
            TableCell(test.verdict),
        ]
        for test in comparison.tests
    ]
    return ReportTable(
        "All tests",
        ["system", "minus", "task", "points (95 % interval)", "p", "p, corrected", "verdict"],
        rows,
        f"{describe_tests(comparison)}; Holm's correction over these "
        f"{len(comparison.tests)} tests.{describe_false_marks(comparison)}",
        collapsed=True,
    )


def build_seed_table(comparison: SystemComparison) -> ReportTable:
    """Return the primary metric of every run."""
    rows = []
    for label, runs in comparison.systems.items():
        for run in runs:
            fold = [TableCell(str(run.fold.number))] if comparison.has_folds else []
            row = [TableCell(label), *fold, TableCell(str(run.seed))]
            for task in comparison.tasks:
                known = (task, SPLIT) in run.outcomes
                score = (
                    score_metric(comparison.metrics[task], run.outcomes[task, SPLIT].value)
                    if known
                    else np.nan
                )
                row.append(TableCell(f"{100 * score:.1f}" if known else "–"))
            rows.append([*row, TableCell(format_duration(run.seconds)), TableCell(run.folder.name)])
    columns = ["system", "fold", "seed"] if comparison.has_folds else ["system", "seed"]
    columns += [_heading(comparison, task) for task in comparison.tasks]
    caption = "Scores in percent, higher is better."
    return ReportTable("Every run", [*columns, "training", "run"], rows, caption, collapsed=True)


def build_settings_table(comparison: SystemComparison) -> ReportTable:
    """Return the settings in which the systems differ, which must explain a fair comparison."""
    # The first run represents its system: runs of one label differ only in the seed.
    differing = find_differing_settings([runs[0] for runs in comparison.systems.values()])
    rows = [
        [TableCell(key), *(TableCell(values[label]) for label in comparison.systems)]
        for key, values in differing.items()
    ]
    return ReportTable(
        "Settings in which the systems differ",
        ["setting", *comparison.systems],
        rows,
        "All other settings of the runs' resolved configurations are equal: data, steps, batches, "
        "schedule, augmentation." + _pretraining_note(comparison),
        collapsed=True,
    )


def _pretraining_note(comparison: SystemComparison) -> str:
    """Return a note on the settings of pretrainings."""
    pretrained = {
        k: runs for k, runs in comparison.systems.items() if runs[0].settings.get("init_from")
    }
    unknown = [label for label, runs in pretrained.items() if not runs[0].pretraining]
    note = ""
    if len(pretrained) - len(unknown) > 1:
        note = (
            " The same holds for the pretrainings, which have the system and the sizes of their "
            "runs."
        )
    if unknown:
        note += f" The pretraining settings of {', '.join(unknown)} are unknown."
    return note


# -- cells and notes -----------------------------------------------------------------------


def _heading(comparison: SystemComparison, task: str) -> str:
    return f"{task.replace('_', ' ')}, {name_score(comparison, task)}"


def _reference_cell(references: ReferenceScores, task: str, split: str) -> TableCell:
    score = references.get((task, split))
    return TableCell("–" if score is None else f"{100 * score:.1f}")


def _best_labels(comparison: SystemComparison, task: str) -> set[str]:
    """Return the labels with the highest score; empty if all are equal."""
    known = {
        label: score.value
        for label in comparison.systems
        if (score := comparison.find_score(label, task)) is not None
    }
    top = {label for label, value in known.items() if value == max(known.values())}
    # If all are equal, none is highlighted.
    return top if len(top) < len(known) else set()


def _score_cell(comparison: SystemComparison, label: str, task: str, best: bool) -> TableCell:
    # Only tests against the reference are marked, not gains from pretraining.
    plain = _estimate_cell(comparison.find_score(label, task))
    against = find_variant(comparison.reference, label, list(comparison.systems))
    test = comparison.find_test(label, against, task) if against else None
    mark = MARKS[test.verdict] if test is not None and test.kind == "system" else ""
    return TableCell(plain.text, plain.small, mark, best)


def _relative_cell(comparison: SystemComparison, label: str) -> TableCell:
    relative = comparison.relative.get(label)
    if relative is None or np.isnan(relative.value.value):
        return TableCell("–")
    # Specialists relative to themselves: 1 without an interval.
    if relative.against == label:
        return TableCell("1")
    value = relative.value
    return TableCell(f"{value.value:.3f}", _format_range(value.low, value.high, 3))


def _estimate_cell(score: ScoreEstimate | None) -> TableCell:
    if score is None:
        return TableCell("–")
    return TableCell(
        f"{100 * score.value:.1f}", _format_range(100 * score.low, 100 * score.high, 1)
    )


def _change_cell(test: PairedTest | None) -> TableCell:
    if test is None:
        return TableCell("–")
    value, low, high = test.difference[:3]
    return TableCell(
        format_signed_points(value),
        "" if np.isnan(low) else f"{format_signed_points(low)} to {format_signed_points(high)}",
        MARKS[test.verdict],
    )


def _format_range(low: float, high: float, digits: int) -> str:
    # One held-out unit, or one run, gives a value without an interval.
    return "" if np.isnan(low) else f"{low:.{digits}f}–{high:.{digits}f}"
