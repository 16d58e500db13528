"""Figures of a training run: loss by task, learning rate, active skills.

:func:`training_figures` draws all of them for the MLflow page of a run.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.training.evaluation.tables import activation_cells, sort_rows
from skillnet.config import SkillNetConfig
from skillnet_evidence.plot_kit import COLORS, make_figure, smooth_series, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: Metric -> (step, value) pairs.
MetricHistory = Mapping[str, Sequence[tuple[int, float]]]


def training_figures(history: MetricHistory, config: SkillNetConfig) -> "dict[str, Figure]":
    """Draw the figures of a training run: loss by task, learning rate, active skills.

    Args:
        history: metric -> (step, value) pairs, such as ``text_to_image/loss`` and
            ``training/learning_rate``.
        config: shape of the model.

    Returns:
        Artifact name -> figure.
    """
    figures = {"plots/activation.png": activation_figure(config)}
    if any(name.endswith("/loss") for name in history):
        figures["plots/loss_by_task.png"] = loss_figure(history)
    if history.get("training/learning_rate"):
        figures["plots/learning_rate.png"] = learning_rate_figure(history)
    return figures


def loss_figure(history: MetricHistory) -> "Figure":
    """Draw the training loss with one panel per task; losses have different units.

    Args:
        history: metric -> (step, value) pairs.
    """
    losses = [name for name in history if name.endswith("/loss") and history[name]]
    names = [f"{task}/loss" for task in sort_rows(n.removesuffix("/loss") for n in losses)]
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    figure = make_figure(3.2 * columns, 2.4 * lines)
    for index, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, index + 1)
        # A resumed run may log steps out of order.
        steps, values = np.array(sorted(history[name]), dtype=float).T
        color = COLORS[index % len(COLORS)]
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth_series(values), color=color, linewidth=1.6)
        axes.set_title(name.removesuffix("/loss").replace("_", " "), fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        # A cut axis would exaggerate small changes of the loss.
        axes.set_ylim(bottom=0)
        if index % columns == 0:
            axes.set_ylabel("training loss", fontsize=8)
        style_axes(axes)
    return figure


def learning_rate_figure(history: MetricHistory) -> "Figure":
    """Draw the learning rate over steps.

    Args:
        history: metric -> (step, value) pairs.
    """
    figure = make_figure(5.2, 2.4)
    axes = figure.add_subplot()
    steps, values = np.array(sorted(history["training/learning_rate"]), dtype=float).T
    axes.plot(steps, values, color=COLORS[0], linewidth=1.6)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("learning rate", fontsize=8)
    axes.set_ylim(bottom=0)
    style_axes(axes)
    return figure


def activation_figure(config: SkillNetConfig) -> "Figure":
    """Draw the active skills of each tower as a grid.

    Args:
        config: shape of the model.
    """
    _, cells = activation_cells(config)
    active = np.array([[bool(cell) for cell in line[1:]] for line in cells])
    rows, columns = active.shape
    figure = make_figure(2.6 + 0.75 * columns, 0.9 + 0.36 * rows)
    axes = figure.add_subplot()
    for row in range(rows):
        task = sort_rows(config.tasks).index(cells[row][0].partition(",")[0])
        for column in range(columns):
            color = COLORS[task % len(COLORS)] if active[row, column] else "#eceae6"
            axes.add_patch(_square(column, row, color))
    axes.set_xlim(-0.5, columns - 0.5)
    # The axis is inverted, so that the first tower is at the top as in the table.
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xticks(range(columns), config.skills, fontsize=9)
    axes.set_yticks(range(rows), [line[0].replace("_", " ") for line in cells], fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _square(column: int, row: int, color: str) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (column - 0.36, row - 0.36),
        0.72,
        0.72,
        boxstyle="round,pad=0,rounding_size=0.12",
        color=color,
        linewidth=0,
    )
