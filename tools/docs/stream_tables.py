"""Tables and figure of the stream of tasks: ``python -m tools.docs.stream_tables``.

Reads the kept study ``lab/results/stream`` and writes the five rows of the README, the tables
beside the claims in docs/results/stream.md, and the figure of both. :mod:`tools.docs.study_tables`
writes the claims. Scores of a task when it was learned are in the record of its cell.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lab.task_stream import COST_COLUMNS, RECORD, count_changed, tabulate_costs
from skillnet_evidence.cells import markdown_table
from skillnet_evidence.claims import estimate_difference
from skillnet_evidence.comparison import MEAN, SHARED_MEAN, SystemComparison
from skillnet_evidence.format import format_interval
from skillnet_evidence.plot_kit import COLORS, MARKERS, encode_svg, make_figure, style_axes
from skillnet_evidence.scores import SPLIT
from skillnet_evidence.statistics import ScoreEstimate, build_fold_sample, estimate_mean
from skillnet_studies.analysis.finished_runs import FinishedRun, compare_runs, label_runs
from skillnet_studies.study.kept_results import KeptStudy, open_study
from tools.docs.page_marks import put
from tools.docs.study_rates import read_once
from tools.docs.study_tables import NOT_COMPLETE, RESULTS, ROOT, STREAM_PAGE, is_complete

if TYPE_CHECKING:
    from matplotlib.figure import Figure

README, FIGURE = ROOT / "README.md", ROOT / "docs" / "assets" / "stream.svg"
#: Arm of the platform, and arms that the README shows beside it, with their titles.
GROW, COPIES, JOINT, REPLAY = "grow-100", "full-100", "joint-100", "replay-100"
#: Joins growths of the base.
MERGE = "merge-100"
SHOWN = {
    GROW: "grown skills",
    REPLAY: "one dense model, replay",
    COPIES: "a copy per task",
    JOINT: "all trained again",
}
#: Arms of the figure.
DRAWN = {GROW: "grow", REPLAY: "replay", "sequential-100": "sequential"}
MEGABYTE = 1e6
WEIGHT_BYTES = 4
#: A mean difference of exactly 0: equal outputs have equal scores. Its interval would assume that
#: some variance was not seen.
EQUAL = "0 in each fold"


@dataclass(frozen=True)
class StreamResults:
    """Finished cells of the stream.

    Args:
        runs: the cells.
        records: name of a cell -> its costs and observations, see :mod:`lab.task_stream`.
    """

    runs: Sequence[FinishedRun]
    records: dict[str, dict[str, Any]]

    @cached_property
    def comparison(self) -> SystemComparison:
        """Scores of all systems; its common tasks are the added ones."""
        return compare_runs(label_runs(self.runs), GROW)

    @cached_property
    def old_tasks(self) -> list[str]:
        """Tasks of the base."""
        return [task for task in self.comparison.tasks if task not in self.added_tasks]

    @property
    def added_tasks(self) -> Sequence[str]:
        """Tasks that the base does not have."""
        return self.comparison.common_tasks

    def find_cells(self, label: str) -> list[tuple[FinishedRun, dict[str, Any]]]:
        """Return the cells of a system with their records.

        Args:
            label: name of a system, such as ``grow-100``.
        """
        return [(run, self.records[run.folder.name]) for run in self.runs if run.label == label]

    def estimate_loss(self, label: str, tasks: Iterable[str]) -> ScoreEstimate | None:
        """Return how much of the score of some tasks is lost until the end of the stream.

        Args:
            label: name of a system.
            tasks: are averaged; those that the system did not learn before the end are left out.

        Returns:
            None if it learned none of them before the end.
        """
        lost: dict[int, float] = {}
        for run, record in self.find_cells(label):
            before, after = record["before"], record["after"]
            own = [task for task in tasks if task in before]
            if not own:
                return None
            lost[run.replicate] = fmean(before[t]["score"] - after[t]["score"] for t in own)
        share = self.comparison.test_to_train
        assert share is not None
        return estimate_mean(build_fold_sample(lost, share))

    def count_equal(self, label: str, other: str) -> tuple[int, int]:
        """Return how many outputs after the stream are equal in two systems, and of how many.

        Args:
            label: name of a system that keeps old tasks.
            other: the other one.
        """
        records = [
            {run.replicate: own["after"] for run, own in self.find_cells(each)}
            for each in (label, other)
        ]
        pairs = [
            (one["outputs"], records[1][replicate][task]["outputs"])
            for replicate, after in records[0].items()
            for task, one in after.items()
        ]
        return sum(one == two for one, two in pairs), len(pairs)

    def count_added_bytes(self, label: str) -> float:
        """Return the bytes of one added task: a mean over cells and added tasks.

        Args:
            label: name of a system. A dense one adds heads alone, as ``head-100`` does.
        """
        if label == REPLAY:
            trained = [each for _, own in self.find_cells("head-100") for each in _trained(own)]
            return WEIGHT_BYTES * fmean(trained)
        base = {
            run.replicate: run.total_params - sum(_trained(own))
            for run, own in self.find_cells(GROW)
        }
        more = [run.total_params - base[run.replicate] for run, _ in self.find_cells(label)]
        return WEIGHT_BYTES * fmean(more) / len(self.added_tasks)


def _trained(record: dict[str, Any]) -> list[int]:
    return list(record["trained"].values())


def read_stream(path: Path = RESULTS / "stream") -> StreamResults | None:
    """Return the kept study; None if a cell is missing.

    Args:
        path: the kept study, without the suffix of its files.
    """
    folder = open_study(path)
    if not is_complete(folder):
        return None
    return StreamResults(read_once(folder), KeptStudy(path).content[RECORD])


def describe_loss(found: StreamResults, label: str) -> str:
    """Return what a system lost of the old tasks, in points with an interval.

    Args:
        found: the study.
        label: name of a system.
    """
    lost = found.estimate_loss(label, found.old_tasks)
    if lost is None:
        return "0, the base is kept"
    changed, count = count_changed([own for _, own in found.find_cells(label)])
    if not changed:
        return f"0, {count} of {count} outputs equal"
    return _format_points(lost)


def _format_points(found: ScoreEstimate) -> str:
    if not found.value:
        return EQUAL
    value, low, high = (round(100 * x, 1) + 0.0 for x in found[:3])
    return f"{value:.1f} ({low:.1f} to {high:.1f})".replace("-", "−")


def _format_difference(found: ScoreEstimate) -> str:
    return format_interval(found) if found.value else EQUAL


def tabulate_readme(found: StreamResults) -> str:
    """Return the five rows of the README.

    Args:
        found: the study.
    """
    comparison = found.comparison

    def describe_score(label: str) -> str:
        return _format_points(comparison.scores[label, MEAN, SPLIT])

    def describe_addition(label: str) -> str:
        seconds = fmean(s for _, own in found.find_cells(label) for s in own["seconds"].values())
        return f"{seconds:.0f} s, {found.count_added_bytes(label) / MEGABYTE:.2f} MB"

    def describe_reading(label: str) -> str:
        return f"{WEIGHT_BYTES * comparison.costs[label, MEAN].activated / MEGABYTE:.1f} MB"

    def describe_joint(label: str) -> str:
        if label == JOINT:
            return "–"
        return format_interval(estimate_difference(comparison, label, JOINT, SHARED_MEAN))

    added, old = len(found.added_tasks), len(found.old_tasks)
    rows: dict[str, Callable[[str], str]] = {
        f"points lost on the {old} old tasks": lambda label: describe_loss(found, label),
        "score of the added tasks": describe_score,
        "one more task costs": describe_addition,
        "one task reads": describe_reading,
        "points above training all again": describe_joint,
    }
    cells = [[name, *(describe(label) for label in SHOWN)] for name, describe in rows.items()]
    return markdown_table([f"{added} tasks more", *SHOWN.values()], cells, len(SHOWN))


LOSS_COLUMNS = ("system", "points lost on old tasks", "points lost on added tasks")
SCORE_COLUMNS = ("score of added tasks", "grow-100 minus it, added tasks", "all tasks")


def tabulate_arms(found: StreamResults) -> str:
    """Return what each system lost and scores.

    Args:
        found: the study.
    """
    comparison, rows = found.comparison, []
    for label in comparison.systems:
        lost = [found.estimate_loss(label, own) for own in (found.old_tasks, found.added_tasks)]
        cells = [label, *("–" if each is None else _format_points(each) for each in lost)]
        cells.append(_format_points(comparison.scores[label, MEAN, SPLIT]))
        for task in (MEAN, SHARED_MEAN):
            # Without old tasks of its own, both means are over the same tasks.
            is_same = task == SHARED_MEAN and not comparison.has_task(found.old_tasks[0], label)
            skips = label == GROW or is_same
            change = None if skips else estimate_difference(comparison, GROW, label, task)
            cells.append("–" if change is None else _format_difference(change))
        rows.append(cells)
    equal, count = found.count_equal(GROW, MERGE)
    return "\n\n".join(
        (
            markdown_table([*LOSS_COLUMNS, *SCORE_COLUMNS], rows, 5),
            f"{equal} of {count} outputs of `{GROW}` and `{MERGE}` have equal digests.",
        )
    )


def draw_stream(found: StreamResults) -> "Figure":
    """Draw scores along the stream: when a task was learned, and at the end.

    A task has another place in each fold. Its score is shown against that of a copy per task in the
    same fold, because places have tasks of unequal difficulty.

    Args:
        found: the study.
    """
    copies = {(r, task): x for task in found.added_tasks for r, x in _scores(found, COPIES, task)}
    figure = make_figure(7.6, 3.2)
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"before": "When the task was learned", "after": "After all tasks"}
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for place, (label, name) in enumerate(DRAWN.items()):
            points = [
                (number, 100 * (record[key][task]["score"] - copies[run.replicate, task]))
                for run, record in found.find_cells(label)
                for number, task in enumerate(record["order"], 1)
            ]
            color, marker = COLORS[place], MARKERS[place]
            panel.scatter(*zip(*points, strict=True), s=4, color=color, alpha=0.25, linewidths=0)
            numbers = sorted({number for number, _ in points})
            means = [fmean(y for x, y in points if x == number) for number in numbers]
            panel.plot(numbers, means, f"{marker}-", color=color, label=name, markersize=3.5)
        panel.axhline(0, color="#444444", linewidth=0.8)
        panel.set_title(title, fontsize=8.5, loc="left")
        panel.set_xticks((1, 5, 10, 15, len(found.added_tasks)))
        panel.set_xlabel("place of the task in the stream", fontsize=8)
        style_axes(panel)
    panels[0].set_ylabel("points above a copy per task", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _scores(found: StreamResults, label: str, task: str) -> list[tuple[int, float]]:
    sample = found.comparison.samples[label, task, SPLIT]
    return list(zip(sample.seeds, map(float, sample.values), strict=True))


def render_page(found: StreamResults | None) -> dict[str, str]:
    """Return name of the marks -> text of docs/results/stream.md.

    Args:
        found: the study; None if it is not complete.
    """
    if found is None:
        return dict.fromkeys(("stream-arms", "stream-costs"), NOT_COMPLETE)
    costs = markdown_table(
        COST_COLUMNS, tabulate_costs(found.runs, found.records, found.added_tasks), 6
    )
    return {"stream-arms": tabulate_arms(found), "stream-costs": costs}


def main(argv: list[str] | None = None) -> int:
    """Write tables and figure."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs.stream_tables", description=__doc__)
    parser.parse_args(argv)
    found = read_stream()
    for name, text in render_page(found).items():
        put(STREAM_PAGE, name, text)
    if found is not None:
        put(README, "results", tabulate_readme(found))
        FIGURE.write_text(encode_svg(draw_stream(found)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
