"""How each system of a study was tuned, as tables: the number of trials is part of the result."""

from collections.abc import Collection, Mapping

from sweeps.analysis.format import duration
from sweeps.report.tables import Cell, Table
from sweeps.study.study import Tuned, settings_text


def tuning_tables(tuned: Mapping[str, Tuned], pretrained: Collection[str] = ()) -> list[Table]:
    """What each system got, and every trial; nothing without tuning.

    Args:
        tuned: label -> what it got.
        pretrained: labels of those whose runs start from a pretraining.
    """
    tried = [own for own in tuned.values() if own.trials]
    if not tried:
        return []
    return [_chosen(tuned, pretrained), _trials(tuned)]


def _chosen(tuned: Mapping[str, Tuned], pretrained: Collection[str]) -> Table:
    rows = []
    for label, own in tuned.items():
        seconds = sum(trial["seconds"] or 0.0 for trial in own.trials)
        first = own.trials[0]["score"] if own.trials else None
        rows.append(
            [
                Cell(label),
                Cell(str(len(own.trials)) if own.tuned_as is None else f"as {own.tuned_as}"),
                Cell(_score(first)),
                Cell(_score(own.score)),
                Cell(duration(seconds) if own.trials else "–"),
                Cell(settings_text(own.settings)),
            ]
        )
    counts = sorted({len(own.trials) for own in tuned.values() if own.tuned_as is None})
    steps = sorted({trial["steps"] for own in tuned.values() for trial in own.trials})
    told = " or ".join(map(str, counts))
    return Table(
        "Tuning",
        ["system", "trials", "as configured", "chosen", "training", "settings chosen"],
        rows,
        f"Every system got {told} trial(s) of {' or '.join(map(str, steps))} steps, at the same "
        "points of one space, with one seed that no final run has. Chosen by the mean score on "
        "the validation splits, per cent; the test splits were read by the final runs alone."
        + _untuned(tuned, pretrained),
    )


def _untuned(tuned: Mapping[str, Tuned], pretrained: Collection[str]) -> str:
    """What equal numbers of trials do not make equal."""
    keys = {key for own in tuned.values() for trial in own.trials for key in trial["settings"]}
    said = [
        f" Tuned: {', '.join(sorted(keys))}. All else was given to every system alike and tuned "
        "for none here; if it was found on one of them, that one has the advantage."
    ]
    borrowed = [own for own in tuned.values() if own.tuned_as is not None]
    if borrowed:
        told = ", ".join(f"{own.label} those of {own.tuned_as}" for own in borrowed)
        said.append(f"Without trials of their own: {told}.")
    if any(o.label in pretrained and o.tuned_as not in (None, *pretrained) for o in borrowed):
        said.append("These were tuned without the pretraining that they are used with.")
    if pretrained:
        said.append("The settings of pretraining, its learning rate too, were tuned for nobody.")
    return " ".join(said)


def _trials(tuned: Mapping[str, Tuned]) -> Table:
    rows = [
        [
            Cell(label),
            Cell(str(place)),
            Cell(trial["status"]),
            Cell(_score(trial["score"]), best=trial["score"] == own.score is not None),
            Cell(duration(trial["seconds"]) if trial["seconds"] else "–"),
            Cell(settings_text(trial["settings"])),
        ]
        for label, own in tuned.items()
        for place, trial in enumerate(own.trials)
    ]
    columns = ["system", "trial", "ended", "validation score", "training", "settings"]
    return Table("Tuning trials", columns, rows, aside=True)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
