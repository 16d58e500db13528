"""Plots of a comparison. Colours: Okabe & Ito (2008), told apart by the colour-blind; markers
differ as well, so that a print in grey can be read. Filled: pretrained; hollow: not."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.evaluation.tables import COLOURS, quiet, words_of
from sweeps.analysis.comparison import MEAN, SystemComparison
from sweeps.analysis.finished_runs import PRETRAINED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")


def draw_plots(of: SystemComparison) -> "dict[str, Figure]":
    """Name -> figure, in the order of the report."""
    import matplotlib

    # A dollar sign in a system's name is no formula.
    with matplotlib.rc_context({"text.parse_math": False}):
        made = {"scores": draw_score_figure(of), "score against FLOPs": draw_score_cost_figure(of)}
        if any(test.kind == "pretraining" for test in of.tests):
            made["what pretraining added"] = draw_pretraining_figure(of)
        learning = draw_learning_figure(of)
        if learning is not None:
            made["learning"] = learning
    return made


def draw_score_figure(of: SystemComparison) -> "Figure":
    """A panel per task: the score of each system with its interval."""
    labels = list(of.systems)
    tasks = [*of.tasks, MEAN]
    figure, axes = _make_panels(tasks, 0.9 + 0.24 * len(labels), sharey=True)
    for task, panel in zip(tasks, axes, strict=True):
        for place, label in enumerate(labels):
            found = of.find_score(label, task)
            if found is None:
                continue
            low, high = found.value - found.low, found.high - found.value
            panel.errorbar(
                100 * found.value,
                place,
                xerr=[[100 * max(low, 0)], [100 * max(high, 0)]],
                **_style(label, labels),
            )
        panel.set_title(_title(of, task), fontsize=9)
        panel.set_xlim(*_widen_limits(panel.get_xlim()))
        panel.set_yticks(range(len(labels)), labels, fontsize=8)
        panel.set_ylim(len(labels) - 0.5, -0.5)
        quiet(panel)
    for panel in axes[-3:]:
        panel.set_xlabel("score on test rows, per cent", fontsize=8)
    return figure


def draw_score_cost_figure(of: SystemComparison) -> "Figure":
    """A panel per task: score against executed operations, sizes of one system joined."""
    labels = list(of.systems)
    tasks = [*of.tasks, MEAN]
    figure, axes = _make_panels(tasks, 2.2)
    for task, panel in zip(tasks, axes, strict=True):
        families: dict[str, list[tuple[float, float]]] = {}
        for label in labels:
            found, cost = of.find_score(label, task), of.costs.get((label, task))
            if found is None or cost is None:
                continue
            low, high = found.value - found.low, found.high - found.value
            panel.errorbar(
                cost.flops,
                100 * found.value,
                yerr=[[100 * max(low, 0)], [100 * max(high, 0)]],
                **_style(label, labels),
            )
            system = of.systems[label][0].system + label[len(_base_label(label)) :]
            families.setdefault(system, []).append((cost.flops, 100 * found.value))
        for members in families.values():
            if len(members) > 1:
                x, y = zip(*sorted(members), strict=True)
                panel.plot(x, y, color="#999999", linewidth=0.8, zorder=1)
        panel.set_title(_title(of, task), fontsize=9)
        panel.set_ylim(*_widen_limits(panel.get_ylim()))
        panel.set_xscale("log")
        _log_ticks(panel)
        quiet(panel)
    for panel in axes[-3:]:
        panel.set_xlabel("FLOPs per example, executed", fontsize=8)
    for panel in axes[::3]:
        panel.set_ylabel("score, per cent", fontsize=8)
    _legend(figure, axes[0], labels)
    return figure


def draw_pretraining_figure(of: SystemComparison) -> "Figure":
    """Points that pretraining added, per task and system."""
    tests = [test for test in of.tests if test.kind == "pretraining"]
    systems = list(dict.fromkeys(test.against for test in tests))
    tasks = [*of.tasks, MEAN]
    figure = _make_figure(7.6, 2.6)
    panel = figure.add_subplot()
    panel.axhline(0, color="#777777", linewidth=0.8)
    labels = list(of.systems)
    width = 0.7 / len(systems)
    for test in tests:
        place = tasks.index(test.task) + (systems.index(test.against) + 0.5) * width - 0.35
        value, low, high = (100 * x for x in test.difference[:3])
        panel.errorbar(
            place, value, yerr=[[value - low], [high - value]], **_style(test.system, labels)
        )
    panel.set_xticks(range(len(tasks)), [task.replace("_", " ") for task in tasks], fontsize=8)
    panel.set_xlim(-0.5, len(tasks) - 0.5)
    panel.set_ylabel("points added to the score", fontsize=8)
    quiet(panel)
    panel.grid(False, axis="x")
    _legend(figure, panel, [f"{name}{PRETRAINED}" for name in systems], labels)
    return figure


def draw_learning_figure(of: SystemComparison) -> "Figure | None":
    """Validation metric over steps where runs kept it, else the training loss; mean over seeds."""
    from pipelines.evaluation.tables import smooth
    from pipelines.runs.progress_log import PROGRESS, read_metric_history

    told = {
        label: [history(run.folder / PROGRESS) for run in runs if (run.folder / PROGRESS).is_file()]
        for label, runs in of.systems.items()
    }
    labels = list(of.systems)
    figure, axes = _make_panels(of.tasks, 2.2)
    drawn = False
    for task, panel in zip(of.tasks, axes, strict=True):
        validation = f"{task}/validation_{of.metrics[task]}"
        kept = any(validation in history for runs in told.values() for history in runs)
        name = validation if kept else f"{task}/loss"
        for label, runs in told.items():
            curve = _mean_curve([history[name] for history in runs if history.get(name)])
            if curve is None:
                continue
            steps, values = curve
            style = _style(label, labels)
            panel.plot(
                steps,
                100 * values if kept else smooth(values),
                color=style["color"],
                linestyle="-" if label.endswith(PRETRAINED) else "--",
                linewidth=1.2,
            )
            drawn = True
        what = f"{words_of(of.metrics[task])}, per cent" if kept else "training loss"
        panel.set_title(task.replace("_", " "), fontsize=9)
        panel.set_ylabel(what, fontsize=8)
        if kept:
            panel.set_ylim(*_widen_limits(panel.get_ylim()))
        quiet(panel)
    for panel in axes[-3:]:
        panel.set_xlabel("step", fontsize=8)
    if not drawn:
        return None
    _legend(figure, axes[0], labels, lines=True)
    return figure


def encode_svg_uri(figure: "Figure") -> str:
    """A figure as an SVG inside a data URI: letters as outlines, nothing from elsewhere."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "skillnet"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata=nothing)
    text = buffer.getvalue()
    body = text[text.index("<svg") :].encode()
    return "data:image/svg+xml;base64," + base64.b64encode(body).decode()


def encode_png_uri(figure: "Figure") -> str:
    """A figure as pixels inside a data URI."""
    return "data:image/png;base64," + base64.b64encode(encode_png(figure)).decode()


def encode_png(figure: "Figure") -> bytes:
    """A figure as pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


# -- parts ---------------------------------------------------------------------------------


def _base_label(label: str) -> str:
    return label.removesuffix(PRETRAINED)


def _style(label: str, labels: Sequence[str]) -> dict[str, Any]:
    bases = list(dict.fromkeys(_base_label(name) for name in labels))
    place = bases.index(_base_label(label)) if _base_label(label) in bases else 0
    colour = COLOURS[place % len(COLOURS)]
    return {
        "fmt": MARKERS[place % len(MARKERS)],
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
    across = min(len(names), 3)
    down = -(-len(names) // across)
    figure = _make_figure(0.6 + 2.7 * across, height * down + 0.3)
    grid = figure.subplots(down, across, squeeze=False, **more)
    panels = list(grid.flat)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    return figure, panels[: len(names)]


def _make_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _title(of: SystemComparison, task: str) -> str:
    if task == MEAN:
        return "mean over tasks"
    metric = of.metrics[task]
    words = "1 − token error" if metric == "token_error_rate" else words_of(metric)
    return f"{task.replace('_', ' ')}, {words}"


def _mean_curve(
    runs: Sequence[Sequence[tuple[int, float]]],
) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean over runs at the steps that all of them have."""
    if not runs:
        return None
    points: list[Mapping[int, float]] = [dict(run) for run in runs]
    steps = sorted(set.intersection(*(set(each) for each in points)))
    if not steps:
        return None
    return np.array(steps), np.array([np.mean([each[s] for each in points]) for s in steps])


def _log_ticks(panel: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    from sweeps.analysis.format import format_count

    low, high = panel.get_xlim()
    if high / low < 20:
        # Powers of ten would leave one tick, or none.
        panel.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        panel.xaxis.set_minor_locator(NullLocator())
    else:
        panel.xaxis.set_major_locator(LogLocator(base=10))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _widen_limits(limits: tuple[float, float], span: float = 2.0) -> tuple[float, float]:
    """Limits of an axis in per cent that do not blow up what is no difference."""
    low, high = limits
    if high - low >= span:
        return limits
    middle = (low + high) / 2
    return middle - span / 2, middle + span / 2
