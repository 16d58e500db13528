"""How each system of a study was tuned, as tables: the number of trials is part of the result."""

from collections.abc import Mapping

from sweeps.study import Tuned, settings_text
from sweeps.tables import Cell, Table, duration


def tuning_tables(tuned: Mapping[str, Tuned]) -> list[Table]:
    """What each system got, and every trial; nothing without tuning."""
    tried = [own for own in tuned.values() if own.trials]
    if not tried:
        return []
    return [_chosen(tuned), _trials(tuned)]


def _chosen(tuned: Mapping[str, Tuned]) -> Table:
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
        "the validation splits, per cent; the test splits were read by the final runs alone.",
    )


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
