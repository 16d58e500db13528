"""Score and cost against the number of tasks: a table and a figure.

Systems whose names differ in a number at the end alone (``skills-5``, ``skills-22``), and that have
unequal tasks, are one series. :func:`collect_scale` finds the series in the rows of
``summary.csv``; the report of ``skillnet compare`` and ``tools.docs.draw_study`` show them.
"""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from skillnet_evidence.cells import ReportTable, TableCell, make_table
from skillnet_evidence.comparison import MEAN, OWN_MEAN, PRETRAINED
from skillnet_evidence.format import format_count
from skillnet_evidence.plot_kit import COLORS, MARKERS, make_figure, show_dollars, style_axes
from skillnet_evidence.rows import ReportRow, read_number, read_points
from skillnet_evidence.scores import SPLIT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A label: name of the series, number, and mark of a pretrained variant.
LABEL = re.compile(rf"(.+)-\d+({PRETRAINED})?")


class ScalePoint(NamedTuple):
    """One system of a series. Scores are value, low and high, in points.

    Args:
        series: name of the series.
        label: label of the system.
        tasks: number of its tasks.
        common_tasks: number of tasks that all systems of the report have.
        common: mean score of these.
        own: mean score of all of its tasks.
        flops: operations of one example, mean over the common tasks.
        activated: parameters that one example reads, mean over the common tasks.
        total_params: parameters of the complete model.
    """

    series: str
    label: str
    tasks: int
    common_tasks: int
    common: tuple[float, float, float]
    own: tuple[float, float, float]
    flops: float
    activated: float
    total_params: float


def collect_scale(summary: Sequence[ReportRow]) -> list[ScalePoint]:
    """Return the systems of all series, by series and number of tasks; [] without a series.

    Args:
        summary: rows of ``summary.csv``.
    """
    scored = [row for row in summary if (row["split"], row["metric"]) == (SPLIT, "score")]
    commons = {row["system"]: row for row in scored if row["task"] == MEAN}
    series: dict[str, list[ScalePoint]] = {}
    for row in scored:
        match = LABEL.fullmatch(row["system"])
        if row["task"] != OWN_MEAN or match is None:
            continue
        name, common = match[1] + (match[2] or ""), commons[row["system"]]
        costs = ("flops_per_example", "activated_params", "total_params")
        point = ScalePoint(
            name,
            row["system"],
            int(row["tasks"]),
            int(common["tasks"]),
            read_points(common),
            read_points(row),
            *(read_number(common.get(key)) for key in costs),
        )
        series.setdefault(name, []).append(point)
    return [
        point
        for name, points in series.items()
        if len({point.tasks for point in points}) > 1
        for point in sorted(points, key=lambda point: point.tasks)
    ]


def build_scale_table(points: Sequence[ScalePoint]) -> ReportTable:
    """Return score and cost against the number of tasks; no row without a series.

    Args:
        points: result of :func:`collect_scale`.
    """
    rows: list[list[TableCell | str]] = []
    for point in points:
        scores = [_score_cell(each) for each in (point.common, point.own)]
        costs = (point.flops, point.activated, point.total_params)
        rows.append([point.label, str(point.tasks), *scores, *map(format_count, costs)])
    common = points[0].common_tasks if points else 0
    columns = ["system", "tasks", f"mean of {common} tasks", "mean of all its tasks"]
    columns += ["FLOPs per example", "activated parameters", "parameters, total"]
    return make_table(
        "Score and cost against the number of tasks",
        columns,
        rows,
        "Scores in percent with 95 % intervals. Means of all tasks are of other tasks at another "
        "number of tasks: compare them within one number. FLOPs and activated parameters: mean "
        f"over the {common} tasks that all systems have.",
        collapsed=False,
    )


def draw_scale_figure(points: Sequence[ScalePoint]) -> "Figure":
    """Draw scores with their intervals, and costs, against the number of tasks.

    Args:
        points: result of :func:`collect_scale`, at least one.
    """
    names = list(dict.fromkeys(point.series for point in points))
    common = points[0].common_tasks
    panels = {
        f"Mean score of the {common} tasks that all have, percent": lambda point: point.common,
        "Mean score of all tasks of a system, percent": lambda point: point.own,
        f"FLOPs per example, mean of {common} tasks": lambda point: (point.flops, *UNKNOWN),
        "Parameters of the complete model": lambda point: (point.total_params, *UNKNOWN),
    }
    figure = make_figure(7.6, 5.6)
    with show_dollars():
        grid = figure.subplots(2, 2, sharex=True)
        for panel, (title, choose) in zip(grid.flat, panels.items(), strict=True):
            for place, name in enumerate(names):
                # Beside each other, so that no interval hides another one.
                shift = 0.22 * (place - (len(names) - 1) / 2)
                own = [(point.tasks + shift, *choose(point)) for point in points]
                own = [x for x, point in zip(own, points, strict=True) if point.series == name]
                _draw_series(panel, own, name, place)
            panel.set_title(title, fontsize=8.5, loc="left")
            panel.set_xticks(sorted({point.tasks for point in points}))
            style_axes(panel)
        for panel in grid[1]:
            panel.set_xlabel("number of tasks that are trained together", fontsize=8)
            panel.set_ylim(0, 1.08 * panel.get_ylim()[1])
            panel.yaxis.set_major_formatter(lambda value, _: format_count(value))
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False
        )
    return figure


#: Bounds of a cost, which has no interval.
UNKNOWN = (math.nan, math.nan)


def _draw_series(
    panel: Any, values: Sequence[tuple[float, float, float, float]], name: str, place: int
) -> None:
    x, y, low, high = zip(*values, strict=True)
    below = [max(a - b, 0) for a, b in zip(y, low, strict=True)]
    above = [max(b - a, 0) for a, b in zip(y, high, strict=True)]
    # A system of one seed lacks an interval, and hides none of the others.
    has_interval = not all(map(math.isnan, (*low, *high)))
    panel.errorbar(
        x,
        y,
        yerr=(below, above) if has_interval else None,
        fmt=f"{MARKERS[place % len(MARKERS)]}-",
        color=COLORS[place % len(COLORS)],
        label=name,
        markersize=4.5,
        linewidth=1.2,
        elinewidth=1.1,
        capsize=2,
    )


def _score_cell(score: tuple[float, float, float]) -> TableCell:
    value, low, high = score
    return TableCell(f"{value:.1f}", "" if math.isnan(low) else f"{low:.1f}–{high:.1f}")
