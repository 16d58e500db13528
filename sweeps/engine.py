"""The engine of sweeps and studies: trials through Ray Tune, recorded, resumable.

The ledger is the trials' folders (docs/decisions/0013): a trial with an outcome is not run
again, an unfinished one goes on from its newest whole checkpoint.
"""

import contextlib
import fcntl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from skillnet_platform.errors import UserError
from skillnet_platform.tracking import Tracker
from sweeps.trial import ScoreConfig, Trial, TrialOutcome, placed


@dataclass
class ResourceConfig:
    """What one trial takes.

    Args:
        cpus: CPUs of a trial, or of each of its workers where training.workers is above 1; may
            be a fraction.
        gpus: the same for GPUs, along with training.use_gpu: one without the other is refused.
        parallel: trials at the same time; 0 as many as fit.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    parallel: int = 0

    def __post_init__(self) -> None:
        if self.cpus <= 0:
            raise UserError(f"resources.cpus must be above 0, got {self.cpus}")
        if self.gpus < 0:
            raise UserError(f"resources.gpus must not be negative, got {self.gpus}")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise UserError(f"resources.gpus above 1 must be whole, got {self.gpus}")
        if self.parallel < 0:
            raise UserError(f"resources.parallel must not be negative, got {self.parallel}")

    def check(self, use_gpu: bool) -> None:
        """Refuse a GPU that is kept and not used, and one that is wanted and not given.

        Raises:
            UserError: says which of the two settings to change.
        """
        if self.gpus and not use_gpu:
            raise UserError(
                f"resources.gpus is {self.gpus:g}, but training.use_gpu is false: it would keep "
                "GPUs and train on CPUs; set training.use_gpu true, or resources.gpus 0"
            )
        if use_gpu and not self.gpus:
            raise UserError(
                "training.use_gpu is true, but resources.gpus is 0: it would be given no GPU; set "
                "resources.gpus (0.25 lets four trials share one), or training.use_gpu false"
            )


@dataclass
class AshaConfig:
    """Asynchronous successive halving (Li et al. 2020): bad trials are stopped early.

    Args:
        grace: steps before a trial may be stopped; 0 until its first evaluation.
        reduction: of so many trials that reach a rung, one goes on; rungs lie apart by this factor.
    """

    grace: int = 0
    reduction: float = 3.0

    def __post_init__(self) -> None:
        if self.grace < 0:
            raise UserError(f"asha.grace must not be negative, got {self.grace}")
        if self.reduction <= 1:
            raise UserError(f"asha.reduction must be above 1, got {self.reduction}")

    def first_rung(self, trial: Trial) -> int:
        """The step at which trials are first compared.

        Raises:
            UserError: trials are not evaluated while they train, or end before it.
        """
        every, steps = trial.config.training.evaluate_every, trial.config.training.steps
        if not 0 < every < steps:
            raise UserError(
                "asha stops trials by their evaluations: set training.evaluate_every between 1 "
                f"and training.steps - 1 ({steps - 1}), not {every}"
            )
        if self.grace > steps:
            raise UserError(f"asha.grace {self.grace} is more than training.steps {steps}")
        return self.grace or every


class Source(Protocol):
    """Where trials come from, one after the other.

    Attributes:
        total: how many trials there will be.
        example: a trial like them, for what all have in common.
    """

    total: int
    example: Trial

    def next(self) -> Trial | None:
        """The next trial; none if there is none now."""

    def ended(self) -> bool:
        """Whether there will be no further trial."""

    def tell(self, outcome: TrialOutcome) -> None:
        """A trial has ended, now or in an earlier part of the sweep."""


class Listed:
    """A source of trials that are known from the start."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.total, self.example = len(trials), trials[0]
        self._waiting = list(trials)

    def next(self) -> Trial | None:
        """The next of the list."""
        return self._waiting.pop(0) if self._waiting else None

    def ended(self) -> bool:
        """Whether the list is at its end."""
        return not self._waiting

    def tell(self, outcome: TrialOutcome) -> None:
        """Nothing hangs on outcomes."""


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
    store: str | None = None,
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
        store: URI of the folder of all trials in a store; none keeps them on this disk, which all
            hosts must see. With it ``folder`` is below the run root.

    Returns:
        Outcomes in the order of the trials.

    Raises:
        UserError: trials that do not fit their corpora, the machine, or what was run before
            under their names; before anything starts.
        KeyboardInterrupt: after an orderly stop, on the first Ctrl-C or SIGTERM.
    """
    from skillnet_platform import cluster
    from sweeps.driver import Driver, Options
    from sweeps.pretraining import Pretrainings

    folder = folder.absolute()
    used = resources or ResourceConfig()
    options = Options(folder, parent, score, used, asha, keep, max_failures, label, store)
    with _only_driver(folder):
        if isinstance(trials, Sequence):
            if not trials:
                return []
            listed = [_absolute(trial) for trial in trials]
            _check_names(listed)
            for trial in listed:
                check_trial(trial, folder, score, asha, used)
            source: Source = Listed(listed)
        else:
            source, listed = trials, [trials.example]
            check_trial(source.example, None, score, asha, used)
        before = Pretrainings(listed, folder, store)
        first = before.trials()
        with cluster.session() if first else contextlib.nullcontext():
            if first:
                for trial in first:
                    check_trial(trial, folder, None, None, used)
                alone = replace(options, score=None, asha=None, keep=None)
                before.tell(Driver(Listed(first), replace(alone, label="pretraining")).go())
            return Driver(source, options, before.start).go()


def _absolute(trial: Trial) -> Trial:
    from pipelines.training.run import resolved

    return replace(trial, config=resolved(replace(trial.config, name=trial.name)))


def _check_names(trials: Sequence[Trial]) -> None:
    seen: set[str] = set()
    for trial in trials:
        if trial.name in seen:
            raise UserError(f"two trials are named {trial.name!r}")
        seen.add(trial.name)


def check_trial(
    trial: Trial,
    folder: Path | None,
    score: ScoreConfig | None,
    asha: AshaConfig | None,
    used: ResourceConfig,
) -> None:
    """Raise UserError for what is known not to work, before anything starts."""
    from pipelines.training import run as training_run

    try:
        used.check(trial.config.training.use_gpu)
        training_run.check(training_run.resolved(trial.config))
        if folder is not None and trial.pretrain is None:
            place = folder / trial.name
            training_run.finished_run(training_run.resolved(placed(trial.config, place)), place)
    except UserError as problem:
        raise UserError(f"trial {trial.name}: {problem}") from None
    if score is not None:
        score.check(list(trial.config.measured))
    if asha is not None:
        asha.first_rung(trial)
        if score is None:
            raise UserError("asha needs a score to stop trials by")


@contextlib.contextmanager
def _only_driver(folder: Path) -> Iterator[None]:
    """One driver at a time: two would run the same trials in the same folders."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another process runs these trials") from None
        yield
