"""Rank the configurations of a sweep, as a table, a CSV file and a figure.

:func:`rank_configurations` is called by ``skillnet sweep``.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from skillnet_evidence.effects import ScoredTrial
from skillnet_evidence.format import format_setting
from skillnet_platform.tables import write_csv
from sweeps.trials.ledger import compute_mean_scores, outcome_to_dict
from sweeps.trials.trial import TrialOutcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: Configurations whose settings the figure names.
NAMED = 12
#: Statuses that are counted; an interrupted trial has no outcome yet.
STATUSES = ("finished", "stopped", "failed")


@dataclass
class RankedConfiguration:
    """One configuration with the summary of its repeats.

    Args:
        rank: from 1, by mean score. Configurations that were stopped early follow those that
            finished; those without a score are last.
        name: name of the configuration.
        settings: settings that distinguish it.
        score: mean score over repeats; None if all failed.
        score_std: standard deviation over repeats; None for fewer than two.
        scores: task -> mean score.
        status_counts: status -> number of trials.
        activated_params: mean over tasks.
        flops_per_example: mean over tasks.
        step: largest step of its trials.
        trials: names of its trials.
    """

    rank: int
    name: str
    settings: dict[str, Any]
    score: float | None
    score_std: float | None
    scores: dict[str, float]
    status_counts: dict[str, int]
    activated_params: float | None
    flops_per_example: float | None
    step: int
    trials: list[str] = field(default_factory=list)

    @property
    def status_text(self) -> str:
        """Number of trials by status: ``3 finished``, ``1 finished, 2 stopped``."""
        counts = self.status_counts.items()
        return ", ".join(f"{count} {status}" for status, count in counts if count)


def rank_configurations(outcomes: Sequence[TrialOutcome]) -> list[RankedConfiguration]:
    """Return the configurations of trials, best first."""
    groups: dict[str, list[TrialOutcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.group, []).append(outcome)
    order = [*compute_mean_scores(outcomes)]
    # Groups without any score are last.
    order += [name for name in groups if name not in order]
    return [_summarize_group(rank, name, groups[name]) for rank, name in enumerate(order, 1)]


def list_scored_trials(outcomes: Sequence[TrialOutcome]) -> list[ScoredTrial]:
    """Return the finished trials with a score. Stopped ones have a score of fewer steps.

    Args:
        outcomes: outcomes of all trials.
    """
    return [
        ScoredTrial(each.group, each.seed, each.settings, float(each.score))
        for each in outcomes
        if each.status == "finished" and each.score is not None
    ]


def _summarize_group(rank: int, name: str, members: list[TrialOutcome]) -> RankedConfiguration:
    scored = [each for each in members if each.score is not None]
    values = [float(each.score) for each in scored if each.score is not None]
    # All repeats of a configuration are evaluated on the same tasks.
    tasks = scored[0].reports[-1]["scores"] if scored else {}
    return RankedConfiguration(
        rank=rank,
        name=name,
        settings=members[0].settings,
        score=fmean(values) if values else None,
        # One repeat has no deviation; 0 would look like certainty.
        score_std=stdev(values) if len(values) > 1 else None,
        scores={task: fmean(e.reports[-1]["scores"][task] for e in scored) for task in tasks},
        status_counts={
            status: sum(each.status == status for each in members) for status in STATUSES
        },
        activated_params=_mean_cost(scored, "activated_params"),
        flops_per_example=_mean_cost(scored, "flops_per_example"),
        step=max(each.step for each in members),
        trials=[each.name for each in members],
    )


def _mean_cost(members: Sequence[TrialOutcome], key: str) -> float | None:
    values = [e.reports[-1][key] for e in members if e.reports[-1].get(key) is not None]
    return fmean(values) if values else None


def build_ranking_table(
    configurations: Sequence[RankedConfiguration],
) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and cells of the ranking: settings, scores, costs, status."""
    keys = list(dict.fromkeys(key for each in configurations for key in each.settings))
    tasks = list(dict.fromkeys(task for each in configurations for task in each.scores))
    short = shorten_keys(keys)
    columns = ["", "name", *(short[key] for key in keys), "score", *tasks]
    columns += ["activated M", "MFLOP", "steps", "trials"]
    cells = []
    for each in configurations:
        spread = f" ±{each.score_std:.4f}" if each.score_std is not None else ""
        score = f"{each.score:.4f}{spread}" if each.score is not None else None
        cells.append(
            [
                each.rank,
                each.name,
                *(
                    format_setting(each.settings[key]) if key in each.settings else None
                    for key in keys
                ),
                score,
                *(each.scores.get(task, math.nan) for task in tasks),
                _in_millions(each.activated_params),
                _in_millions(each.flops_per_example),
                each.step,
                each.status_text,
            ]
        )
    return columns, cells


def _in_millions(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def shorten_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return the shortest distinct suffix of each dotted key."""
    names = {}
    for key in keys:
        parts = key.split(".")
        # Tables are narrow: the shortest suffix that is still unique identifies a setting.
        for count in range(1, len(parts) + 1):
            end = ".".join(parts[-count:])
            if sum(other == end or other.endswith(f".{end}") for other in keys) == 1:
                break
        names[key] = end
    return names


def write_trials_csv(outcomes: Sequence[TrialOutcome], path: Path) -> None:
    """Write one row per trial: settings, scores, costs, status.

    Args:
        outcomes: outcomes of all trials.
        path: CSV file.
    """
    rows = []
    for outcome in outcomes:
        values = outcome_to_dict(outcome)
        settings, scores = values.pop("settings"), values.pop("scores")
        rows.append(
            {"name": values.pop("name"), "group": values.pop("group"), "seed": values.pop("seed")}
            | {key: format_setting(value) for key, value in settings.items()}
            | {"status": values.pop("status"), "score": values.pop("score")}
            | {f"score/{task}": value for task, value in scores.items()}
            | values
        )
    write_csv(path, rows, digits="")


def draw_ranking_figure(configurations: Sequence[RankedConfiguration]) -> "Figure | None":
    """Draw the score against activated FLOPs and parameters; None for fewer than two points.

    Points have the rank of their configuration. A list beside the panels names its settings.
    """
    from matplotlib.figure import Figure

    points = [e for e in configurations if e.score is not None and e.flops_per_example]
    # One point shows no trade-off between score and cost.
    if len(points) < 2:
        return None
    figure = Figure(figsize=(12.0, 4.2), layout="constrained", facecolor="white")
    axes: Any = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    # Listed panels share the scores; the third one holds the names only.
    axes[1].sharey(axes[0])
    panels = (
        ("flops_per_example", "activated MFLOP per example"),
        ("activated_params", "activated parameters, millions"),
    )
    for panel, (key, label) in zip(axes, panels, strict=False):
        _draw_cost_points(panel, points, key)
        panel.set_xlabel(label, fontsize=9)
    axes[0].set_ylabel("mean validation score", fontsize=9)
    _list_settings(axes[2], points)
    if any(each.status_counts["stopped"] for each in points):
        figure.suptitle("× was stopped early, so its score is from fewer steps", fontsize=8)
    return figure


def describe_settings(configuration: RankedConfiguration, short: dict[str, str]) -> str:
    """Return the settings of a configuration in one line: ``lr 0.001, skill_every 2``.

    Args:
        configuration: one of a sweep.
        short: key -> short name.
    """
    parts = [
        f"{short[key]} {format_setting(value)}" for key, value in configuration.settings.items()
    ]
    return ", ".join(parts) or configuration.name


def _draw_cost_points(panel: Any, points: Sequence[RankedConfiguration], key: str) -> None:
    from skillnet_evidence.plot_kit import COLORS, style_axes

    costs = [getattr(each, key) / 1e6 for each in points]
    for each, cost in zip(points, costs, strict=True):
        # Scores after fewer steps must not look equal to final ones.
        is_complete = each.status_counts["stopped"] == 0
        panel.errorbar(
            cost,
            each.score,
            yerr=each.score_std or 0.0,
            fmt="o" if is_complete else "x",
            color=COLORS[0] if is_complete else "#777777",
            markersize=6,
            elinewidth=1,
        )
        position = (cost, each.score)
        panel.annotate(str(each.rank), position, (5, 4), textcoords="offset points", fontsize=9)
    # Equal costs up to rounding must not fill the whole axis.
    if max(costs) < 1.05 * min(costs):
        panel.set_xlim(0.9 * min(costs), 1.1 * max(costs))
    style_axes(panel)


def _list_settings(panel: Any, points: Sequence[RankedConfiguration]) -> None:
    """Write rank and settings of the best configurations into an empty panel."""
    panel.set_axis_off()
    short = shorten_keys(list(dict.fromkeys(key for each in points for key in each.settings)))
    lines = []
    for each in points[:NAMED]:
        words = textwrap.wrap(describe_settings(each, short), 46) or [""]
        lines += [f"{each.rank:>3}  {words[0]}", *(f"     {word}" for word in words[1:])]
    if len(points) > NAMED:
        lines.append(f"     and {len(points) - NAMED} more: see trials.csv")
    panel.text(
        *(0.0, 1.0, "\n".join(lines)), transform=panel.transAxes, va="top", fontsize=8.5,
        family="monospace", parse_math=False,
    )  # fmt: skip
