"""TODO: sweeps.trials.source."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from skillnet_platform.errors import UserError
from skillnet_platform.tracking import Tracker
from sweeps.config.trials import AshaConfig, ResourceConfig, ScoreConfig
from sweeps.trials.trial import Trial, TrialOutcome

#: What Optuna proposed, one configuration a line, so that a resumed sweep goes on with it.
PROPOSALS = "proposed.jsonl"


@dataclass(frozen=True)
class TrialOptions:
    """How trials are run; see :func:`sweeps.trials.engine.run_trials` for each."""

    folder: Path
    parent: Tracker
    score: ScoreConfig | None
    resources: ResourceConfig
    asha: AshaConfig | None
    keep: int | None
    max_failures: int
    label: str
    store: str | None = None


class TrialSource(Protocol):
    """Where trials come from, one after the other.

    Attributes:
        total: how many trials there will be.
        example: a trial like them, for what all have in common.
    """

    total: int
    example: Trial

    def next_trial(self) -> Trial | None:
        """The next trial; none if there is none now."""

    def is_exhausted(self) -> bool:
        """Whether there will be no further trial."""

    def record_outcome(self, outcome: TrialOutcome) -> None:
        """A trial has ended, now or in an earlier part of the sweep."""


class ListedTrials:
    """A source of trials that are known from the start."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.total, self.example = len(trials), trials[0]
        self._waiting = list(trials)

    def next_trial(self) -> Trial | None:
        """The next of the list."""
        return self._waiting.pop(0) if self._waiting else None

    def is_exhausted(self) -> bool:
        """Whether the list is at its end."""
        return not self._waiting

    def record_outcome(self, outcome: TrialOutcome) -> None:
        """Nothing hangs on outcomes."""


def find_first_rung(asha: AshaConfig, trial: Trial) -> int:
    """Return the step at which ASHA first compares a trial with others.

    Args:
        asha: grace period and reduction factor.
        trial: any trial of the sweep.

    Raises:
        UserError: trials are not evaluated during training, or end before the first rung.
    """
    every, steps = trial.config.training.evaluate_every, trial.config.training.steps
    if not 0 < every < steps:
        raise UserError(
            "asha stops trials by their evaluations: set training.evaluate_every between 1 "
            f"and training.steps - 1 ({steps - 1}), not {every}"
        )
    if asha.grace_period > steps:
        raise UserError(
            f"asha.grace_period {asha.grace_period} is more than training.steps {steps}"
        )
    return asha.grace_period or every
