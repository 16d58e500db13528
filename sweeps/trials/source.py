"""Sources of trials, and the options that all trials share.

A source supplies trials one by one to :class:`sweeps.trials.driver.TrialDriver`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from skillnet_platform.errors import UserError
from skillnet_platform.tracking import Tracker
from sweeps.config.trials import AshaConfig, ResourceConfig, ScoreConfig
from sweeps.trials.trial import Trial, TrialOutcome

#: Log of Optuna's proposals, one point per line, from which a sweep is resumed.
PROPOSALS = "proposed.jsonl"


@dataclass(frozen=True)
class TrialOptions:
    """Options of a set of trials; see :func:`sweeps.trials.engine.run_trials` for each."""

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
    """A source that supplies trials one by one.

    Attributes:
        total: number of trials.
        example: a trial whose common settings hold for all.
    """

    total: int
    example: Trial

    def next_trial(self) -> Trial | None:
        """Return the next trial; None if none is available now."""

    def is_exhausted(self) -> bool:
        """Return whether no further trial will come."""

    def record_outcome(self, outcome: TrialOutcome) -> None:
        """Receive the outcome of a trial that ended, now or in an earlier part of the sweep."""

    def count_repeats(self, group: str) -> int:
        """Return the number of trials of a configuration, which differ in their seeds."""


class ListedTrials:
    """A source of trials that are known from the start.

    Args:
        trials: all of them.
        on_outcome: called with the outcome of each trial that ended.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        on_outcome: Callable[[TrialOutcome], None] | None = None,
    ) -> None:
        self.total, self.example = len(trials), trials[0]
        self._waiting, self._on_outcome = list(trials), on_outcome
        self._repeats = Counter(trial.group or trial.name for trial in trials)

    def next_trial(self) -> Trial | None:
        """Return the next trial of the list."""
        return self._waiting.pop(0) if self._waiting else None

    def is_exhausted(self) -> bool:
        """Return whether the list is at its end."""
        return not self._waiting

    def record_outcome(self, outcome: TrialOutcome) -> None:
        """Pass the outcome on; later trials do not depend on it."""
        if self._on_outcome is not None:
            self._on_outcome(outcome)

    def count_repeats(self, group: str) -> int:
        """Return the number of trials of a configuration, which differ in their seeds."""
        return self._repeats[group]


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
    # Without a grace period the first evaluation is the first rung.
    return asha.grace_period or every
