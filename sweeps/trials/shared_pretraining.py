"""Pretrainings that trials start from: trials with equal pretrainings share one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.resolved_run import build_joint_run
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from sweeps.trials.trial import Trial, TrialOutcome


class SharedPretrainings:
    """The pretrainings of a list of trials, and the locations of their models.

    Args:
        trials: trials, some of which name a pretraining.
        folder: directory of all trials.
        store: URI of that directory in an object store; None if all nodes share the disk.

    Raises:
        UserError: a pretraining has tasks with labels, or reads a reserved split.
    """

    def __init__(self, trials: Sequence[Trial], folder: Path, store: str | None = None) -> None:
        self._folder, self._store = folder, store
        self._trials: dict[str, Trial] = {}
        self._errors: dict[str, str] = {}
        for trial in trials:
            if trial.pretrain is None:
                continue
            joint = build_joint_run(trial.pretrain)
            name = make_pretraining_name(joint)
            # Equal pretrainings have equal names, so each runs once.
            if name not in self._trials:
                self._trials[name] = Trial(name, joint, splits=("validation",))

    def list_trials(self) -> list[Trial]:
        """Return one trial per distinct pretraining."""
        return list(self._trials.values())

    def record_outcomes(self, outcomes: Sequence[TrialOutcome]) -> None:
        """Store the outcomes of :meth:`list_trials`; later starts fail where one failed."""
        for outcome in outcomes:
            if outcome.status != "finished":
                self._errors[outcome.name] = outcome.error or outcome.status

    def set_init_from(self, trial: Trial) -> Trial:
        """Return the trial with ``init_from`` set to the model of its pretraining.

        Raises:
            UserError: the pretraining failed.
        """
        if trial.pretrain is None:
            return trial
        name = make_pretraining_name(build_joint_run(trial.pretrain))
        if name in self._errors:
            raise UserError(f"its pretraining {name} failed: {self._errors[name]}")
        path = directories.join_uri(self._store, name) if self._store else str(self._folder / name)
        config = replace(trial.config, init_from=path)
        return replace(trial, config=config, pretrain=None)


def make_pretraining_name(joint: FinetuneConfig) -> str:
    """Return a name that is equal for equal pretrainings.

    Args:
        joint: the pretraining as a joint run.
    """
    from pipelines.training.runs.identity import compute_identity

    return f"pretraining-{configuration.digest_config(compute_identity(joint))[:10]}"
