"""Steps and rows of each task of a run, and which of them changed no weight.

:mod:`pipelines.training.loop.task_health` counts them, ``trained.json`` and ``state.json`` store
them, and registration reads them: a model with an untrained task must not be registered.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TaskCounts:
    """Counts of one task over all ranks.

    Args:
        steps: steps taken.
        nonfinite_steps: steps without an update, because the gradient was not finite.
        consecutive: how many of the newest steps made no update.
        rows: rows read.
        unalignable_rows: rows whose CTC loss is zero, because the audio has too few tokens.
        is_inherited: all weights of the task came from a model in which it is trained.
    """

    steps: int = 0
    nonfinite_steps: int = 0
    consecutive: int = 0
    rows: int = 0
    unalignable_rows: int = 0
    is_inherited: bool = False

    @property
    def untrained_reason(self) -> str | None:
        """Why no step can have changed a weight; None if one can, or if there was no step."""
        if not self.steps:
            return None
        if self.nonfinite_steps == self.steps:
            return f"none of its {self.steps} steps had a finite gradient"
        if self.unalignable_rows == self.rows:
            return f"none of its {self.rows} rows has enough audio for its transcript"
        return None

    @property
    def problems(self) -> str:
        """Counts that are not zero, as a text; "" without any."""
        parts = []
        if self.nonfinite_steps:
            parts.append(f"{self.nonfinite_steps} of {self.steps} steps skipped")
        if self.unalignable_rows:
            parts.append(f"{self.unalignable_rows} of {self.rows} rows too short for CTC")
        return ", ".join(parts)


def parse_task_counts(tree: Any) -> dict[str, TaskCounts]:
    """Return task -> counts from a stored document.

    Args:
        tree: task -> counts as plain values.

    Raises:
        ValueError: the document has another form.
    """
    known = {name: type(value) for name, value in asdict(TaskCounts()).items()}
    is_valid = isinstance(tree, dict) and all(
        isinstance(entry, dict)
        and entry.keys() == known.keys()
        and all(type(value) is known[key] and value >= 0 for key, value in entry.items())
        for entry in tree.values()
    )
    if not is_valid:
        raise ValueError("the counts of its tasks are damaged")
    return {name: TaskCounts(**entry) for name, entry in tree.items()}


def find_untrained_tasks(counts: Mapping[str, TaskCounts]) -> dict[str, str]:
    """Return task -> reason for the tasks whose weights are random: no step changed them."""
    total = sum(each.steps for each in counts.values())
    idle = f"it took none of the {total} steps of its run"
    reasons = {
        name: each.untrained_reason if each.steps or each.is_inherited else idle
        for name, each in counts.items()
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}
