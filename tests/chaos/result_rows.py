"""Rows of the chaos lane: a run each, kept in a CSV to which runs are only added."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.measure import append_csv_rows, read_csv_rows


@dataclass
class Row:
    """One run.

    Args:
        date, machine, load: when, where, and how busy it was.
        launcher: what started the workers: ``ray``, ``ranks`` (:mod:`tests.chaos.ranks`) or
            ``hosts`` (:mod:`tests.chaos.node_runs`).
        seed, run: which; they decide all that follows.
        fault: what happened.
        victim: to whom.
        step: after how many steps.
        exits: exit codes of the commands that it took, in order.
        recovered: "by itself" or "same command".
        lost_steps: steps done again.
        lost_bytes: size of committed checkpoints that could not be used.
        lost_metrics: points that the progress file has and the tracker has not.
        doubled_metrics: points that the tracker has twice without their step being done again.
        recovery_seconds: from the last step before the fault until the run is there again, starts
            of processes and hosts included.
        equal_weights: whether the last checkpoint is that of the undisturbed run, to the bit.
    """

    date: str
    machine: str
    load: float
    launcher: str
    seed: int
    run: int
    fault: str
    victim: str
    step: int
    exits: str = ""
    recovered: str = ""
    lost_steps: int = 0
    lost_bytes: int = 0
    lost_metrics: int = 0
    doubled_metrics: int = 0
    recovery_seconds: float = 0.0
    equal_weights: bool = False


#: Fault -> exit codes of the commands of its run. After other faults the last one is 0.
EXITS = {
    "disk full": "2 0",
    "bit of a shard flipped": "2 0",
    "driver killed": "-9 0",
    "head's host killed": "-9 0",
}
#: Notices of an end: the checkpoint is that of the last step.
NOTICES = ("worker asked to leave", "driver asked to leave", "spot notice")
EXITS |= dict.fromkeys(NOTICES, "143 0")


def is_sound(row: Mapping[str, str]) -> bool:
    """Whether a run of the CSV came through and lost nothing: every metric is there, once.

    A run ends with the exit codes of its fault, and a notice costs no step.
    """
    ends = row["exits"] == EXITS.get(row["fault"], row["exits"])
    ends &= row["exits"].split()[-1:] == ["0"]
    ends &= row["fault"] not in NOTICES or row["lost_steps"] == "0"
    reported = (row["equal_weights"], row["lost_metrics"], row["doubled_metrics"])
    return ends and reported == ("True", "0", "0")


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none if there is none."""
    return read_csv_rows(path)


def append(path: Path, row: Row) -> None:
    """Add a row to a CSV."""
    append_csv_rows(path, [each.name for each in fields(Row)], [asdict(row)])
