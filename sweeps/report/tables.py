"""The tables of a comparison: made once, shown on the terminal and on the page alike."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipelines.evaluation.tables import words_of
from sweeps.analysis.comparison import MEAN, SPLIT, PairedTest, SystemComparison, find_variant
from sweeps.analysis.finished_runs import FinishedRun, find_differing_settings
from sweeps.analysis.format import (
    format_count,
    format_duration,
    format_interval,
    format_p_value,
    format_signed_points,
)
from sweeps.analysis.statistics import ScoreEstimate

#: After a figure: significantly more, or less, than SkillNet's.
BETTER, WORSE = "▲", "▼"


@dataclass(frozen=True)
class TableCell:
    """One cell: a figure, its interval beneath it, and a mark if it differs significantly."""

    text: str
    small: str = ""
    mark: str = ""
    is_best: bool = False

    def to_lines(self) -> str:
        """The interval in a line of its own, which keeps columns narrow."""
        return f"{self.text}{self.mark}" + (f"\n{self.small}" if self.small else "")

    def to_line(self) -> str:
        """All of it in one line of plain text."""
        interval = f" ({self.small})" if self.small else ""
        return f"{self.text}{self.mark}{interval}"


@dataclass(frozen=True)
class ReportTable:
    """Cells below column names; the first column names the row.

    ``aside`` tables are folded away on the page and left out on the terminal.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[TableCell]]
    caption: str = ""
    collapsed: bool = field(default=False, kw_only=True)


def build_tables(of: SystemComparison) -> list[ReportTable]:
    """All tables that follow from the runs alone."""
    made = [build_score_table(of), build_pretraining_table(of), build_cost_table(of)]
    made += [build_other_splits_table(of), build_activated_table(of), build_flops_table(of)]
    made += [build_test_table(of), build_seed_table(of), build_settings_table(of)]
    return [table for table in made if table.rows]


def build_score_table(of: SystemComparison) -> ReportTable:
    """Each task's metric per system, the mean score, and the score relative to specialists."""
    columns = ["system", "seeds"]
    columns += [f"{task.replace('_', ' ')}, {_metric(of, task)}" for task in of.tasks]
    columns += ["mean score ↑", "relative to specialists ↑"]
    best = {task: _best_labels(of, task) for task in [*of.tasks, MEAN]}
    rows = []
    for label, runs in of.systems.items():
        row = [TableCell(label), TableCell(str(len(runs)))]
        row += [_score_cell(of, label, task, label in best[task]) for task in [*of.tasks, MEAN]]
        relative = of.relative.get(label)
        if relative is None or np.isnan(relative.value.value):
            row.append(TableCell("–"))
        elif relative.against == label:
            row.append(TableCell("1"))
        else:
            value = relative.value
            row.append(TableCell(f"{value.value:.3f}", f"{value.low:.3f}–{value.high:.3f}"))
        rows.append(row)
    names = ", ".join(of.common_tasks) if len(of.common_tasks) < len(of.tasks) else "the tasks"
    return ReportTable(
        "Results on held-out rows",
        columns,
        rows,
        "Mean over seeds with the 95 % interval over seeds and test rows, the spread over seeds "
        f"pooled over systems; per cent. {BETTER} and "
        f"{WORSE}: significantly better or worse than {of.reference} of the same pretraining "
        f"(paired over rows and seeds, Holm's correction over {len(of.tests)} tests, 5 %). Bold: "
        "best of its column. Score: accuracy, 1 − token error rate, recall at 10; the mean is "
        f"over {names}. Relative: mean over tasks of the score divided by {of.specialist}'s of "
        "the same pretraining." + _seeds_warning(of),
    )


def build_pretraining_table(of: SystemComparison) -> ReportTable:
    """What pretraining added to each task, per system."""
    pairs = dict.fromkeys((t.system, t.against) for t in of.tests if t.kind == "pretraining")
    tasks = [*of.tasks, MEAN]
    rows = [
        [TableCell(against), *(_change_cell(of.find_test(system, against, task)) for task in tasks)]
        for system, against in pairs
    ]
    return ReportTable(
        "What pretraining added",
        ["system", *(task.replace("_", " ") for task in tasks)],
        rows,
        "Score with pretraining less score without, in points; 95 % interval, paired over rows "
        f"and seeds. {BETTER} {WORSE}: significant after correction.",
    )


def build_cost_table(of: SystemComparison) -> ReportTable:
    """What each system costs, and how long it trained."""
    rows = []
    pretrained = any(run.pretraining_seconds for run in of.runs)
    for label, runs in of.systems.items():
        cost = of.costs[label, MEAN]
        seconds = np.array([run.seconds for run in runs])
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
        "test example, counted alike for every system; one multiply-add is two. Training: time in "
        "the loop per run, without evaluation; of a run or a pretraining that was taken up again "
        "the whole, at the rate of its last part.",
    )


def build_activated_table(of: SystemComparison) -> ReportTable:
    """Activated parameters by task."""
    return _build_cost_by_task_table(of, "Activated parameters by task", "activated")


def build_flops_table(of: SystemComparison) -> ReportTable:
    """Executed operations by task."""
    return _build_cost_by_task_table(of, "FLOPs per example by task", "flops")


def _build_cost_by_task_table(of: SystemComparison, title: str, what: str) -> ReportTable:
    rows = []
    for label in of.systems:
        costs = [of.costs.get((label, task)) for task in of.tasks]
        rows.append(
            [
                TableCell(label),
                *(TableCell(format_count(getattr(c, what)) if c else "–") for c in costs),
            ]
        )
    columns = ["system", *(task.replace("_", " ") for task in of.tasks)]
    return ReportTable(title, columns, rows, collapsed=True)


def build_other_splits_table(of: SystemComparison) -> ReportTable:
    """Test splits besides ``test``."""
    keys = [(task, split) for task in of.tasks for split in of.splits[task] if split != SPLIT]
    rows = []
    for label in of.systems if keys else ():
        rows.append(
            [
                TableCell(label),
                *(_metric_cell(of, task, of.find_score(label, task, s)) for task, s in keys),
            ]
        )
    return ReportTable(
        "Further test sets",
        [
            "system",
            *(
                f"{task.replace('_', ' ')}, {split.removeprefix('test_').replace('_', ' ')}, "
                f"{_metric(of, task)}"
                for task, split in keys
            ),
        ],
        rows,
        "Per cent, with 95 % intervals over seeds and rows; not tested.",
        collapsed=True,
    )


def build_test_table(of: SystemComparison) -> ReportTable:
    """Every test, with its p-values."""
    rows = [
        [
            TableCell(test.system),
            TableCell(test.against),
            TableCell(test.task),
            TableCell(format_interval(test.difference)),
            TableCell(format_p_value(test.p)),
            TableCell(format_p_value(test.p_corrected)),
            TableCell("yes" if test.is_significant else "no"),
        ]
        for test in of.tests
    ]
    return ReportTable(
        "All tests",
        ["system", "less", "task", "points (95 % interval)", "p", "p, corrected", "significant"],
        rows,
        "Difference of scores, paired over rows and seeds; Student's t, spread over seeds pooled "
        "over systems, Satterthwaite's "
        f"degrees of freedom; Holm's correction over these {len(of.tests)} tests.",
        collapsed=True,
    )


def build_seed_table(of: SystemComparison) -> ReportTable:
    """The primary metric of every run."""
    rows = []
    for label, runs in of.systems.items():
        for run in runs:
            row = [TableCell(label), TableCell(str(run.seed))]
            for task in of.tasks:
                known = (task, SPLIT) in run.outcomes
                row.append(
                    TableCell(f"{100 * run.outcomes[task, SPLIT].value:.1f}" if known else "–")
                )
            rows.append([*row, TableCell(format_duration(run.seconds)), TableCell(run.folder.name)])
    columns = ["system", "seed"]
    columns += [f"{task.replace('_', ' ')}, {_metric(of, task)}" for task in of.tasks]
    return ReportTable(
        "Every run", [*columns, "training", "run"], rows, "Per cent.", collapsed=True
    )


def build_settings_table(of: SystemComparison) -> ReportTable:
    """Settings in which the systems differ: what a fair comparison should be able to explain."""
    differing = find_differing_settings([runs[0] for runs in of.systems.values()])
    rows = [
        [TableCell(key), *(TableCell(values[label]) for label in of.systems)]
        for key, values in differing.items()
    ]
    return ReportTable(
        "Settings in which the systems differ",
        ["setting", *of.systems],
        rows,
        "Everything else in the runs' resolved configurations is equal: data, steps, batches, "
        "schedule, augmentation." + _pretraining_note(of),
        collapsed=True,
    )


def _pretraining_note(of: SystemComparison) -> str:
    """How far that holds of pretrainings."""
    pretrained = {k: runs for k, runs in of.systems.items() if runs[0].settings.get("init_from")}
    unknown = [label for label, runs in pretrained.items() if not runs[0].pretraining]
    said = ""
    if len(pretrained) - len(unknown) > 1:
        said = (
            " So it is in those of their pretrainings, where the system and its sizes follow the "
            "run's."
        )
    if unknown:
        said += f" How {', '.join(unknown)} was pretrained is not known here."
    return said


# -- words ---------------------------------------------------------------------------------


def _metric(of: SystemComparison, task: str) -> str:
    metric = of.metrics[task]
    return f"{words_of(metric)} {'↓' if metric == 'token_error_rate' else '↑'}"


def _best_labels(of: SystemComparison, task: str) -> set[str]:
    """Those with the highest score; none if all have it."""
    known = {
        label: found.value
        for label in of.systems
        if (found := of.find_score(label, task)) is not None
    }
    top = {label for label, value in known.items() if value == max(known.values())}
    return top if len(top) < len(known) else set()


def _score_cell(of: SystemComparison, label: str, task: str, best: bool) -> TableCell:
    plain = _metric_cell(of, task, of.find_score(label, task))
    against = find_variant(of.reference, label, list(of.systems))
    test = of.find_test(label, against, task) if against else None
    mark = ""
    if test is not None and test.kind == "system" and test.is_significant:
        mark = BETTER if test.difference.value > 0 else WORSE
    return TableCell(plain.text, plain.small, mark, best)


def _metric_cell(of: SystemComparison, task: str, found: ScoreEstimate | None) -> TableCell:
    if found is None:
        return TableCell("–")
    value, low, high = found[:3]
    if of.metrics.get(task) == "token_error_rate":
        value, low, high = 1 - value, 1 - high, 1 - low
    return TableCell(f"{100 * value:.1f}", f"{100 * low:.1f}–{100 * high:.1f}")


def _change_cell(test: PairedTest | None) -> TableCell:
    if test is None:
        return TableCell("–")
    value, low, high = test.difference[:3]
    mark = (BETTER if value > 0 else WORSE) if test.is_significant else ""
    return TableCell(
        format_signed_points(value),
        f"{format_signed_points(low)} to {format_signed_points(high)}",
        mark,
    )


def _pretraining_time(runs: Sequence[FinishedRun]) -> str:
    told = [run.pretraining_seconds for run in runs if run.pretraining_seconds]
    return format_duration(float(np.mean(told))) if told else "–"


def _seeds_warning(of: SystemComparison) -> str:
    if all(len(runs) == 1 for runs in of.systems.values()):
        return " One seed: intervals are over test rows only and say nothing about other seeds."
    if of.seeds < 3:
        return " Below three seeds nothing is decided: their spread is hardly known."
    return ""
