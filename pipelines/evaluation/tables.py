"""What people see of a run: figures, tables and the description on its MLflow page."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from skillnet.config import SkillNetConfig
from skillnet.skills import Task, default_tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure
import csv
from pathlib import Path

from skillnet_platform.storage import atomic_write

COLUMNS = (
    "system",
    "task",
    "seed",
    "split",
    "metric",
    "value",
    "low",
    "high",
    "activated_params",
    "flops_per_example",
    "steps",
    "date",
    "machine",
)


Row = dict[str, Any]

#: The figure that stands for a task in short tables, and whether more of it is better.
HEADLINE = {
    "classification": ("accuracy", True),
    "ctc": ("token_error_rate", False),
    "retrieval": ("recall_at_10", True),
    "masked": ("masked_loss", False),
}

#: Endings of metrics that are no rates: they are shown as they are.
PLAIN = ("rank", "loss")

#: What a model is held against, in words.
SYSTEMS = {"chance": "chance", "reference": "simple reference"}

#: Metrics in words, for tables.
WORDS = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "token_error_rate": "token error",
    "exact_rate": "exact",
    "recall_at_1": "R@1",
    "recall_at_5": "R@5",
    "recall_at_10": "R@10",
    "median_rank": "median rank",
    "masked_loss": "masked loss",
    "masked_accuracy": "masked tokens right",
}

#: Of Okabe & Ito (2008): the colour-blind can tell them apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#8C564B")


def metric_label(metric: str) -> str:
    """``reverse_recall_at_10 -> "R@10, X to text"``."""
    base = metric.removeprefix("reverse_")
    return WORDS.get(base, base.replace("_", " ")) + (", X to text" if base != metric else "")


def format_value(metric: str, value: float | None) -> str:
    """A figure as people read it: rates in per cent, ranks as they are."""
    if value is None or np.isnan(value):
        return "–"
    return f"{value:.4g}" if metric.endswith(PLAIN) else f"{100 * value:.1f} %"


def format_interval(row: Mapping[str, Any]) -> str:
    """``61.2 % (59.0–63.1)``."""
    text = format_value(row["metric"], row["value"])
    low, high = row.get("low"), row.get("high")
    if low is None or high is None or np.isnan(low) or np.isnan(high):
        return text
    plain = row["metric"].endswith(PLAIN)
    return (
        f"{text} ({low:.4g}–{high:.4g})" if plain else f"{text} ({100 * low:.1f}–{100 * high:.1f})"
    )


def result_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of evaluation rows: a line per task, split and direction."""
    columns = ["task", "split", "figures (95 % interval)"]
    groups: dict[tuple[str, str, bool], list[Row]] = {}
    for row in rows:
        key = (row["task"], row["split"], row["metric"].startswith("reverse_"))
        groups.setdefault(key, []).append(row)
    cells = []
    for (task, split, reverse), members in groups.items():
        text = "   ".join(
            f"{metric_label(row['metric'].removeprefix('reverse_'))} {format_interval(row)}"
            for row in members
        )
        cells.append([task, split + (", reverse" if reverse else ""), text])
    return columns, cells


def summary_cells(
    rows: Sequence[Row], others: Sequence[Row], tasks: Mapping[str, Task], total: int
) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the table at the end of a run: one line per task on ``test``.

    Args:
        rows: of the model.
        others: of the systems ``chance`` and ``reference``.
        tasks: name -> task.
        total: parameters of the whole model.
    """
    beside = ("chance", "reference") if others else ()
    columns = ["task", "metric", *(SYSTEMS[name] for name in beside)]
    columns += ["SkillNet (95 % interval)", "active"]
    cells = []
    for task in sort_rows(tasks):
        metric, more = HEADLINE[tasks[task].objective]
        own = find_row(rows, task, metric)
        if own is None:
            continue
        found = [find_row(others, task, metric, system) for system in beside]
        cells.append(
            [
                task,
                metric_label(metric) + (" ↑" if more else " ↓"),
                *(format_value(metric, row["value"]) if row else "–" for row in found),
                format_interval(own),
                f"{100 * own['activated_params'] / total:.0f} %",
            ]
        )
    return columns, cells


def sort_rows(tasks: Iterable[str]) -> list[str]:
    """The paper's five tasks in its order, then the others as they come."""
    names = list(tasks)
    known = [name for name in default_tasks() if name in names]
    return known + [name for name in names if name not in known]


def headline_rows(rows: Sequence[Row], tasks: Mapping[str, Task]) -> str:
    """The headline of each task in one line."""
    said = []
    for task in sort_rows(tasks):
        metric, _ = HEADLINE[tasks[task].objective]
        row = find_row(rows, task, metric)
        if row is not None:
            said.append(f"{task} {metric_label(metric)} **{format_value(metric, row['value'])}**")
    return ", ".join(said)


def find_row(
    rows: Sequence[Row], task: str, metric: str, system: str | None = None, split: str = "test"
) -> Row | None:
    """The row of a figure, or None."""
    for row in rows:
        if (row["task"], row["metric"], row["split"]) == (task, metric, split) and system in (
            None,
            row["system"],
        ):
            return row
    return None


def flat_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Rows as MLflow metrics: ``text_to_image/test_recall_at_10``.

    The bounds of a task's headline on ``test`` stand beside it; those of all other figures are
    in the CSV file only, or they would crowd the page.
    """
    headlines = {metric for metric, _ in HEADLINE.values()}
    flat: dict[str, float] = {}
    for row in rows:
        name = f"{row['task']}/{row['split']}_{row['metric']}"
        flat[name] = float(row["value"])
        if row["metric"] in headlines and row["split"] == "test":
            for bound in ("low", "high"):
                if row.get(bound) is not None and not np.isnan(row[bound]):
                    flat[f"{name}_{bound}"] = float(row[bound])
    return flat


def markdown_table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )


def run_description(
    rows: Sequence[Row],
    others: Sequence[Row],
    config: SkillNetConfig,
    total: int,
    facts: Mapping[str, Any] | None = None,
) -> str:
    """The note at the head of a run's page, in markdown: results, activation, how to go on.

    ``facts`` are names and values to list (steps, minutes, version).
    """
    parts = [
        f"One sparse model of {total / 1e6:.1f} M parameters in {len(config.skills)} skills, "
        f"trained jointly on {len(config.tasks)} tasks."
    ]
    if rows:
        # MLflow folds the note after a few lines: the figures come first.
        parts.append(f"On held-out data: {headline_rows(rows, config.tasks)}.")
        parts += [
            "#### Test results",
            markdown_table(*summary_cells(rows, others, config.tasks, total)),
        ]
        parts += [
            "*active*: share of the parameters that the task reads. Intervals: bootstrap over "
            "test rows. Every figure, with the other test sets and the reverse direction: the CSV "
            "files in `evaluation/` under Artifacts."
        ]
    parts += ["#### Who activates what", markdown_table(*activation_cells(config))]
    if facts:
        parts += ["#### Facts", "\n".join(f"- {key}: {value}" for key, value in facts.items())]
    return "\n\n".join(parts)


def run_facts(result: Mapping[str, Any]) -> dict[str, str]:
    """Facts of a finished training run, from what ``finetune`` gives."""
    facts = {
        "steps": f"{result['step']}",
        "training": f"{result['seconds'] / 60:.1f} min, {result['world']} worker(s)",
        "rows per second": f"{result['rows_per_second']:.0f}",
        "waiting for data": f"{100 * result['waiting']:.1f} % of the time",
        "folder": f"`{result['run']}`",
    }
    if result.get("stopped_early"):
        facts["stopped early"] = str(result["stopped_early"])
    return facts


def activation_cells(config: SkillNetConfig) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the activation table: a line per tower, a dot per active skill."""
    cells = []
    for name in sort_rows(config.tasks):
        towers = config.tasks[name].towers
        for tower in sorted(towers, key=["input", "query", "candidate"].index):
            plan = towers[tower]
            label = name if tower == "input" else f"{name}, {tower}"
            cells.append([label, *("●" if s in plan.skills else "" for s in config.skills)])
    return ["tower", *config.skills], cells


# -- figures -------------------------------------------------------------------------------

History = Mapping[str, Sequence[tuple[int, float]]]


def training_figures(history: History, config: SkillNetConfig) -> "dict[str, Figure]":
    """Artifact name -> figure: loss by task, learning rate, activation.

    Args:
        history: metric -> (step, value) pairs, such as ``text_to_image/loss`` and
            ``training/learning_rate``.
        config: shape of the model.
    """
    figures = {"plots/activation.png": activation_figure(config)}
    if any(name.endswith("/loss") for name in history):
        figures["plots/loss_by_task.png"] = loss_figure(history)
    if history.get("training/learning_rate"):
        figures["plots/learning_rate.png"] = learning_rate_figure(history)
    return figures


def loss_figure(history: History) -> "Figure":
    """A small panel per task: the losses have different units and do not share an axis."""
    losses = [name for name in history if name.endswith("/loss") and history[name]]
    names = [f"{task}/loss" for task in sort_rows(n.removesuffix("/loss") for n in losses)]
    across = min(len(names), 3)
    down = -(-len(names) // across)
    figure = _figure(3.2 * across, 2.4 * down)
    for index, name in enumerate(names):
        axes = figure.add_subplot(down, across, index + 1)
        steps, values = np.array(sorted(history[name]), dtype=float).T
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth_series(values), color=colour, linewidth=1.6)
        axes.set_title(name.removesuffix("/loss").replace("_", " "), fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylim(bottom=0)
        if index % across == 0:
            axes.set_ylabel("training loss", fontsize=8)
        hide_spines(axes)
    return figure


def learning_rate_figure(history: History) -> "Figure":
    """The learning rate over steps."""
    figure = _figure(5.2, 2.4)
    axes = figure.add_subplot()
    steps, values = np.array(sorted(history["training/learning_rate"]), dtype=float).T
    axes.plot(steps, values, color=COLOURS[0], linewidth=1.6)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("learning rate", fontsize=8)
    axes.set_ylim(bottom=0)
    hide_spines(axes)
    return figure


def activation_figure(config: SkillNetConfig) -> "Figure":
    """Which tower of which task activates which skill, as a grid."""
    _, cells = activation_cells(config)
    active = np.array([[bool(cell) for cell in line[1:]] for line in cells])
    rows, columns = active.shape
    figure = _figure(2.6 + 0.75 * columns, 0.9 + 0.36 * rows)
    axes = figure.add_subplot()
    for row in range(rows):
        task = sort_rows(config.tasks).index(cells[row][0].partition(",")[0])
        for column in range(columns):
            colour = COLOURS[task % len(COLOURS)] if active[row, column] else "#eceae6"
            axes.add_patch(_square(column, row, colour))
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xticks(range(columns), config.skills, fontsize=9)
    axes.set_yticks(range(rows), [line[0].replace("_", " ") for line in cells], fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def smooth_series(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Running mean over a share of the points, centred, shorter at both ends."""
    half = max(int(len(values) * share / 2), 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    low, high = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _square(column: int, row: int, colour: str) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (column - 0.36, row - 0.36),
        0.72,
        0.72,
        boxstyle="round,pad=0,rounding_size=0.12",
        color=colour,
        linewidth=0,
    )


def hide_spines(axes: Any) -> None:
    """Axes that leave the eye to what is drawn on them."""
    axes.tick_params(labelsize=8, color="#999999")
    axes.grid(True, color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def write_evaluation_csv(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write evaluation rows as CSV; figures keep six digits."""

    with atomic_write(path, "w") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _cell(row.get(key)) for key in COLUMNS})


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
