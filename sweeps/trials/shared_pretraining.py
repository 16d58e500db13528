"""Pretrainings that trials start from: each is run once, however many trials name it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipelines.config.run import FinetuneConfig, PretrainConfig
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from sweeps.trials.trial import Trial, TrialOutcome


class Pretrainings:
    """The pretrainings of some trials, and where their models lie.

    Args:
        trials: that may name one.
        folder: of all trials.
        store: URI of that folder in a store, where hosts find the models; none if all see the disk.
    """

    def __init__(self, trials: Sequence[Trial], folder: Path, store: str | None = None) -> None:
        self._folder, self._store = folder, store
        self._needed: dict[str, Trial] = {}
        self._failed: dict[str, str] = {}
        for trial in trials:
            if trial.pretrain is None:
                continue
            joint = _joint(trial.pretrain)
            name = name_of(joint)
            if name not in self._needed:
                self._needed[name] = Trial(name, joint, splits=("validation",))

    def trials(self) -> list[Trial]:
        """One trial per pretraining."""
        return list(self._needed.values())

    def tell(self, outcomes: Sequence[TrialOutcome]) -> None:
        """What became of them."""
        for outcome in outcomes:
            if outcome.status != "finished":
                self._failed[outcome.name] = outcome.error or outcome.status

    def start(self, trial: Trial) -> Trial:
        """The trial as it is run: it starts from the model of its pretraining.

        Raises:
            UserError: the pretraining failed.
        """
        if trial.pretrain is None:
            return trial
        name = name_of(_joint(trial.pretrain))
        if name in self._failed:
            raise UserError(f"its pretraining {name} failed: {self._failed[name]}")
        place = directories.join(self._store, name) if self._store else str(self._folder / name)
        config = replace(trial.config, init_from=place)
        return replace(trial, config=config, pretrain=None)


def name_of(joint: FinetuneConfig) -> str:
    """Equal pretrainings have equal names."""
    from pipelines.runs.identity import identity_of

    return f"pretraining-{configuration.digest(identity_of(joint))[:10]}"


def _joint(config: PretrainConfig) -> FinetuneConfig:
    from pipelines.pretrain import joint_run

    return joint_run(config)
