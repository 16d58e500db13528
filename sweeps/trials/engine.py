"""The engine of sweeps and studies: trials through Ray Tune, recorded, resumable.

The ledger is the trials' folders (docs/decisions/0013): a trial with an outcome is not run
again, an unfinished one goes on from its newest whole checkpoint.
"""

import contextlib
import fcntl
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from skillnet_platform.errors import UserError
from skillnet_platform.tracking import Tracker
from sweeps.config.trials import AshaConfig, ResourceConfig, ScoreConfig
from sweeps.trials.source import ListedTrials, TrialSource, find_first_rung
from sweeps.trials.trial import Trial, TrialOutcome, place_config


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
    from sweeps.trials.driver import TrialDriver
    from sweeps.trials.shared_pretraining import SharedPretrainings
    from sweeps.trials.source import TrialOptions

    folder = folder.absolute()
    used = resources or ResourceConfig()
    options = TrialOptions(folder, parent, score, used, asha, keep, max_failures, label, store)
    with _lock_folder(folder):
        if isinstance(trials, Sequence):
            if not trials:
                return []
            listed = [_resolve_trial(trial) for trial in trials]
            _check_names(listed)
            for trial in listed:
                check_trial(trial, folder, score, asha, used)
            source: TrialSource = ListedTrials(listed)
        else:
            source, listed = trials, [trials.example]
            check_trial(source.example, None, score, asha, used)
        before = SharedPretrainings(listed, folder, store)
        first = before.list_trials()
        with cluster.session() if first else contextlib.nullcontext():
            if first:
                for trial in first:
                    check_trial(trial, folder, None, None, used)
                alone = replace(options, score=None, asha=None, keep=None)
                before.record_outcomes(
                    TrialDriver(ListedTrials(first), replace(alone, label="pretraining")).run()
                )
            return TrialDriver(source, options, before.set_init_from).run()


def _resolve_trial(trial: Trial) -> Trial:
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
            training_run.finished_run(
                training_run.resolved(place_config(trial.config, place)), place
            )
    except UserError as problem:
        raise UserError(f"trial {trial.name}: {problem}") from None
    if score is not None:
        score.check(list(trial.config.measured))
    if asha is not None:
        find_first_rung(asha, trial)
        if score is None:
            raise UserError("asha needs a score to stop trials by")


@contextlib.contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """One driver at a time: two would run the same trials in the same folders."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another process runs these trials") from None
        yield
