"""Figures of a comparison: paired differences, scores against operations, and learning curves.

:func:`draw_evidence` and :func:`draw_plots` are called by the report of ``skillnet compare``,
:func:`draw_joint_evidence` by ``tools.docs.draw_study``; :mod:`skillnet_evidence.rows` has the
content of both parts of the evidence. Filled markers are pretrained systems. Colours and markers
both state the result of a test, so that the figure is legible in grey.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from skillnet_evidence.comparison import MEAN, PRETRAINED, SystemComparison
from skillnet_evidence.format import format_interval, format_plural
from skillnet_evidence.plot_kit import (
    COLORS,
    MARKERS,
    MetricHistory,
    make_figure,
    mark_cost_axis,
    show_dollars,
    smooth_series,
    style_axes,
)
from skillnet_evidence.rows import ForestGroup, ForestRow, SystemPoint
from skillnet_evidence.scores import SPLIT
from skillnet_evidence.statistics import ScoreEstimate
from skillnet_evidence.tables import name_column

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: Result of a test -> colour, marker and whether the marker is filled.
RESULTS: dict[str, tuple[str, str, bool]] = {
    "shown": ("#0072B2", "o", True),
    "open": ("#5F646E", "o", False),
    "refuted": ("#B3450B", "X", True),
    # Without a claim nothing is shown or refuted: the figure states the verdict of the test.
    "higher": ("#0072B2", "o", True),
    "not decided": ("#5F646E", "o", False),
    "lower": ("#B3450B", "v", True),
}
INK, SOFT, BAND = "#1C1D21", "#4A4E57", "#DCE9F2"
#: Points of the text, inches of a row, and characters of a line of a title and of a note.
FONT_PT, ROW_IN, TITLE_CHARS, NOTE_CHARS = 8.5, 0.235, 62, 78
#: Places of a label beside its marker, in points: right, left, then further away. A line leads to
#: those further away than ``NEAR_PT``.
OFFSETS = tuple(
    (side * x, y) for x in (7, 18, 32, 48) for y in (4, -10, 14, -20, 26, -32) for side in (1, -1)
)
NEAR_PT = 16
#: Systems above which the figure of tiers names the first of each tier only.
MAX_NAMED = 40


def draw_evidence(
    groups: Sequence[ForestGroup], points: Sequence[SystemPoint], reference: float | None = None
) -> "dict[str, Figure]":
    """Draw the differences, and the mean scores against operations, as two figures.

    Args:
        groups: differences; empty draws none.
        points: scores and costs; empty draws none.
        reference: mean score of the simple references, in points.

    Returns:
        Name -> figure.
    """
    figures = {}
    if groups:
        figure = make_figure(5.2, _forest_height(groups))
        with show_dollars():
            draw_forest_panel(figure.add_subplot(), groups)
        figures["differences"] = figure
    if points:
        figure = make_figure(4.6, 4.0)
        with show_dollars():
            draw_cost_panel(figure.add_subplot(), points, reference)
        figures["mean score against operations"] = figure
    return figures


def draw_joint_evidence(
    groups: Sequence[ForestGroup],
    points: Sequence[SystemPoint],
    reference: float | None = None,
    notice: str = "",
) -> "Figure":
    """Draw both parts side by side, as one figure for a document.

    Args:
        groups: differences; at least one.
        points: scores and costs; at least one.
        reference: mean score of the simple references, in points.
        notice: text above the figure; "" without one.
    """
    figure = make_figure(11.2, max(_forest_height(groups), 4.2))
    with show_dollars():
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        draw_forest_panel(left, groups)
        draw_cost_panel(right, points, reference)
        if notice:
            figure.suptitle(notice, color=RESULTS["refuted"][0], fontsize=10, fontweight="bold")
    return figure


def draw_forest_panel(panel: Any, groups: Sequence[ForestGroup]) -> None:
    """Draw the differences of all groups below each other, with their numbers at the right.

    Args:
        panel: axes of matplotlib.
        groups: at least one, with at least one row each.
    """
    from matplotlib.transforms import blended_transform_factory

    y, ticks, names = 0.0, [], []
    shown = [row for group in groups for row in group.rows]
    known = [x for row in shown for x in (*row.change, *row.band, *row.by_fold, 0.0)]
    known = [x for x in known if not math.isnan(x)]
    low, high = 100 * min(known), 100 * max(known)
    # Room for a marker at both ends, and a span that shows noise as small.
    room = max(0.06 * (high - low), 0.5)
    panel.set_xlim(low - room, high + room)
    # Titles begin at the edge of the figure: there is room for a line without many breaks.
    at_edge = blended_transform_factory(panel.figure.transFigure, panel.transData)
    for group in groups:
        lines, notes = _wrap_lines(group.title), _wrap_lines(group.note, NOTE_CHARS)
        texts = (
            (lines, FONT_PT + 0.5, "bold", INK, 0.85),
            (notes, FONT_PT - 0.5, "normal", RESULTS[group.result][0], 0.0),
        )
        for words, size, weight, colour, step in texts:
            panel.text(
                *(0.012, y, "\n".join(words)), transform=at_edge, va="top", fontsize=size,
                fontweight=weight, color=colour, in_layout=False,
            )  # fmt: skip
            y += step * len(words)
        y += 0.8 * len(notes) + 0.65
        first = y
        for row in group.rows:
            _draw_difference(panel, y, row)
            ticks.append(y)
            names.append(row.label)
            y += 1.0
        panel.plot([0, 0], [first - 0.5, y - 0.5], color=INK, linewidth=0.9, zorder=1)
        y += 0.35
    panel.set_yticks(ticks, names, fontsize=FONT_PT, color=INK)
    panel.set_ylim(y - 0.1, -0.2)
    style_axes(panel)
    panel.grid(False, axis="y")
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.set_xlabel("difference of scores, points", fontsize=FONT_PT, color=SOFT)
    _explain_marks(panel, groups)


def draw_cost_panel(
    panel: Any, points: Sequence[SystemPoint], reference: float | None = None
) -> None:
    """Draw mean scores with their intervals against operations; labels stand at the markers.

    Args:
        panel: axes of matplotlib.
        points: at least one.
        reference: mean score of the simple references, in points.
    """
    labels = [each.label for each in points]
    panel.set_xscale("log")
    for each in points:
        value, low, high = each.score
        interval = [[0.0], [0.0]] if math.isnan(low) else [[value - low], [high - value]]
        panel.errorbar(each.flops, value, yerr=interval, **style_system(each.label, labels))
    tasks = format_plural(points[0].tasks, "task")
    costs = [each.flops for each in points]
    # Room at the right for the labels of the most expensive system.
    panel.set_xlim(min(costs) / 1.3, max(costs) * max((max(costs) / min(costs)) ** 0.45, 1.5))
    if reference is not None:
        panel.axhline(reference, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        panel.annotate(
            f"simple references, {reference:.1f}",
            (1, reference),
            xycoords=panel.get_yaxis_transform(),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=FONT_PT - 0.5,
            color=SOFT,
        )
    panel.margins(y=0.12)
    mark_cost_axis(panel)
    style_axes(panel)
    panel.set_xlabel(
        f"activated FLOPs per example, mean of {tasks} (log axis)", fontsize=FONT_PT, color=SOFT
    )
    panel.set_ylabel(f"mean score of {tasks}, percent", fontsize=FONT_PT, color=SOFT)
    panel.set_title(
        "Mean score against operations. Filled: pretrained.",
        fontsize=FONT_PT + 0.5,
        fontweight="bold",
        color=INK,
        loc="left",
    )
    _label_points(panel, points)


def draw_plots(
    comparison: SystemComparison, histories: "Mapping[str, Sequence[MetricHistory]] | None" = None
) -> "dict[str, Figure]":
    """Draw all plots; return name -> figure in the order of the report.

    Args:
        comparison: computed results.
        histories: label -> what each run logged; None draws no curves.
    """
    with show_dollars():
        figures = {"scores": draw_score_figure(comparison)}
        learning = draw_learning_figure(comparison, histories or {})
        if learning is not None:
            figures["learning"] = learning
    return figures


def draw_score_figure(comparison: SystemComparison) -> "Figure":
    """Draw one panel per task: the score of each system with its interval."""
    labels = list(comparison.systems)
    tasks = [*comparison.tasks, MEAN]
    figure, axes = _make_panels(tasks, 0.9 + 0.24 * len(labels), sharey=True)
    for task, panel in zip(tasks, axes, strict=True):
        for index, label in enumerate(labels):
            score = comparison.find_score(label, task)
            if score is None:
                continue
            panel.errorbar(
                100 * score.value, index, xerr=_spread([score]), **style_system(label, labels)
            )
        panel.set_title(_title(comparison, task), fontsize=9)
        panel.set_xlim(*_widen_limits(panel.get_xlim()))
        panel.set_yticks(range(len(labels)), labels, fontsize=8)
        panel.set_ylim(len(labels) - 0.5, -0.5)
        style_axes(panel)
    for panel in axes[-3:]:
        panel.set_xlabel("score on test rows, percent", fontsize=8)
    return figure


def draw_tier_figure(comparison: SystemComparison, tiers: Sequence[Sequence[str]]) -> "Figure":
    """Draw the mean score of each system with its interval, best first, a colour per tier.

    Args:
        comparison: computed results.
        tiers: labels of each tier, by mean score.
    """
    labels = [label for members in tiers for label in members]
    is_long = len(labels) > MAX_NAMED
    figure = make_figure(6.8, 0.8 + (0.06 if is_long else 0.2) * len(labels))
    names: dict[float, str] = {}
    with show_dollars():
        panel = figure.add_subplot()
        for number, members in enumerate(tiers):
            first = len(names) if not is_long else labels.index(members[0])
            # A band marks each second tier, for prints in grey.
            if number % 2:
                panel.axhspan(first - 0.5, first + len(members) - 0.5, color="#eef1f5", zorder=0)
            scores = [comparison.scores[label, MEAN, SPLIT] for label in members]
            panel.errorbar(
                [100 * score.value for score in scores],
                range(first, first + len(members)),
                xerr=_spread(scores),
                fmt="o",
                markersize=2.5 if is_long else 4,
                elinewidth=0.7 if is_long else 1.2,
                color=COLORS[number % len(COLORS)],
            )
            if is_long:
                more = f" and {len(members) - 1} more" if len(members) > 1 else ""
                names[first + (len(members) - 1) / 2] = f"{number + 1}: {members[0]}{more}"
            else:
                names |= {first + n: f"{number + 1}: {label}" for n, label in enumerate(members)}
        panel.set_yticks(list(names), list(names.values()), fontsize=7 if is_long else 8)
        panel.set_ylim(len(labels) - 0.5, -0.5)
        panel.set_xlabel("mean score, percent, with 95 % interval; tier: system", fontsize=8)
        style_axes(panel)
    return figure


def draw_learning_figure(
    comparison: SystemComparison, histories: "Mapping[str, Sequence[MetricHistory]]"
) -> "Figure | None":
    """Draw the mean validation metric over operations, or the training loss; None without logs.

    Operations are steps times those of an example. As in :mod:`skillnet_evidence.budget`, all
    systems take equally many examples per step.

    Args:
        comparison: names the tasks and has their costs.
        histories: label -> what each run logged.
    """
    from matplotlib.lines import Line2D

    labels = list(comparison.systems)

    def line(label: str) -> Literal["-", "--"]:
        return "-" if label.endswith(PRETRAINED) else "--"

    figure, axes = _make_panels(comparison.tasks, 2.2)
    has_curve = False
    for task, panel in zip(comparison.tasks, axes, strict=True):
        metric = comparison.metrics[task]
        validation = f"{task}/validation_{metric.name}"
        is_validated = any(validation in each for runs in histories.values() for each in runs)
        name = validation if is_validated else f"{task}/loss"
        for label, runs in histories.items():
            curve = _mean_curve([each[name] for each in runs if each.get(name)])
            cost = comparison.costs.get((label, task))
            if curve is None or cost is None:
                continue
            steps, values = curve
            operations = steps * cost.flops
            if is_validated:
                values = 100 * np.array([metric.score(float(value)) for value in values])
            else:
                values = smooth_series(values)
            colour = style_system(label, labels)["color"]
            panel.plot(operations, values, color=colour, linestyle=line(label), linewidth=1.2)
            has_curve = True
        panel.set_title(task.replace("_", " "), fontsize=9)
        text = f"{metric.label}, percent" if is_validated else "training loss"
        panel.set_ylabel(text, fontsize=8)
        if is_validated:
            panel.set_ylim(*_widen_limits(panel.get_ylim()))
        style_axes(panel)
    for panel in axes[-3:]:
        panel.set_xlabel("steps x FLOPs per example", fontsize=8)
    if not has_curve:
        return None
    handles = [
        Line2D(
            [], [], color=style_system(label, labels)["color"], linestyle=line(label), label=label
        )
        for label in labels
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 5), fontsize=8,
        frameon=False,
    )  # fmt: skip
    return figure


def _base_label(label: str) -> str:
    return label.removesuffix(PRETRAINED)


# -- parts ---------------------------------------------------------------------------------


def _draw_difference(panel: Any, y: float, row: ForestRow) -> None:
    colour, marker, is_filled = RESULTS[row.result]
    value, low, high = (100 * each for each in row.change)
    if row.band[0]:
        left, right = (100 * each for each in row.band)
        panel.fill_betweenx([y - 0.5, y + 0.5], left, right, color=BAND, linewidth=0, zorder=0)
    # Below the interval, so that neither hides the other.
    folds = [100 * each for each in row.by_fold]
    panel.plot(folds, [y + 0.3] * len(folds), ".", color=SOFT, markersize=2.5, alpha=0.7)
    if not math.isnan(low):
        panel.plot([low, high], [y, y], color=colour, linewidth=1.8, solid_capstyle="butt")
    panel.plot(
        value,
        y,
        marker="D" if row.is_mean and marker == "o" else marker,
        color=colour,
        markerfacecolor=colour if is_filled else "white",
        markersize=6 if marker != "X" else 7.5,
        markeredgewidth=1.4 if marker != "X" else 0,
        linestyle="none",
    )
    panel.text(
        *(1.02, y, format_interval(row.change)),
        transform=panel.get_yaxis_transform(),
        va="center",
        fontsize=FONT_PT,
        color=INK,
    )


def _explain_marks(panel: Any, groups: Sequence[ForestGroup]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = [row for group in groups for row in group.rows]
    handles: list[Any] = []
    for name, (colour, marker, is_filled) in RESULTS.items():
        if any(row.result == name for row in rows):
            face = colour if is_filled else "white"
            handles.append(
                Line2D([], [], color=colour, marker=marker, markerfacecolor=face, label=name)
            )
    if any(row.band[0] for row in rows):
        handles.append(Patch(color=BAND, label="margin"))
    if any(row.by_fold for row in rows):
        handles.append(Line2D([], [], color=SOFT, marker=".", linestyle="none", label="one fold"))
    panel.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.42 / _forest_height(groups)),
        ncols=len(handles), frameon=False, fontsize=FONT_PT, handlelength=1.8, columnspacing=1.4,
    )  # fmt: skip


def _forest_height(groups: Sequence[ForestGroup]) -> float:
    lines = 0.0
    for group in groups:
        lines += 0.85 * len(_wrap_lines(group.title)) + 0.8 * len(
            _wrap_lines(group.note, NOTE_CHARS)
        )
        lines += len(group.rows) + 1.0
    return ROW_IN * lines + 0.75


def _wrap_lines(text: str, width: int = TITLE_CHARS) -> list[str]:
    return textwrap.wrap(text, width) or [""]


def _label_points(panel: Any, points: Sequence[SystemPoint]) -> None:
    """Write each label at the first place beside its marker that is free."""
    from matplotlib.textpath import TextPath

    figure = panel.figure
    # Positions in pixels are known only after the layout.
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    inside = panel.get_window_extent().extents
    markers, taken = {}, []
    for each in points:
        x, y = markers[each.label] = panel.transData.transform((each.flops, each.score[0]))
        ends = [end if not math.isnan(end) else each.score[0] for end in each.score[1:]]
        bottom, top = (panel.transData.transform((each.flops, end))[1] for end in ends)
        taken.append((x - 4 * scale, y - 5 * scale, x + 4 * scale, y + 5 * scale))
        taken.append((x - 2 * scale, bottom, x + 2 * scale, top))
    for each in sorted(points, key=lambda point: -point.score[0]):
        x, y = markers[each.label]
        width = TextPath((0, 0), each.label, size=FONT_PT).get_extents().width * scale
        height = 1.2 * FONT_PT * scale
        boxes = []
        for dx, dy in OFFSETS:
            left = x + dx * scale - (0 if dx > 0 else width)
            bottom = y + (dy - 2) * scale
            boxes.append((left, bottom, left + width, bottom + height))
        # The first of the places with the fewest collisions; an edge of the panel is one, too.
        collisions = [
            sum(_overlap(box, other) for other in taken)
            + (box[0] < inside[0] or box[2] > inside[2])
            for box in boxes
        ]
        index = collisions.index(min(collisions))
        taken.append(boxes[index])
        dx, dy = OFFSETS[index]
        is_far = math.hypot(dx, dy + 0.4 * FONT_PT) > NEAR_PT
        panel.annotate(
            each.label,
            (each.flops, each.score[0]),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="left" if dx > 0 else "right",
            fontsize=FONT_PT,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": SOFT, "lw": 0.6} if is_far else None,
        )


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _spread(scores: Sequence[ScoreEstimate]) -> list[list[float]]:
    """Return the lengths of intervals in points, below and above their scores."""
    return [
        [100 * max(score.value - score.low, 0) for score in scores],
        [100 * max(score.high - score.value, 0) for score in scores],
    ]


def style_system(label: str, labels: Sequence[str]) -> dict[str, Any]:
    """Return the colour and marker of a system; hollow without pretraining.

    Args:
        label: label of the system.
        labels: labels of all systems of the figure, in order.
    """
    bases = list(dict.fromkeys(_base_label(name) for name in labels))
    # A pretrained variant has the colour and marker of its plain system.
    index = bases.index(_base_label(label)) if _base_label(label) in bases else 0
    colour = COLORS[index % len(COLORS)]
    return {
        "fmt": MARKERS[index % len(MARKERS)],
        "color": colour,
        "markerfacecolor": colour if label.endswith(PRETRAINED) else "white",
        "markersize": 5.5,
        "markeredgewidth": 1.3,
        "elinewidth": 1.2,
        "capsize": 2.5,
    }


def _make_panels(names: Sequence[str], height: float, **more: Any) -> "tuple[Figure, list[Any]]":
    # Three panels per row fit the width of the page.
    across = min(len(names), 3)
    down = -(-len(names) // across)
    figure = make_figure(0.6 + 2.7 * across, height * down + 0.3)
    grid = figure.subplots(down, across, squeeze=False, **more)
    panels = list(grid.flat)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    return figure, panels[: len(names)]


def _title(comparison: SystemComparison, task: str) -> str:
    if task == MEAN:
        return comparison.name_score(MEAN) if comparison.has_unequal_tasks else "mean over tasks"
    return name_column(comparison, task)


def _mean_curve(
    runs: Sequence[Sequence[tuple[int, float]]],
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return steps and mean values over runs, at the steps that all runs have."""
    if not runs:
        return None
    points: list[Mapping[int, float]] = [dict(run) for run in runs]
    steps = sorted(set.intersection(*(set(each) for each in points)))
    if not steps:
        return None
    return np.array(steps), np.array([np.mean([each[s] for each in points]) for s in steps])


def _widen_limits(limits: tuple[float, float], span: float = 2.0) -> tuple[float, float]:
    """Return axis limits in percent that span at least ``span``, so that noise looks small."""
    low, high = limits
    if high - low >= span:
        return limits
    middle = (low + high) / 2
    return middle - span / 2, middle + span / 2
