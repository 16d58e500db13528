"""How each system of a study was tuned, as tables: the number of trials is part of the result."""

from collections.abc import Collection, Mapping

from sweeps.analysis.format import format_duration
from sweeps.report.tables import ReportTable, TableCell
from sweeps.study.study import TuningResult, format_settings


def build_tuning_tables(
    tuned: Mapping[str, TuningResult], pretrained: Collection[str] = ()
) -> list[ReportTable]:
    """What each system got, and every trial; nothing without tuning.

    Args:
        tuned: label -> what it got.
        pretrained: labels of those whose runs start from a pretraining.
    """
    tried = [own for own in tuned.values() if own.trials]
    if not tried:
        return []
    return [_build_chosen_table(tuned, pretrained), _build_trials_table(tuned)]


def _build_chosen_table(
    tuned: Mapping[str, TuningResult], pretrained: Collection[str]
) -> ReportTable:
    rows = []
    for label, own in tuned.items():
        seconds = sum(trial["seconds"] or 0.0 for trial in own.trials)
        first = own.trials[0]["score"] if own.trials else None
        rows.append(
            [
                TableCell(label),
                TableCell(
                    str(len(own.trials))
                    if own.reuse_tuning_of is None
                    else f"as {own.reuse_tuning_of}"
                ),
                TableCell(_format_score(first)),
                TableCell(_format_score(own.score)),
                TableCell(format_duration(seconds) if own.trials else "–"),
                TableCell(format_settings(own.settings)),
            ]
        )
    counts = sorted({len(own.trials) for own in tuned.values() if own.reuse_tuning_of is None})
    steps = sorted({trial["steps"] for own in tuned.values() for trial in own.trials})
    told = " or ".join(map(str, counts))
    return ReportTable(
        "Tuning",
        ["system", "trials", "as configured", "chosen", "training", "settings chosen"],
        rows,
        f"Every system got {told} trial(s) of {' or '.join(map(str, steps))} steps, at the same "
        "points of one space, with one seed that no final run has. Chosen by the mean score on "
        "the validation splits, per cent; the test splits were read by the final runs alone."
        + _limits_note(tuned, pretrained),
    )


def _limits_note(tuned: Mapping[str, TuningResult], pretrained: Collection[str]) -> str:
    """What equal numbers of trials do not make equal."""
    keys = {key for own in tuned.values() for trial in own.trials for key in trial["settings"]}
    said = [
        f" Tuned: {', '.join(sorted(keys))}. All else was given to every system alike and tuned "
        "for none here; if it was found on one of them, that one has the advantage."
    ]
    borrowed = [own for own in tuned.values() if own.reuse_tuning_of is not None]
    if borrowed:
        told = ", ".join(f"{own.label} those of {own.reuse_tuning_of}" for own in borrowed)
        said.append(f"Without trials of their own: {told}.")
    if any(
        o.label in pretrained and o.reuse_tuning_of not in (None, *pretrained) for o in borrowed
    ):
        said.append("These were tuned without the pretraining that they are used with.")
    if pretrained:
        said.append("The settings of pretraining, its learning rate too, were tuned for nobody.")
    return " ".join(said)


def _build_trials_table(tuned: Mapping[str, TuningResult]) -> ReportTable:
    rows = [
        [
            TableCell(label),
            TableCell(str(place)),
            TableCell(trial["status"]),
            TableCell(
                _format_score(trial["score"]), is_best=trial["score"] == own.score is not None
            ),
            TableCell(format_duration(trial["seconds"]) if trial["seconds"] else "–"),
            TableCell(format_settings(trial["settings"])),
        ]
        for label, own in tuned.items()
        for place, trial in enumerate(own.trials)
    ]
    columns = ["system", "trial", "ended", "validation score", "training", "settings"]
    return ReportTable("Tuning trials", columns, rows, collapsed=True)


def _format_score(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
