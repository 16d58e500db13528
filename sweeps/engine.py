"""The engine of sweeps and studies: trials through Ray Tune, recorded, resumable.

The ledger is the trials' folders (docs/decisions/0030): a trial with an outcome is not run
again, an unfinished one goes on from its newest whole checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from skillnet_platform.tracking import Tracker
from sweeps.trial import ScoreConfig, Trial, TrialOutcome


@dataclass
class ResourceConfig:
    """What one trial takes.

    Args:
        cpus: CPUs of a trial, or of each of its workers where training.workers is above 1; may
            be a fraction.
        gpus: the same for GPUs. Set run.training.use_gpu along with it.
        parallel: trials at the same time; 0 as many as fit.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    parallel: int = 0


@dataclass
class AshaConfig:
    """Asynchronous successive halving (Li et al. 2020): bad trials are stopped early.

    Args:
        grace: steps before a trial may be stopped; 0 until its first evaluation.
        reduction: of so many trials that reach a rung, one goes on; rungs lie apart by this factor.
    """

    grace: int = 0
    reduction: float = 3.0


class Source(Protocol):
    """Where trials come from, one after the other."""

    total: int

    def next(self) -> Trial | None:
        """The next trial; none if there is none now."""

    def ended(self) -> bool:
        """Whether there will be no further trial."""

    def tell(self, outcome: TrialOutcome) -> None:
        """A trial has ended, now or in an earlier part of the sweep."""


def run_trials(
    trials: Sequence[Trial] | Source,
    *,
    folder: Path,
    parent: Tracker,
    score: ScoreConfig | None = None,
    resources: ResourceConfig | None = None,
    asha: AshaConfig | None = None,
    keep: int | None = None,
    max_failures: int = 1,
    label: str = "trials",
) -> list[TrialOutcome]:
    """Run trials through Ray Tune, and come back with what became of each.

    Pretrainings that trials name are run first, each once. Every trial is a run nested in
    ``parent``, which this process opens and ends: none is left RUNNING, also after an error or
    an interrupt. A trial that fails does not end the others.

    Args:
        trials: a list, or a source that makes them one after the other. Names must differ.
        folder: of all trials; called again with the same one, it goes on.
        parent: the open MLflow run of the sweep or study.
        score: how evaluations are scored; needed by ``asha``.
        resources: of one trial.
        asha: stop bad trials early; none lets all run to their end.
        keep: number of groups, best first by mean score, whose models and checkpoints stay on
            disk; none keeps all models. Small result files always stay.
        max_failures: times that a trial whose process died is started again.
        label: of the progress line.

    Returns:
        Outcomes in the order of the trials.

    Raises:
        UserError: trials that do not fit their corpora, the machine, or what was run before
            under their names; before anything starts.
        KeyboardInterrupt: after an orderly stop, on the first Ctrl-C or SIGTERM.
    """
    raise NotImplementedError("being written")
