"""The tables of a comparison: made once, shown on the terminal and on the page alike."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipelines.evaluation.tables import words_of
from sweeps.analysis.comparison import MEAN, SPLIT, Comparison, Test, variant
from sweeps.analysis.finished_runs import FinishedRun, differing_settings
from sweeps.analysis.format import count, duration, p_text, points, signed
from sweeps.analysis.statistics import Estimate

#: After a figure: significantly more, or less, than SkillNet's.
MORE, LESS = "▲", "▼"


@dataclass(frozen=True)
class Cell:
    """One cell: a figure, its interval beneath it, and a mark if it differs significantly."""

    text: str
    small: str = ""
    mark: str = ""
    best: bool = False

    def lines(self) -> str:
        """The interval in a line of its own, which keeps columns narrow."""
        return f"{self.text}{self.mark}" + (f"\n{self.small}" if self.small else "")

    def line(self) -> str:
        """All of it in one line of plain text."""
        interval = f" ({self.small})" if self.small else ""
        return f"{self.text}{self.mark}{interval}"


@dataclass(frozen=True)
class Table:
    """Cells below column names; the first column names the row.

    ``aside`` tables are folded away on the page and left out on the terminal.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    aside: bool = field(default=False, kw_only=True)


def tables(of: Comparison) -> list[Table]:
    """All tables that follow from the runs alone."""
    made = [score_table(of), pretraining_table(of), cost_table(of)]
    made += [other_splits_table(of), activated_table(of), flops_table(of)]
    made += [test_table(of), seed_table(of), settings_table(of)]
    return [table for table in made if table.rows]


def score_table(of: Comparison) -> Table:
    """Each task's metric per system, the mean score, and the score relative to specialists."""
    columns = ["system", "seeds"]
    columns += [f"{task.replace('_', ' ')}, {_metric(of, task)}" for task in of.tasks]
    columns += ["mean score ↑", "relative to specialists ↑"]
    best = {task: _best(of, task) for task in [*of.tasks, MEAN]}
    rows = []
    for label, runs in of.systems.items():
        row = [Cell(label), Cell(str(len(runs)))]
        row += [_score_cell(of, label, task, label in best[task]) for task in [*of.tasks, MEAN]]
        relative = of.relative.get(label)
        if relative is None or np.isnan(relative.value.value):
            row.append(Cell("–"))
        elif relative.against == label:
            row.append(Cell("1"))
        else:
            value = relative.value
            row.append(Cell(f"{value.value:.3f}", f"{value.low:.3f}–{value.high:.3f}"))
        rows.append(row)
    names = ", ".join(of.common) if len(of.common) < len(of.tasks) else "the tasks"
    return Table(
        "Results on held-out rows",
        columns,
        rows,
        "Mean over seeds with the 95 % interval over seeds and test rows, the spread over seeds "
        f"pooled over systems; per cent. {MORE} and "
        f"{LESS}: significantly better or worse than {of.reference} of the same pretraining "
        f"(paired over rows and seeds, Holm's correction over {len(of.tests)} tests, 5 %). Bold: "
        "best of its column. Score: accuracy, 1 − token error rate, recall at 10; the mean is "
        f"over {names}. Relative: mean over tasks of the score divided by {of.specialist}'s of "
        "the same pretraining." + _seeds_warning(of),
    )


def pretraining_table(of: Comparison) -> Table:
    """What pretraining added to each task, per system."""
    pairs = dict.fromkeys((t.system, t.against) for t in of.tests if t.kind == "pretraining")
    tasks = [*of.tasks, MEAN]
    rows = [
        [Cell(against), *(_change_cell(of.test(system, against, task)) for task in tasks)]
        for system, against in pairs
    ]
    return Table(
        "What pretraining added",
        ["system", *(task.replace("_", " ") for task in tasks)],
        rows,
        "Score with pretraining less score without, in points; 95 % interval, paired over rows "
        f"and seeds. {MORE} {LESS}: significant after correction.",
    )


def cost_table(of: Comparison) -> Table:
    """What each system costs, and how long it trained."""
    rows = []
    pretrained = any(run.pretraining_seconds for run in of.runs)
    for label, runs in of.systems.items():
        cost = of.costs[label, MEAN]
        seconds = np.array([run.seconds for run in runs])
        ends = (duration(float(seconds.min())), duration(float(seconds.max())))
        spread = f"{ends[0]} to {ends[1]}" if ends[0] != ends[1] else ""
        rows.append(
            [
                Cell(label),
                Cell(count(runs[0].total_params) if runs[0].total_params else "–"),
                Cell(count(cost.activated)),
                Cell(count(cost.flops)),
                Cell(duration(float(seconds.mean())), spread),
                *([Cell(_pretraining_time(runs))] if pretrained else []),
                Cell(f"{np.mean([float(r.trained.get('rows_per_second', 0)) for r in runs]):.0f}"),
                Cell(f"{int(runs[0].trained['step'])}"),
            ]
        )
    return Table(
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


def activated_table(of: Comparison) -> Table:
    """Activated parameters by task."""
    return _by_task(of, "Activated parameters by task", "activated")


def flops_table(of: Comparison) -> Table:
    """Executed operations by task."""
    return _by_task(of, "FLOPs per example by task", "flops")


def _by_task(of: Comparison, title: str, what: str) -> Table:
    rows = []
    for label in of.systems:
        costs = [of.costs.get((label, task)) for task in of.tasks]
        rows.append([Cell(label), *(Cell(count(getattr(c, what)) if c else "–") for c in costs)])
    columns = ["system", *(task.replace("_", " ") for task in of.tasks)]
    return Table(title, columns, rows, aside=True)


def other_splits_table(of: Comparison) -> Table:
    """Test splits besides ``test``."""
    keys = [(task, split) for task in of.tasks for split in of.splits[task] if split != SPLIT]
    rows = []
    for label in of.systems if keys else ():
        rows.append(
            [Cell(label), *(_metric_cell(of, task, of.score(label, task, s)) for task, s in keys)]
        )
    return Table(
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
        aside=True,
    )


def test_table(of: Comparison) -> Table:
    """Every test, with its p-values."""
    rows = [
        [
            Cell(test.system),
            Cell(test.against),
            Cell(test.task),
            Cell(points(test.change)),
            Cell(p_text(test.p)),
            Cell(p_text(test.corrected)),
            Cell("yes" if test.significant else "no"),
        ]
        for test in of.tests
    ]
    return Table(
        "All tests",
        ["system", "less", "task", "points (95 % interval)", "p", "p, corrected", "significant"],
        rows,
        "Difference of scores, paired over rows and seeds; Student's t, spread over seeds pooled "
        "over systems, Satterthwaite's "
        f"degrees of freedom; Holm's correction over these {len(of.tests)} tests.",
        aside=True,
    )


def seed_table(of: Comparison) -> Table:
    """The primary metric of every run."""
    rows = []
    for label, runs in of.systems.items():
        for run in runs:
            row = [Cell(label), Cell(str(run.seed))]
            for task in of.tasks:
                known = (task, SPLIT) in run.outcomes
                row.append(Cell(f"{100 * run.outcomes[task, SPLIT].value:.1f}" if known else "–"))
            rows.append([*row, Cell(duration(run.seconds)), Cell(run.folder.name)])
    columns = ["system", "seed"]
    columns += [f"{task.replace('_', ' ')}, {_metric(of, task)}" for task in of.tasks]
    return Table("Every run", [*columns, "training", "run"], rows, "Per cent.", aside=True)


def settings_table(of: Comparison) -> Table:
    """Settings in which the systems differ: what a fair comparison should be able to explain."""
    differing = differing_settings([runs[0] for runs in of.systems.values()])
    rows = [
        [Cell(key), *(Cell(values[label]) for label in of.systems)]
        for key, values in differing.items()
    ]
    return Table(
        "Settings in which the systems differ",
        ["setting", *of.systems],
        rows,
        "Everything else in the runs' resolved configurations is equal: data, steps, batches, "
        "schedule, augmentation." + _pretraining_words(of),
        aside=True,
    )


def _pretraining_words(of: Comparison) -> str:
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


def _metric(of: Comparison, task: str) -> str:
    metric = of.metrics[task]
    return f"{words_of(metric)} {'↓' if metric == 'token_error_rate' else '↑'}"


def _best(of: Comparison, task: str) -> set[str]:
    """Those with the highest score; none if all have it."""
    known = {
        label: found.value for label in of.systems if (found := of.score(label, task)) is not None
    }
    top = {label for label, value in known.items() if value == max(known.values())}
    return top if len(top) < len(known) else set()


def _score_cell(of: Comparison, label: str, task: str, best: bool) -> Cell:
    plain = _metric_cell(of, task, of.score(label, task))
    against = variant(of.reference, label, list(of.systems))
    test = of.test(label, against, task) if against else None
    mark = ""
    if test is not None and test.kind == "system" and test.significant:
        mark = MORE if test.change.value > 0 else LESS
    return Cell(plain.text, plain.small, mark, best)


def _metric_cell(of: Comparison, task: str, found: Estimate | None) -> Cell:
    if found is None:
        return Cell("–")
    value, low, high = found[:3]
    if of.metrics.get(task) == "token_error_rate":
        value, low, high = 1 - value, 1 - high, 1 - low
    return Cell(f"{100 * value:.1f}", f"{100 * low:.1f}–{100 * high:.1f}")


def _change_cell(test: Test | None) -> Cell:
    if test is None:
        return Cell("–")
    value, low, high = test.change[:3]
    mark = (MORE if value > 0 else LESS) if test.significant else ""
    return Cell(signed(value), f"{signed(low)} to {signed(high)}", mark)


def _pretraining_time(runs: Sequence[FinishedRun]) -> str:
    told = [run.pretraining_seconds for run in runs if run.pretraining_seconds]
    return duration(float(np.mean(told))) if told else "–"


def _seeds_warning(of: Comparison) -> str:
    if all(len(runs) == 1 for runs in of.systems.values()):
        return " One seed: intervals are over test rows only and say nothing about other seeds."
    if of.seeds < 3:
        return " Below three seeds nothing is decided: their spread is hardly known."
    return ""
