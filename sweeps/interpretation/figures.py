"""Pictures of an interpretation: heat maps with their numbers, in colours that all eyes tell apart.

Purple and orange stand for the two directions of a change, blues for amounts (ColorBrewer's PuOr
and Blues, both safe for the colour-blind); every cell carries its number.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.evaluation.tables import in_order
from sweeps.interpretation.ablation import ADD, REMOVE, SWAP
from sweeps.interpretation.similarity import CKA, UNTRAINED, WEIGHTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

#: Layers of a deep model that are shown: spread evenly, the first and the last among them.
LAYERS_SHOWN = 4


def draw_figures(
    knockout: Rows, similarity: Rows, gradients: Rows, skills: Sequence[str]
) -> "dict[str, Figure]":
    """File name -> figure of all that there are rows for.

    Args:
        knockout: of :func:`sweeps.interpretation.ablation.measure_ablations`.
        similarity: of :func:`sweeps.interpretation.similarity.measure_skill_similarity`.
        gradients: of :func:`sweeps.interpretation.gradient_share.measure_gradient_share`.
        skills: the model's, in the order of columns.
    """
    found: dict[str, Figure] = {}
    if knockout:
        found["knockout.png"] = draw_ablation_figure(knockout, skills)
    if any(row["change"] == SWAP for row in knockout):
        found["swaps.png"] = draw_swap_figure(knockout, skills)
    if gradients:
        found["gradient_share.png"] = draw_gradient_figure(gradients, skills)
    modalities = dict.fromkeys(row["modality"] for row in similarity if row["measure"] == CKA)
    for modality in modalities:
        rows = [r for r in similarity if r["measure"] == CKA and r["modality"] == modality]
        words = f"likeness of skills' outputs on {modality} (linear CKA)"
        found[f"similarity_{modality}.png"] = draw_similarity_figure(rows, words)
    weights = [row for row in similarity if row["measure"] == WEIGHTS]
    if weights:
        words = "likeness of skills' weights (cosine)"
        found["similarity_weights.png"] = draw_similarity_figure(weights, words)
    return found


def draw_ablation_figure(rows: Rows, skills: Sequence[str]) -> "Figure":
    """Task x skill: points lost when an active skill is left out, or another put in."""
    tasks = in_order(dict.fromkeys(row["task"] for row in rows))
    cells: dict[tuple[int, int], Mapping[str, Any]] = {}
    for row in rows:
        if row["change"] in (REMOVE, ADD):
            cells[tasks.index(row["task"]), skills.index(row["skill"])] = row
    figure = _make_figure(2.6 + 1.05 * len(skills), 1.9 + 0.62 * len(tasks))
    axes = figure.add_subplot()
    _draw_score_drops(
        axes, cells, len(tasks), len(skills), _largest_drop(rows), _format_drop_with_interval
    )
    labels = [f"{_replace_underscores(task)}\n{_format_basis(rows, task)}" for task in tasks]
    _label_axes(axes, labels, skills)
    split = rows[0]["split"]
    axes.set_title(
        f"Points of score lost on {split} (95 % interval), by change of the task's plan\n"
        "framed: the skill is active and is left out;  unframed: it is not, and is put in",
        fontsize=9,
        loc="left",
    )
    return figure


def draw_swap_figure(rows: Rows, skills: Sequence[str]) -> "Figure":
    """A panel a task: points lost when another skill takes the place of an active one."""
    swaps = [row for row in rows if row["change"] == SWAP]
    tasks = in_order(dict.fromkeys(row["task"] for row in swaps))
    active = {
        task: [s for s in skills if any((r["task"], r["skill"]) == (task, s) for r in swaps)]
        for task in tasks
    }
    heights = [len(active[task]) for task in tasks]
    figure = _make_figure(2.2 + 1.0 * len(skills), 1.0 + sum(0.55 * h + 0.75 for h in heights))
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
        axes.set_ylabel("taken out", fontsize=8)
        axes.set_title(
            f"{_replace_underscores(task)} ({_format_basis(rows, task)}), put in:",
            fontsize=9,
            loc="left",
        )
    figure.suptitle(
        f"Points of score lost on {rows[0]['split']} when a skill is swapped for another",
        fontsize=10,
    )
    return figure


def draw_gradient_figure(rows: Rows, skills: Sequence[str]) -> "Figure":
    """Task x skill: share of the skills' squared gradient; beside it the skills' share of all."""
    tasks = in_order(dict.fromkeys(row["task"] for row in rows))
    own = np.full((len(tasks), len(skills)), np.nan)
    kinds = ("skill", "shared", "stem", "head")
    every = np.zeros((len(tasks), len(kinds)))
    for row in rows:
        down = tasks.index(row["task"])
        every[down, kinds.index(row["kind"])] += row["share"]
        if row["kind"] == "skill" and row["parameters"]:
            own[down, skills.index(row["part"])] = row["of_skills"]
    figure = _make_figure(2.6 + 0.75 * (len(skills) + len(kinds)), 1.5 + 0.5 * len(tasks))
    left, right = figure.subplots(1, 2, width_ratios=[len(skills), len(kinds)])
    for axes, values in ((left, own), (right, every)):
        image = _draw_image(axes, values, "Blues", 0, 1)
        for place in np.ndindex(*values.shape):
            if np.isnan(values[place]):
                _draw_empty_cell(axes, place, "")
            else:
                text = f"{100 * values[place]:.1f} %" if values[place] >= 0.01 else "< 1 %"
                _write_value(axes, place, text, image, float(values[place]))
    _label_axes(left, [_replace_underscores(task) for task in tasks], skills)
    _label_axes(right, [""] * len(tasks), ["all skills", "shared", "stems", "head"])
    left.set_title("Squared gradient by skill; empty: not active", fontsize=9, loc="left")
    right.set_title("… and of all parts", fontsize=9, loc="left")
    return figure


def draw_similarity_figure(rows: Rows, title: str) -> "Figure":
    """Skill x skill, a panel for each module (down) and layer (across)."""
    skills = list(dict.fromkeys(row["skill"] for row in rows))
    skills.sort(key=lambda name: name == UNTRAINED)
    modules = list(dict.fromkeys(row["module"] for row in rows))
    every = sorted({row["layer"] for row in rows})
    chosen = np.unique(np.linspace(0, len(every) - 1, min(len(every), LAYERS_SHOWN)).round())
    layers = [every[int(place)] for place in chosen]
    side = 0.9 + 0.36 * len(skills)
    figure = _make_figure(1.2 + side * len(layers), 1.0 + (side + 0.1) * len(modules))
    panels = figure.subplots(len(modules), len(layers), squeeze=False)
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
            for place in np.ndindex(*values.shape):
                if np.isnan(values[place]):
                    _draw_empty_cell(axes, place, "–")
                else:
                    value = float(values[place])
                    _write_value(axes, place, _format_hundredths(value), image, value, 6.5)
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
    words: Any,
) -> None:
    from matplotlib.patches import Rectangle

    values = np.full((down, across), np.nan)
    for place, row in cells.items():
        if row["lost"] is not None:
            values[place] = row["lost"]
    image = _draw_image(axes, values, "PuOr_r", -largest, largest)
    for place in ((y, x) for y in range(down) for x in range(across)):
        cell = cells.get(place)
        if cell is None or cell["lost"] is None:
            _draw_empty_cell(axes, place, "" if cell is None else "n/a")
        else:
            sure = cell["low"] > 0 or cell["high"] < 0
            _write_value(
                axes, place, words(cell), image, cell["lost"], 7, "bold" if sure else "normal"
            )
        if cell is not None and cell["change"] == REMOVE:
            box = Rectangle((place[1] - 0.47, place[0] - 0.46), 0.94, 0.92, fill=False)
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
    place: tuple[int, ...],
    text: str,
    image: Any,
    value: float,
    size: float = 8,
    weight: str = "normal",
) -> None:
    red, green, blue, _ = image.cmap(image.norm(value))
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
    colour = "white" if dark else "#1a1a1a"
    _write_text(axes, place, text, fontsize=size, color=colour, weight=weight)


def _draw_empty_cell(axes: Any, place: tuple[int, ...], text: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle((place[1] - 0.5, place[0] - 0.5), 1, 1, color="#f1efec", linewidth=0, zorder=0)
    )
    _write_text(axes, place, text, fontsize=7, color="#8a8a8a")


def _write_text(axes: Any, place: tuple[int, ...], text: str, **style: Any) -> None:
    words = axes.text(place[1], place[0], text, ha="center", va="center", **style)
    # Thousands of numbers inside their cells: the layout need not measure them.
    words.set_in_layout(False)


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
    """The end of the colours' scale, the same for all panels: the largest change."""
    return max((abs(row["lost"]) for row in rows if row["lost"] is not None), default=0) or 1.0


def _format_drop_with_interval(row: Mapping[str, Any]) -> str:
    return f"{_format_points(row['lost'])}\n({_format_points(row['low'])} to {_format_points(row['high'])})"


def _format_drop(row: Mapping[str, Any]) -> str:
    return _format_points(row["lost"])


def _format_points(value: float) -> str:
    shown = f"{100 * value:+.1f}"
    return "0.0" if shown in ("+0.0", "-0.0") else shown.replace("-", "−")


def _format_basis(rows: Rows, task: str) -> str:
    row = next(row for row in rows if row["task"] == task)
    name = {"accuracy": "accuracy", "token_error_rate": "1 − token error"}
    metric = name.get(row["metric"], row["metric"].replace("recall_at_", "R@"))
    return f"{metric} {100 * row['before']:.1f} %"


def _format_hundredths(value: float) -> str:
    """``0.38 -> ".38"``, ``-0.004 -> "0"``: what fits a small cell."""
    shown = f"{value:.2f}"
    if shown in ("0.00", "-0.00", "1.00"):
        return shown[-4]
    return shown.replace("0.", ".").replace("-", "−")


def _replace_underscores(name: str) -> str:
    return name.replace("_", " ")


def _make_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")
