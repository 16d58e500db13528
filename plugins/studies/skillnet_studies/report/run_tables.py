"""Tables about the runs of a comparison: costs, sizes, settings, every run, and the tuning.

Called by ``skillnet_studies.report.report``; the tables of scores are those of
:mod:`skillnet_evidence.tables`.
"""

import json
from collections.abc import Collection, Mapping
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from skillnet_evidence.cells import ReportTable, TableCell, make_table
from skillnet_evidence.comparison import MEAN, SystemComparison
from skillnet_evidence.format import format_count, format_duration, format_signed_points
from skillnet_evidence.scores import SPLIT
from skillnet_evidence.tables import build_gap_table, name_column
from skillnet_studies.analysis.finished_runs import (
    FinishedRun,
    find_differing_settings,
    list_finished,
)
from skillnet_studies.study.tuning import TuningResult, format_settings

if TYPE_CHECKING:
    from skillnet.systems import SizeMatch


def build_cost_tables(comparison: SystemComparison) -> list[ReportTable]:
    """Return the tables of costs, of sizes, and of differences after more steps.

    Args:
        comparison: results of finished runs.
    """
    return [
        build_cost_table(comparison),
        build_size_table(comparison),
        build_gap_table(comparison, find_longer_arms(comparison)),
    ]


def build_cost_table(comparison: SystemComparison) -> ReportTable:
    """Return parameters, FLOPs and training time of each system."""
    rows: list[list[TableCell | str]] = []
    pretrained = any(run.pretraining_seconds for run in comparison.runs)
    for label, runs in list_finished(comparison).items():
        cost = comparison.costs[label, MEAN]
        seconds = np.array([run.seconds for run in runs])
        before = [x for run in comparison.systems[label] if (x := run.pretraining_seconds)]
        # The range over runs, since training times depend on the load of the machine.
        ends = (format_duration(float(seconds.min())), format_duration(float(seconds.max())))
        spread = f"{ends[0]} to {ends[1]}" if ends[0] != ends[1] else ""
        speed = np.mean([float(run.trained.get("rows_per_second", 0)) for run in runs])
        row = [label, format_count(runs[0].total_params) if runs[0].total_params else "–"]
        row += [format_count(cost.activated), format_count(cost.flops)]
        time = format_duration(float(np.mean(before))) if before else "–"
        after = [*([time] if pretrained else []), f"{speed:.0f}", str(runs[0].trained["step"])]
        rows.append([*row, TableCell(format_duration(float(seconds.mean())), spread), *after])
    mean = "mean over tasks"
    if comparison.has_unequal_tasks:
        mean = comparison.name_score(MEAN)
    columns = ["system", "parameters, total", f"activated, {mean}"]
    columns += [f"FLOPs per example, {mean}", "training"]
    columns += [*(["pretraining"] if pretrained else []), "rows per second", "steps"]
    return make_table(
        "Cost",
        columns,
        rows,
        "Activated: parameters that one example reads. FLOPs: executed in a forward pass of one "
        "test example, counted alike for every system; one multiply-add counts as two. Training: "
        "time in the loop per run, without evaluation; for resumed runs and pretrainings the total "
        "time, estimated at the rate of the last part.",
    )


def build_size_table(comparison: SystemComparison) -> ReportTable:
    """Return the aimed and the reached size of each baseline; no row without baselines.

    Args:
        comparison: results of finished runs.
    """
    known = {k: _measure_size(runs[0]) for k, runs in list_finished(comparison).items()}
    sizes = {label: size for label, size in known.items() if size is not None}
    names = ", ".join(label for label, size in sizes.items() if size.is_mismatch)
    rows: list[list[TableCell | str]] = []
    for label, size in sizes.items():
        row = [label, size.quantity, format_count(size.aimed), format_count(size.reached)]
        off = f"{format_signed_points(size.deviation)} %"
        rows.append([*row, TableCell(off, "mismatch" if size.is_mismatch else "")])
    return make_table(
        "Sizes of baselines",
        ["system", "matched", "SkillNet", "system's layers", "difference"],
        rows,
        "Transformer layers, on average over the tasks that the runs train and evaluate. "
        "Operations are those of a token."
        + (f" Not the size of SkillNet, by more than 5 %: {names}." if names else ""),
        collapsed=not names,
    )


def _measure_size(run: FinishedRun) -> "SizeMatch | None":
    """Return the sizes of a run's system; None if it is not matched or not installed here."""
    from pipelines.training.config.run import FinetuneConfig
    from pipelines.training.loop.run_evaluation import measure_baseline_size
    from skillnet_platform import config as configuration

    try:
        config = configuration.build_config(FinetuneConfig, dict(run.settings))
        return measure_baseline_size(config.joint())
    # A report does not fail because of a system of a third party, or a checkpoint that is gone.
    except (ValueError, OSError):
        return None


def find_longer_arms(comparison: SystemComparison) -> dict[str, str]:
    """Return label -> label of the system with equal settings and more steps.

    Args:
        comparison: results of finished runs.
    """
    groups: dict[str, list[tuple[int, str]]] = {}
    for label, runs in list_finished(comparison).items():
        settings = runs[0].settings
        training = {k: v for k, v in (settings.get("training") or {}).items() if k != "steps"}
        kept = [settings.get(key) for key in ("system", "options", "model", "tasks")]
        own = [*kept, training, bool(settings.get("init_from"))]
        key = json.dumps(own, sort_keys=True, default=str)
        groups.setdefault(key, []).append((int(runs[0].trained["step"]), label))
    ordered = [sorted(members) for members in groups.values()]
    return {members[0][1]: members[-1][1] for members in ordered if members[0][0] < members[-1][0]}


def build_seed_table(comparison: SystemComparison) -> ReportTable:
    """Return the primary metric of every run."""
    rows = []
    for run in comparison.runs:
        row = [run.label, *([str(run.fold.number)] if comparison.has_folds else []), str(run.seed)]
        for task in comparison.tasks:
            known = run.outcomes.get((task, SPLIT))
            score = known and 100 * comparison.metrics[task].score(known.value)
            row.append("–" if score is None else f"{score:.1f}")
        rows.append([*row, format_duration(run.seconds), run.source.folder.name])
    columns = ["system", "fold", "seed"] if comparison.has_folds else ["system", "seed"]
    columns += [name_column(comparison, task) for task in comparison.tasks]
    caption = "Scores in percent, higher is better."
    return make_table("Every run", [*columns, "training", "run"], rows, caption)


def build_settings_table(comparison: SystemComparison) -> ReportTable:
    """Return the settings in which the systems differ, which must explain a fair comparison."""
    # The first run represents its system: runs of one label differ only in the seed.
    first = [runs[0] for runs in list_finished(comparison).values()]
    rows = [
        [key, *(values[label] for label in comparison.systems)]
        for key, values in find_differing_settings(first).items()
    ]
    pretrained = [run for run in first if run.settings.get("init_from")]
    unknown = [run.label for run in pretrained if not run.pretraining]
    note = ""
    if len(pretrained) - len(unknown) > 1:
        note = (
            " The same holds for the pretrainings, which have the system and the sizes of their "
            "runs."
        )
    if unknown:
        note += f" The pretraining settings of {', '.join(unknown)} are unknown."
    return make_table(
        "Settings in which the systems differ",
        ["setting", *comparison.systems],
        rows,
        "All other settings of the runs' resolved configurations are equal: data, steps, batches, "
        f"schedule, augmentation.{note}",
    )


# -- tuning --------------------------------------------------------------------------------


def build_tuning_tables(
    tuning: Mapping[str, TuningResult], pretrained: Collection[str] = ()
) -> list[ReportTable]:
    """Return the chosen settings of each system, and all trials; empty without tuning.

    Args:
        tuning: label -> tuning result.
        pretrained: labels of systems whose runs start from a pretraining.
    """
    if not any(result.trials for result in tuning.values()):
        return []
    rates = make_table(
        "Tuned learning rates",
        ["system", "rate", "chosen"],
        [[label, *rate] for label, own in tuning.items() for rate in own.rates.items()],
        "The top of a parabola of the validation score over the logarithm of the rate, with its "
        "range of one standard error. Where the parabola has no top between its rates, the best "
        "trial.",
    )
    trials = [
        [
            *(label, str(index), trial["status"]),
            TableCell(
                _format_score(trial["score"]), is_best=trial["score"] == own.score is not None
            ),
            format_duration(trial["seconds"]) if trial["seconds"] else "–",
            format_settings(trial["settings"]),
        ]
        for label, own in tuning.items()
        for index, trial in enumerate(own.trials)
    ]
    columns = ["system", "trial", "status", "validation score", "training", "settings"]
    tables = [_build_chosen_table(tuning, pretrained), *([rates] if rates.rows else [])]
    return [*tables, make_table("Tuning trials", columns, trials)]


def _build_chosen_table(
    tuning: Mapping[str, TuningResult], pretrained: Collection[str]
) -> ReportTable:
    rows = []
    for label, own in tuning.items():
        # Failed trials have no time.
        seconds = sum(trial["seconds"] or 0.0 for trial in own.trials)
        count = str(len(own.trials))
        if own.reuse_tuning_of is not None:
            count = f"as {own.reuse_tuning_of}" + (f", {count}" if own.trials else "")
        row = [label, count, _format_score(_average_configured(own)), _format_score(own.score)]
        time = format_duration(seconds) if own.trials else "–"
        rows.append([*row, time, format_settings(own.settings)])
    tuned = [own for own in tuning.values() if own.reuse_tuning_of is None]
    trials = " or ".join(map(str, sorted({len(own.trials) for own in tuned})))
    steps = sorted({trial["steps"] for own in tuning.values() for trial in own.trials})
    some = " that takes no settings from another one" if len(tuned) < len(tuning) else ""
    return make_table(
        "Tuning",
        ["system", "trials", "as configured", "chosen", "training", "settings chosen"],
        rows,
        f"Every system{some} got {trials} trial(s) of {' or '.join(map(str, steps))} steps, at the "
        "same points of one space, with a seed that no final run has. Mean scores on the "
        "validation splits, in percent; only the final runs read the test splits. Chosen: top of "
        "the parabola over the tuned rates, else mean of the best trials."
        + _limits_note(tuning, pretrained),
        collapsed=False,
    )


def _limits_note(tuning: Mapping[str, TuningResult], pretrained: Collection[str]) -> str:
    """Return a note on differences that remain with equal numbers of trials."""
    keys = {key for own in tuning.values() for trial in own.trials for key in trial["settings"]}
    notes = [
        f" Tuned: {', '.join(sorted(keys))}. All other settings are equal for all systems and were "
        "not tuned here; a system for which they were chosen earlier has an advantage."
    ]
    # These notes name advantages that equal numbers of trials do not remove.
    borrowed = [own for own in tuning.values() if own.reuse_tuning_of is not None]
    if borrowed:
        pairs = ", ".join(f"{own.label} uses {own.reuse_tuning_of}" for own in borrowed)
        notes.append(f"Settings tuned for another system: {pairs}.")
    if any(
        o.label in pretrained and o.reuse_tuning_of not in (None, *pretrained) for o in borrowed
    ):
        notes.append("These settings were tuned without the pretraining, except for own trials.")
    untuned = [
        label
        for label in pretrained
        if label in tuning and "pretraining.training.lr" not in tuning[label].settings
    ]
    if untuned:
        names = ", ".join(untuned)
        notes.append(f"The pretraining of {names}, and its learning rate, has no tuning.")
    elif pretrained:
        notes.append("Of the pretraining only the learning rate was tuned.")
    return " ".join(notes)


def _average_configured(own: TuningResult) -> float | None:
    """Return the mean score of the run as configured, over the seeds; None without such trials."""
    # The first trial over the space is always the run as configured.
    if not own.trials or own.trials[0]["stage"] != "space":
        return None
    first = own.trials[0]["settings"]
    trials = [t for t in own.trials if t["stage"] == "space" and t["settings"] == first]
    scores = [trial["score"] for trial in trials if trial["score"] is not None]
    return fmean(scores) if scores else None


def _format_score(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
