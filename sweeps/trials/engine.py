"""Run the trials of sweeps and studies through Ray Tune, recorded and resumable.

The ledger is the trials' directories (decision 13): a trial with an outcome is not run
again, and an unfinished trial is resumed from its latest valid checkpoint. The entry point is
:func:`run_trials`.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.resolved_run import build_joint_run
from pipelines.training.runs.layout import lock_run_folder
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from skillnet_platform.tracking import Tracker
from sweeps.config.trials import AshaConfig, ResourceConfig, ScoreConfig
from sweeps.trials.ledger import check_trial_corpora
from sweeps.trials.source import ListedTrials, TrialSource, find_first_rung
from sweeps.trials.trial import Trial, TrialOutcome, place_config


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


def run_trials(
    trials: Sequence[Trial] | TrialSource,
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
    on_outcome: Callable[[TrialOutcome], None] | None = None,
) -> list[TrialOutcome]:
    """Run trials through Ray Tune and return their outcomes.

    Each pretraining that trials name is run once, first. Every trial has an MLflow run nested in
    ``parent``. This process opens and ends it: no run stays RUNNING after an error or interrupt.
    A failed trial does not end the others.

    Args:
        trials: a list, or a source that creates trials one by one. Names must differ.
        folder: directory of all trials; a second call with the same directory resumes.
        parent: the open MLflow run of the sweep or study.
        score: computation of the score; required by ``asha``.
        resources: resources of one trial.
        asha: early stopping; None runs all trials to the end.
        keep: number of groups, best first by mean score, whose models and checkpoints are kept;
            None keeps all. Small result files are always kept.
        max_failures: restarts of a trial whose process died.
        label: label of the progress bar.
        store: URI of the directory of all trials in an object store; None if all nodes share the
            disk of ``folder``. With a store ``folder`` is below the run root.
        on_outcome: called with the outcome of each listed trial when it has ended.

    Returns:
        Outcomes in the order of the trials.

    Raises:
        UserError: a trial does not fit its corpora, the cluster, or an existing run of its name;
            nothing is started.
        KeyboardInterrupt: after a graceful stop by the first Ctrl-C.
        TerminatedError: after a graceful stop by the first SIGTERM or SIGHUP.
    """
    from skillnet_platform import cluster
    from sweeps.trials.driver import TrialDriver
    from sweeps.trials.source import TrialOptions

    folder = folder.absolute()
    resources = resources or ResourceConfig()
    options = TrialOptions(folder, parent, score, resources, asha, keep, max_failures, label, store)
    # Two drivers would run the same trials in the same directories.
    with lock_run_folder(folder):
        if isinstance(trials, Sequence):
            if not trials:
                return []
            listed = [_resolve_trial(trial) for trial in trials]
            _check_names(listed)
            for trial in listed:
                check_trial(trial, folder, score, asha, resources)
            source: TrialSource = ListedTrials(listed, on_outcome)
        else:
            # A source creates trials later, so one example stands for all of them.
            source, listed = trials, [trials.example]
            check_trial(source.example, None, score, asha, resources)
        pretrainings = SharedPretrainings(listed, folder, store)
        first = pretrainings.list_trials()
        with cluster.ray_session() if first else contextlib.nullcontext():
            if first:
                for trial in first:
                    check_trial(trial, folder, None, None, resources)
                # Pretrainings are neither scored nor stopped early, and their models are needed.
                plain = replace(options, score=None, asha=None, keep=None, label="pretraining")
                pretrainings.record_outcomes(TrialDriver(ListedTrials(first), plain).run())
            return TrialDriver(source, options, pretrainings.set_init_from).run()


def _resolve_trial(trial: Trial) -> Trial:
    from pipelines.training.loop.resolved_run import resolve_run

    return replace(trial, config=resolve_run(replace(trial.config, name=trial.name)).config)


def _check_names(trials: Sequence[Trial]) -> None:
    seen: set[str] = set()
    for trial in trials:
        if trial.name in seen:
            raise UserError(f"two trials are named {trial.name!r}; give each its own name")
        seen.add(trial.name)


def check_trial(
    trial: Trial,
    folder: Path | None,
    score: ScoreConfig | None,
    asha: AshaConfig | None,
    resources: ResourceConfig,
) -> None:
    """Raise UserError for errors that can be found before anything starts.

    Args:
        trial: settings, seeds and folder to run.
        folder: directory of all trials, to compare with an existing run; None skips this.
        score: computation of the score, or None.
        asha: early stopping, or None.
        resources: resources of one trial.
    """
    from pipelines.training.loop.resolved_run import resolve_run
    from pipelines.training.loop.run import find_finished_result, validate_run

    try:
        resources.check(trial.config.training.use_gpu)
        validate_run(resolve_run(trial.config))
        if folder is not None and trial.pretrain is None:
            find_finished_result(resolve_run(place_config(trial.config, folder / trial.name)))
        elif folder is not None:
            # Its initial weights are not known yet.
            check_trial_corpora(trial, folder / trial.name)
    except UserError as error:
        raise UserError(f"trial {trial.name}: {error}") from None
    if score is not None:
        score.check(list(trial.config.measured))
    if asha is not None:
        find_first_rung(asha, trial)
        if score is None:
            raise UserError("asha needs a score to stop trials by; set score")
