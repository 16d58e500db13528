"""Figures of an interpretation: heat maps with a number in each cell.

Purple and orange show the two directions of a change, blue shows amounts. The colour maps PuOr and
Blues (source: ColorBrewer) are readable with colour vision deficiency.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.training.evaluation.tables import score_label, sort_rows
from skillnet_evidence.plot_kit import make_figure
from skillnet_studies.interpretation.ablation import ADD, REMOVE, SWAP
from skillnet_studies.interpretation.similarity import CKA, UNTRAINED, WEIGHTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

#: Layers that are shown for a deep model: evenly spaced, including the first and the last.
LAYERS_SHOWN = 4


def draw_figures(
    ablations: Rows, similarity: Rows, gradients: Rows, skills: Sequence[str]
) -> "dict[str, Figure]":
    """Draw all figures that have rows; return file name -> figure.

    Args:
        ablations: rows of :func:`skillnet_studies.interpretation.ablation.measure_ablations`.
        similarity: rows of
            :func:`skillnet_studies.interpretation.similarity.measure_skill_similarity`.
        gradients: rows of
            :func:`skillnet_studies.interpretation.gradient_share.measure_gradient_share`.
        skills: skills of the model, in the order of the columns.
    """
    figures: dict[str, Figure] = {}
    if ablations:
        figures["ablation.png"] = draw_ablation_figure(ablations, skills)
    if any(row["change"] == SWAP for row in ablations):
        figures["swaps.png"] = draw_swap_figure(ablations, skills)
    if gradients:
        figures["gradient_share.png"] = draw_gradient_figure(gradients, skills)
    modalities = dict.fromkeys(row["modality"] for row in similarity if row["measure"] == CKA)
    for modality in modalities:
        rows = [r for r in similarity if r["measure"] == CKA and r["modality"] == modality]
        title = f"similarity of skill outputs on {modality} (linear CKA)"
        figures[f"similarity_{modality}.png"] = draw_similarity_figure(rows, title)
    weights = [row for row in similarity if row["measure"] == WEIGHTS]
    if weights:
        title = "similarity of skill weights (cosine)"
        figures["similarity_weights.png"] = draw_similarity_figure(weights, title)
    return figures


def draw_ablation_figure(rows: Rows, skills: Sequence[str]) -> "Figure":
    """Draw task x skill: score drop after removing an active skill or adding another.

    Args:
        rows: result of :func:`skillnet_studies.interpretation.ablation.measure_ablations`.
        skills: skills of the model, in the order of the columns.
    """
    tasks = sort_rows(dict.fromkeys(row["task"] for row in rows))
    cells: dict[tuple[int, int], Mapping[str, Any]] = {}
    for row in rows:
        if row["change"] in (REMOVE, ADD):
            cells[tasks.index(row["task"]), skills.index(row["skill"])] = row
    figure = make_figure(2.6 + 1.05 * len(skills), 1.9 + 0.62 * len(tasks))
    axes = figure.add_subplot()
    _draw_score_drops(
        axes, cells, len(tasks), len(skills), _largest_drop(rows), _format_drop_with_interval
    )
    labels = [f"{task.replace('_', ' ')}\n{_format_basis(rows, task)}" for task in tasks]
    _label_axes(axes, labels, skills)
    split = rows[0]["split"]
    axes.set_title(
        f"Score drop in points on {split} (95 % interval), by change of the task's plan\n"
        "framed: an active skill is removed;  unframed: an inactive skill is added",
        fontsize=9,
        loc="left",
    )
    return figure


def draw_swap_figure(rows: Rows, skills: Sequence[str]) -> "Figure":
    """Draw one panel per task: score drop after swapping an active skill for another.

    Args:
        rows: result of :func:`skillnet_studies.interpretation.ablation.measure_ablations`.
        skills: skills of the model, in the order of the columns.
    """
    swaps = [row for row in rows if row["change"] == SWAP]
    tasks = sort_rows(dict.fromkeys(row["task"] for row in swaps))
    active = {
        task: [s for s in skills if any((r["task"], r["skill"]) == (task, s) for r in swaps)]
        for task in tasks
    }
    # Panels have one row per active skill, so their heights differ.
    heights = [len(active[task]) for task in tasks]
    figure = make_figure(2.2 + 1.0 * len(skills), 1.0 + sum(0.55 * h + 0.75 for h in heights))
    panels = figure.subplots(len(tasks), 1, height_ratios=[h + 1.2 for h in heights], squeeze=False)
    largest = _largest_drop(rows)
    for axes, task in zip(panels[:, 0], tasks, strict=True):
        cells = {
            (active[task].index(row["skill"]), skills.index(row["other"])): row
            for row in swaps
            if row["task"] == task
        }
        _draw_score_drops(axes, cells, len(active[task]), len(skills), largest, _format_drop)
        _label_axes(axes, active[task], skills)
        axes.set_ylabel("removed", fontsize=8)
        axes.set_title(
            f"{task.replace('_', ' ')} ({_format_basis(rows, task)}), added:",
            fontsize=9,
            loc="left",
        )
    figure.suptitle(
        f"Score drop in points on {rows[0]['split']} after swapping a skill for another",
        fontsize=10,
    )
    return figure


def draw_gradient_figure(rows: Rows, skills: Sequence[str]) -> "Figure":
    """Draw task x skill: gradient share among skills, and next to it among all parts.

    Args:
        rows: result of
            :func:`skillnet_studies.interpretation.gradient_share.measure_gradient_share`.
        skills: skills of the model, in the order of the columns.
    """
    tasks = sort_rows(dict.fromkeys(row["task"] for row in rows))
    own = np.full((len(tasks), len(skills)), np.nan)
    kinds = ("skill", "shared", "stem", "head")
    every = np.zeros((len(tasks), len(kinds)))
    for row in rows:
        down = tasks.index(row["task"])
        every[down, kinds.index(row["kind"])] += row["share"]
        if row["kind"] == "skill" and row["parameters"]:
            own[down, skills.index(row["part"])] = row["of_skills"]
    figure = make_figure(2.6 + 0.75 * (len(skills) + len(kinds)), 1.5 + 0.5 * len(tasks))
    left, right = figure.subplots(1, 2, width_ratios=[len(skills), len(kinds)])
    for axes, values in ((left, own), (right, every)):
        image = _draw_image(axes, values, "Blues", 0, 1)
        for cell in np.ndindex(*values.shape):
            if np.isnan(values[cell]):
                _draw_empty_cell(axes, cell, "")
            else:
                text = f"{100 * values[cell]:.1f} %" if values[cell] >= 0.01 else "< 1 %"
                _write_value(axes, cell, text, image, float(values[cell]))
    _label_axes(left, [task.replace("_", " ") for task in tasks], skills)
    _label_axes(right, [""] * len(tasks), ["all skills", "shared", "stems", "head"])
    left.set_title("Squared gradient by skill; empty: not active", fontsize=9, loc="left")
    right.set_title("… and by all parts", fontsize=9, loc="left")
    return figure


def draw_similarity_figure(rows: Rows, title: str) -> "Figure":
    """Draw skill x skill, one panel per module (down) and layer (across).

    Args:
        rows: result of :func:`skillnet_studies.interpretation.similarity.measure_skill_similarity`.
        title: title of the figure.
    """
    skills = list(dict.fromkeys(row["skill"] for row in rows))
    # The baseline is the last row, where captions refer to it.
    skills.sort(key=lambda name: name == UNTRAINED)
    modules = list(dict.fromkeys(row["module"] for row in rows))
    every = sorted({row["layer"] for row in rows})
    chosen = np.unique(np.linspace(0, len(every) - 1, min(len(every), LAYERS_SHOWN)).round())
    layers = [every[int(index)] for index in chosen]
    side = 0.9 + 0.36 * len(skills)
    figure = make_figure(1.2 + side * len(layers), 1.0 + (side + 0.1) * len(modules))
    panels = figure.subplots(len(modules), len(layers), squeeze=False)
    # A diverging colour map only if some similarity is clearly negative.
    negative = any(row["value"] is not None and row["value"] < -0.05 for row in rows)
    for down, module in enumerate(modules):
        for across, layer in enumerate(layers):
            axes = panels[down, across]
            values = np.full((len(skills), len(skills)), np.nan)
            for row in rows:
                if (row["module"], row["layer"]) == (module, layer) and row["value"] is not None:
                    values[skills.index(row["skill"]), skills.index(row["other"])] = row["value"]
            image = _draw_image(
                axes, values, "PuOr" if negative else "Blues", -1 if negative else 0, 1
            )
            for cell in np.ndindex(*values.shape):
                if np.isnan(values[cell]):
                    _draw_empty_cell(axes, cell, "–")
                else:
                    value = float(values[cell])
                    _write_value(axes, cell, _format_hundredths(value), image, value, 6.5)
            _label_axes(axes, skills if across == 0 else [""] * len(skills), skills, 7.5, 60)
            if down:
                axes.set_xticklabels([])
            axes.set_xlabel(f"{module}, layer {layer}", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


# -- parts of a heat map -------------------------------------------------------------------


def _draw_score_drops(
    axes: Any,
    cells: Mapping[tuple[int, int], Mapping[str, Any]],
    down: int,
    across: int,
    largest: float,
    format_cell: Any,
) -> None:
    from matplotlib.patches import Rectangle

    values = np.full((down, across), np.nan)
    for position, row in cells.items():
        if row["score_drop"] is not None:
            values[position] = row["score_drop"]
    image = _draw_image(axes, values, "PuOr_r", -largest, largest)
    for position in ((y, x) for y in range(down) for x in range(across)):
        cell = cells.get(position)
        if cell is None or cell["score_drop"] is None:
            _draw_empty_cell(axes, position, "" if cell is None else "n/a")
        else:
            weight = "bold" if cell["low"] > 0 or cell["high"] < 0 else "normal"
            text = format_cell(cell)
            _write_value(axes, position, text, image, cell["score_drop"], 7, weight)
        if cell is not None and cell["change"] == REMOVE:
            corner = (position[1] - 0.47, position[0] - 0.46)
            box = Rectangle(corner, 0.94, 0.92, fill=False)
            box.set(linewidth=1.6, edgecolor="#222222")
            axes.add_patch(box)


def _draw_image(axes: Any, values: np.ndarray, colours: str, low: float, high: float) -> Any:
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(np.arange(-0.5, values.shape[1]), minor=True)
    axes.set_yticks(np.arange(-0.5, values.shape[0]), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    return image


def _write_value(
    axes: Any,
    position: tuple[int, ...],
    text: str,
    image: Any,
    value: float,
    size: float = 8,
    weight: str = "normal",
) -> None:
    red, green, blue, _ = image.cmap(image.norm(value))
    # Luma weights of ITU-R BT.601 decide between white and dark text.
    is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
    colour = "white" if is_dark else "#1a1a1a"
    _write_text(axes, position, text, fontsize=size, color=colour, weight=weight)


def _draw_empty_cell(axes: Any, position: tuple[int, ...], text: str) -> None:
    from matplotlib.patches import Rectangle

    corner = (position[1] - 0.5, position[0] - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, color="#f1efec", linewidth=0, zorder=0))
    _write_text(axes, position, text, fontsize=7, color="#8a8a8a")


def _write_text(axes: Any, position: tuple[int, ...], text: str, **style: Any) -> None:
    label = axes.text(position[1], position[0], text, ha="center", va="center", **style)
    # The layout engine is slow with thousands of labels, and these stay inside their cells.
    label.set_in_layout(False)


def _label_axes(
    axes: Any, rows: Sequence[str], columns: Sequence[str], size: float = 8.5, turn: float = 0
) -> None:
    axes.set_xticks(range(len(columns)), columns, fontsize=size, rotation=turn)
    axes.set_yticks(range(len(rows)), rows, fontsize=size)
    axes.xaxis.tick_top()
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _largest_drop(rows: Rows) -> float:
    """Return the largest absolute change, which is the colour limit of all panels."""
    drops = (abs(row["score_drop"]) for row in rows if row["score_drop"] is not None)
    return max(drops, default=0) or 1.0


def _format_drop_with_interval(row: Mapping[str, Any]) -> str:
    low, high = _format_points(row["low"]), _format_points(row["high"])
    return f"{_format_drop(row)}\n({low} to {high})"


def _format_drop(row: Mapping[str, Any]) -> str:
    return _format_points(row["score_drop"])


def _format_points(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _format_basis(rows: Rows, task: str) -> str:
    row = next(row for row in rows if row["task"] == task)
    return f"{score_label(row['metric'])} {100 * row['before']:.1f} %"


def _format_hundredths(value: float) -> str:
    """Return a short number for a small cell: ``0.38 -> ".38"``, ``-0.004 -> "0"``."""
    text = f"{value:.2f}"
    if text in ("0.00", "-0.00", "1.00"):
        return text[-4]
    return text.replace("0.", ".").replace("-", "−")
