"""Figures of scores, gains from pretraining and learning curves, a panel per task.

:func:`draw_plots` is called by the report of ``skillnet compare``. Filled markers are pretrained
systems, hollow ones are not.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from skillnet_evidence.comparison import MEAN, PRETRAINED, SystemComparison
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
from skillnet_evidence.scores import SPLIT
from skillnet_evidence.tables import name_column

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Systems above which the figure of tiers names the first of each tier only.
MAX_NAMED = 40


def draw_plots(
    comparison: SystemComparison, histories: "Mapping[str, Sequence[MetricHistory]] | None" = None
) -> "dict[str, Figure]":
    """Draw all plots; return name -> figure in the order of the report.

    Args:
        comparison: computed results.
        histories: label -> what each run logged; None draws no curves.
    """
    with show_dollars():
        figures = {
            "scores": draw_score_figure(comparison),
            "score against FLOPs": draw_score_cost_figure(comparison),
        }
        if any(test.kind == "pretraining" for test in comparison.tests):
            figures["gain from pretraining"] = draw_pretraining_figure(comparison)
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
            low, high = score.value - score.low, score.high - score.value
            panel.errorbar(
                100 * score.value,
                index,
                xerr=[[100 * max(low, 0)], [100 * max(high, 0)]],
                **_style(label, labels),
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
                xerr=[
                    [100 * max(score.value - score.low, 0) for score in scores],
                    [100 * max(score.high - score.value, 0) for score in scores],
                ],
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


def draw_score_cost_figure(comparison: SystemComparison) -> "Figure":
    """Draw one panel per task: score against executed FLOPs; sizes of one system are joined."""
    labels = list(comparison.systems)
    tasks = [*comparison.tasks, MEAN]
    figure, axes = _make_panels(tasks, 2.2)
    for task, panel in zip(tasks, axes, strict=True):
        families: dict[str, list[tuple[float, float]]] = {}
        for label in labels:
            score, cost = comparison.find_score(label, task), comparison.costs.get((label, task))
            if score is None or cost is None:
                continue
            low, high = score.value - score.low, score.high - score.value
            panel.errorbar(
                cost.flops,
                100 * score.value,
                yerr=[[100 * max(low, 0)], [100 * max(high, 0)]],
                **_style(label, labels),
            )
            # Sizes of one system share a line; pretrained variants have their own.
            system = comparison.systems[label][0].system + label[len(_base_label(label)) :]
            families.setdefault(system, []).append((cost.flops, 100 * score.value))
        for members in families.values():
            if len(members) > 1:
                x, y = zip(*sorted(members), strict=True)
                panel.plot(x, y, color="#999999", linewidth=0.8, zorder=1)
        panel.set_title(_title(comparison, task), fontsize=9)
        panel.set_ylim(*_widen_limits(panel.get_ylim()))
        panel.set_xscale("log")
        mark_cost_axis(panel)
        style_axes(panel)
    for panel in axes[-3:]:
        panel.set_xlabel("FLOPs per example, executed (log axis)", fontsize=8)
    for panel in axes[::3]:
        panel.set_ylabel("score, percent", fontsize=8)
    _legend(figure, axes[0], labels)
    return figure


def draw_pretraining_figure(comparison: SystemComparison) -> "Figure":
    """Draw the gain from pretraining in points, per task and system."""
    tests = [test for test in comparison.tests if test.kind == "pretraining"]
    systems = list(dict.fromkeys(test.against for test in tests))
    tasks = [*comparison.tasks, MEAN]
    figure = make_figure(7.6, 2.6)
    panel = figure.add_subplot()
    panel.axhline(0, color="#777777", linewidth=0.8)
    labels = list(comparison.systems)
    width = 0.7 / len(systems)
    for test in tests:
        # Systems are placed side by side within the slot of their task.
        x = tasks.index(test.task) + (systems.index(test.against) + 0.5) * width - 0.35
        value, low, high = (100 * x for x in test.difference[:3])
        panel.errorbar(
            x, value, yerr=[[value - low], [high - value]], **_style(test.system, labels)
        )
    panel.set_xticks(range(len(tasks)), map(comparison.name_score, tasks), fontsize=8)
    panel.set_xlim(-0.5, len(tasks) - 0.5)
    panel.set_ylabel("gain in points", fontsize=8)
    style_axes(panel)
    panel.grid(False, axis="x")
    _legend(figure, panel, [f"{name}{PRETRAINED}" for name in systems], labels)
    return figure


def draw_learning_figure(
    comparison: SystemComparison, histories: "Mapping[str, Sequence[MetricHistory]]"
) -> "Figure | None":
    """Draw the mean validation metric over steps, or the training loss; None without logs.

    Args:
        comparison: names the tasks.
        histories: label -> what each run logged.
    """
    labels = list(comparison.systems)
    figure, axes = _make_panels(comparison.tasks, 2.2)
    has_curve = False
    for task, panel in zip(comparison.tasks, axes, strict=True):
        metric = comparison.metrics[task]
        validation = f"{task}/validation_{metric.name}"
        is_validated = any(validation in each for runs in histories.values() for each in runs)
        name = validation if is_validated else f"{task}/loss"
        for label, runs in histories.items():
            curve = _mean_curve([each[name] for each in runs if each.get(name)])
            if curve is None:
                continue
            steps, values = curve
            if is_validated:
                values = 100 * np.array([metric.score(float(value)) for value in values])
            else:
                values = smooth_series(values)
            style = "-" if label.endswith(PRETRAINED) else "--"
            colour = _style(label, labels)["color"]
            panel.plot(steps, values, color=colour, linestyle=style, linewidth=1.2)
            has_curve = True
        panel.set_title(task.replace("_", " "), fontsize=9)
        text = f"{metric.label}, percent" if is_validated else "training loss"
        panel.set_ylabel(text, fontsize=8)
        if is_validated:
            panel.set_ylim(*_widen_limits(panel.get_ylim()))
        style_axes(panel)
    for panel in axes[-3:]:
        panel.set_xlabel("step", fontsize=8)
    if not has_curve:
        return None
    _legend(figure, axes[0], labels, lines=True)
    return figure


def _base_label(label: str) -> str:
    return label.removesuffix(PRETRAINED)


def _style(label: str, labels: Sequence[str]) -> dict[str, Any]:
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


def _legend(
    figure: "Figure",
    panel: Any,
    shown: Sequence[str],
    labels: Sequence[str] | None = None,
    lines: bool = False,
) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for label in shown:
        style = _style(label, labels or shown)
        handles.append(
            Line2D(
                [],
                [],
                color=style["color"],
                linestyle=("-" if label.endswith(PRETRAINED) else "--") if lines else "none",
                marker=None if lines else style["fmt"],
                markerfacecolor=style["markerfacecolor"],
                markeredgewidth=1.3,
                markersize=5.5,
                label=label,
            )
        )
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), 5),
        fontsize=8,
        frameon=False,
    )


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
