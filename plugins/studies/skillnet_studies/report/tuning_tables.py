"""Tables about the tuning of each system in a study."""

from collections.abc import Collection, Mapping
from statistics import fmean

from skillnet_platform.tables import ReportTable, TableCell
from skillnet_studies.study.tuning import TuningResult, format_settings
from sweeps.config.format import format_duration


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
    rates = [_build_rates_table(tuning)] if any(own.rates for own in tuning.values()) else []
    return [_build_chosen_table(tuning, pretrained), *rates, _build_trials_table(tuning)]


def _build_chosen_table(
    tuning: Mapping[str, TuningResult], pretrained: Collection[str]
) -> ReportTable:
    rows = []
    for label, own in tuning.items():
        # Failed trials have no time.
        seconds = sum(trial["seconds"] or 0.0 for trial in own.trials)
        rows.append(
            [
                TableCell(label),
                TableCell(
                    str(len(own.trials))
                    if own.reuse_tuning_of is None
                    else ", ".join(
                        [f"as {own.reuse_tuning_of}", *([str(len(own.trials))] * bool(own.trials))]
                    )
                ),
                TableCell(_format_score(_average_configured(own))),
                TableCell(_format_score(own.score)),
                TableCell(format_duration(seconds) if own.trials else "–"),
                TableCell(format_settings(own.settings)),
            ]
        )
    tuned = [own for own in tuning.values() if own.reuse_tuning_of is None]
    counts = sorted({len(own.trials) for own in tuned})
    steps = sorted({trial["steps"] for own in tuning.values() for trial in own.trials})
    trials = " or ".join(map(str, counts))
    whose = "Every system"
    if len(tuned) < len(tuning):
        whose += " that takes no settings from another one"
    return ReportTable(
        "Tuning",
        ["system", "trials", "as configured", "chosen", "training", "settings chosen"],
        rows,
        f"{whose} got {trials} trial(s) of {' or '.join(map(str, steps))} steps, at the same "
        "points of one space, with a seed that no final run has. Mean scores on the "
        "validation splits, in percent; only the final runs read the test splits. Chosen: top of "
        "the parabola over the tuned rates, else mean of the best trials."
        + _limits_note(tuning, pretrained),
    )


def _build_rates_table(tuning: Mapping[str, TuningResult]) -> ReportTable:
    rows = [
        [TableCell(label), TableCell(key), TableCell(words)]
        for label, own in tuning.items()
        for key, words in own.rates.items()
    ]
    return ReportTable(
        "Tuned learning rates",
        ["system", "rate", "chosen"],
        rows,
        "The top of a parabola of the validation score over the logarithm of the rate, with its "
        "range of one standard error. Where the parabola has no top between its rates, the best "
        "trial.",
        collapsed=True,
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


def _build_trials_table(tuning: Mapping[str, TuningResult]) -> ReportTable:
    rows = [
        [
            TableCell(label),
            TableCell(str(index)),
            TableCell(trial["status"]),
            TableCell(
                _format_score(trial["score"]), is_best=trial["score"] == own.score is not None
            ),
            TableCell(format_duration(trial["seconds"]) if trial["seconds"] else "–"),
            TableCell(format_settings(trial["settings"])),
        ]
        for label, own in tuning.items()
        for index, trial in enumerate(own.trials)
    ]
    columns = ["system", "trial", "status", "validation score", "training", "settings"]
    return ReportTable("Tuning trials", columns, rows, collapsed=True)


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
