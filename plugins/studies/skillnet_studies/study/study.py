"""Run a study: tune every system equally, then train every system with every seed.

<run root>/<name>/
  study.yaml        resolved configuration
  study.json        tuning results, and the status of each run
  run.json          MLflow run
  tuning/           tuning trials, evaluated on the validation splits
  runs/             final runs, one per system and seed; only these read the test splits
  report.html, …    report; see skillnet_studies.report.report

:func:`run_study` is called by ``skillnet compare``. A second call resumes: finished runs are not
repeated. With ``--run_dir s3://bucket/runs`` the object store holds the same files: see
sweeps/trials/remote_ledger.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.training.config.resources import PlannedRun
from skillnet_platform import config as configuration
from skillnet_platform.cluster.resource_request import ResourceRequest, select_model_paths
from skillnet_platform.errors import UserError
from skillnet_platform.storage import atomic_write, read_json, write_json
from skillnet_studies.config.study import STUDY_FILE, STUDY_LEDGER, StudyConfig, shift_seed
from skillnet_studies.study.identity import check_unchanged
from skillnet_studies.study.system_runs import apply_settings, build_base_run, build_pretraining
from skillnet_studies.study.tuning import (
    STAGES,
    TuningResult,
    build_stage_trials,
    build_tuning_points,
    choose_settings,
    start_tuning,
)
from sweeps.config.trials import ScoreConfig, request_run, request_trial
from sweeps.search.space import warn_about_small_space
from sweeps.trials.remote_ledger import RUN
from sweeps.trials.trial import Trial, TrialOutcome

if TYPE_CHECKING:
    from skillnet_platform.tracking import Tracker
    from skillnet_studies.analysis.finished_runs import FinishedRun

#: Files that exist from the start of a study.
START_FILES = (STUDY_FILE, RUN)


def check_study(config: StudyConfig) -> None:
    """Check a study by building its trials; nothing is written.

    Raises:
        UserError: the study is invalid, or differs from the runs that exist under its name.
    """
    start = start_tuning(config)
    # All stages are built, because a wrong rate must fail before the first trial trains. Only the
    # first is compared with existing runs: the others depend on what it selects.
    stages = [build_stage_trials(config, stage, start) for stage in STAGES]
    if config.tuning.trials:
        found = len(build_tuning_points(config))
        warn_about_small_space("tuning.space", found, config.tuning.trials)
    check_unchanged(config, stages[0], config.folder / "tuning")
    known: dict[str, TuningResult] = {}
    if (config.folder / STUDY_LEDGER).is_file():
        known, _ = read_study_ledger(config.folder)
    finals = build_final_trials(config, {label: known.get(label, start[label]) for label in start})
    # Without the ledger the chosen settings are unknown, so the final runs are not compared.
    is_tuned = any(stages)
    check_unchanged(
        config, [t for t in finals if not is_tuned or t.group in known], config.folder / "runs"
    )


def run_study(
    config: StudyConfig, tracker: "Tracker"
) -> tuple[dict[str, TuningResult], list[TrialOutcome]]:
    """Tune and train all systems; an unfinished study is resumed.

    Args:
        config: the study.
        tracker: the open MLflow run of the study.

    Returns:
        Label -> tuning result, and the outcomes of the final runs.

    Raises:
        UserError: a trial is invalid (nothing is trained), or no tuning trial of a system
            finished.
        KeyboardInterrupt: after a graceful stop, see ``run_trials``.
    """
    # These load torch, which --help must not do.
    from skillnet_studies.study.kept_results import KeptTuning, is_kept_run, keep_results
    from skillnet_studies.study.reserve import seal_reserve
    from sweeps.trials.engine import run_trials
    from sweeps.trials.ledger import LedgerEntry

    if not config.systems:
        raise UserError(
            "a study needs systems: give a file such as --config studies/headline, or name "
            "finished runs to compare"
        )
    check_folds(config)
    folder, mirror = config.folder, config.mirror
    with atomic_write(folder / STUDY_FILE, "w") as stream:
        stream.write(configuration.to_yaml(config))
    if mirror is not None:
        mirror.upload(*START_FILES)
    known = _read_kept_tuning(config)
    tuning = known or start_tuning(config)
    for stage in () if known else STAGES:
        trials = build_stage_trials(config, stage, tuning)
        if not trials:
            continue
        check_unchanged(config, trials, folder / "tuning")
        kept_trials = KeptTuning(config)
        tuned = [each for each in map(kept_trials.find_outcome, trials) if each is not None]
        done = {each.name for each in tuned}
        tuned += run_trials(
            [trial for trial in trials if trial.name not in done],
            folder=folder / "tuning",
            parent=tracker,
            score=ScoreConfig(),
            resources=config.resources,
            # Only the scores of tuning are used, so no weights are kept.
            keep=0,
            label=f"tuning, {stage.replace('_', ' ')}",
            store=mirror.uri_of("tuning") if mirror is not None else None,
            on_outcome=kept_trials.keep_outcome,
        )
        tuning = choose_settings(config, stage, tuning, trials, tuned)
    # Written before the final runs, so that a killed study resumes with the same settings.
    write_study_ledger(config, tuning, [])
    finals = build_final_trials(config, tuning)
    # Checked again, because only now the chosen settings are known.
    check_unchanged(config, finals, folder / "runs")
    kept = {t.name: t for t in finals if is_kept_run(folder / "runs" / t.name)}
    entries = [LedgerEntry(trial, folder / "runs" / name) for name, trial in kept.items()]
    outcomes = [entry.build_outcome("finished") for entry in entries]
    for trials in group_replicates(finals) if config.keep else [finals]:
        outcomes += run_trials(
            [trial for trial in trials if trial.name not in kept],
            folder=folder / "runs",
            parent=tracker,
            resources=config.resources,
            label="final runs",
            store=mirror.uri_of("runs") if mirror is not None else None,
        )
        write_study_ledger(config, tuning, outcomes)
        if config.keep:
            # The kept results have no weights, so the reserve is evaluated before.
            seal_reserve(config, [o.folder for o in outcomes if o.status == "finished"])
            keep_results(config, outcomes)
    return tuning, outcomes


def check_folds(config: StudyConfig) -> None:
    """Raise UserError if a fold cannot be made, or if a pretraining would read its test rows.

    Checked before the first run, because a late fold would fail after hours.

    Args:
        config: the study.
    """
    from pipelines.training.runs.identity import open_corpora

    run, before = (
        {task.corpus for task in each.joint().tasks.values() if task is not None}
        for each in (config.run, config.pretraining)
    )
    # A unit has another fold in another corpus, so its test rows would be pretrained on.
    if config.run.fold.count and any(each.pretrain for each in config.systems.values()):
        foreign = sorted(before - run)
        if foreign:
            raise UserError(
                f"pretraining.tasks: {', '.join(foreign)} is no corpus of run.tasks, so its folds "
                f"hold out other units. Pretrain on {', '.join(sorted(run))}"
            )
    for number in range(config.run.fold.count):
        open_corpora(replace(config.run, fold=replace(config.run.fold, number=number)))


def _read_kept_tuning(config: StudyConfig) -> dict[str, TuningResult]:
    """Return label -> tuning result of another machine; {} if this machine has to tune."""
    folder = config.folder
    if not config.keep or (folder / "tuning").is_dir() or not (folder / STUDY_LEDGER).is_file():
        return {}
    known, _ = read_study_ledger(folder)
    return known if set(config.systems) <= set(known) else {}


def group_replicates(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Return final runs in groups of one fold and seed, in order.

    Args:
        trials: final runs.
    """
    groups: dict[tuple[int, int], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.config.fold.number, trial.config.seed), []).append(trial)
    return list(groups.values())


def build_final_trials(config: StudyConfig, tuning: Mapping[str, TuningResult]) -> list[Trial]:
    """Return the final runs, ordered by seed.

    With this order an interrupted study has about as many runs of each system.

    Args:
        config: the study.
        tuning: label -> tuning result with the chosen settings.
    """
    return [
        build_final_trial(config, label, tuning[label].settings, seed, fold)
        # Seeds are the outer loop, so that an interrupted study can already be compared.
        for seed in config.seeds
        for fold in config.fold_numbers
        for label in config.systems
    ]


def build_final_trial(
    config: StudyConfig, label: str, settings: Mapping[str, Any], seed: int, fold: int = 0
) -> Trial:
    """Return the final run of a system and a replicate, which is evaluated on the test splits.

    Args:
        config: the study.
        label: label of the system.
        settings: flat key -> tuned value.
        seed: seed of the replicate, from the seeds of the study.
        fold: number of the fold that it tests, of a study with folds.
    """
    seed = shift_seed(seed, fold)
    run = apply_settings(build_base_run(config, label, seed), settings, f"systems.{label}")
    run = replace(run, evaluate=True, fold=replace(run.fold, number=fold))
    return Trial(
        f"{label}-fold{fold}-seed{seed}" if run.fold.count else f"{label}-seed{seed}",
        run,
        pretrain=build_pretraining(config, label, run, settings),
        group=label,
        settings={"system": label, **settings},
    )


def request_study(config: StudyConfig) -> ResourceRequest:
    """Return the request of one run of a study, and of its pretraining if a system has one."""
    first = replace(
        request_run(config, config.run.training), list_runs=lambda: list_study_runs(config)
    )
    if not any(system.pretrain for system in config.systems.values()):
        return first
    workers = request_trial(config, config.pretraining.training)
    models = select_model_paths(config.run.init_from, config.pretraining.init_from)
    same = workers == request_trial(config, config.run.training)
    return replace(first, models=models, next_stage=None if same else workers)


def list_study_runs(config: StudyConfig) -> list[PlannedRun]:
    """Return the tuning trials, final runs and pretrainings of a study.

    Args:
        config: settings of the study. The final runs have its settings, not those that tuning will
            choose.

    Raises:
        UserError: the study is invalid.
    """
    untuned = start_tuning(config)
    planned, share = [], config.resources.gpus or 1.0
    tuning = [each for stage in STAGES for each in build_stage_trials(config, stage, untuned)]
    for trial in [*build_final_trials(config, untuned), *tuning]:
        label = trial.group or trial.name
        planned.append(PlannedRun(trial.config, label, "run.", share))
        if trial.pretrain is not None:
            planned.append(
                PlannedRun(trial.pretrain, f"pretraining of {label}", "pretraining.", share)
            )
    return planned


# -- ledger --------------------------------------------------------------------------------


def write_study_ledger(
    config: StudyConfig, tuning: Mapping[str, TuningResult], outcomes: Sequence[TrialOutcome]
) -> None:
    """Write the tuning results and the status of each run to ``study.json``.

    Args:
        config: the study.
        tuning: label -> tuning result.
        outcomes: outcomes of the final runs; none before them.
    """
    write_json(
        config.folder / STUDY_LEDGER,
        {
            "name": config.name,
            "seeds": dict.fromkeys(config.systems, config.seeds),
            "tuning": {label: vars(result) for label, result in tuning.items()},
            "runs": [
                {
                    "system": outcome.group,
                    "seed": outcome.seed,
                    # Relative, so that a study can be moved or mirrored.
                    "folder": str(outcome.folder.relative_to(config.folder)),
                    "status": outcome.status,
                    "error": outcome.error,
                    "run_id": outcome.run_id,
                }
                for outcome in outcomes
            ],
        },
    )


def read_study_ledger(folder: Path) -> tuple[dict[str, TuningResult], list[tuple[str, Path]]]:
    """Read ``study.json``.

    Args:
        folder: directory of the study, or path of its kept results.

    Returns:
        Label -> tuning result, and (label, directory) of each finished run.
    """
    from skillnet_studies.study.kept_results import open_study

    folder = open_study(folder)
    ledger = read_json(folder / STUDY_LEDGER)
    # Unknown keys of a ledger are ignored.
    known = {f.name for f in fields(TuningResult)}
    tuning = {
        label: TuningResult(**{key: value for key, value in entry.items() if key in known})
        for label, entry in ledger["tuning"].items()
    }
    runs = [
        (entry["system"], folder / entry["folder"])
        for entry in ledger["runs"]
        if entry["status"] == "finished"
    ]
    return tuning, runs


def read_study_runs(folder: Path) -> "list[FinishedRun]":
    """Read the finished runs of a study; their labels are those of its ledger.

    Args:
        folder: directory of the study, or path of its kept results.

    Raises:
        UserError: a file of a run is damaged.
    """
    from skillnet_studies.analysis.finished_runs import read_run

    return [read_run(path, label) for label, path in read_study_ledger(folder)[1]]


def list_final_runs(config: StudyConfig) -> list[tuple[str, Path]]:
    """Return label and directory of each final run of a finished study.

    Args:
        config: the study.

    Raises:
        UserError: a final run is missing: the reserve is not read before the last one.
    """
    known: dict[str, TuningResult] = {}
    finished: list[tuple[str, Path]] = []
    if (config.folder / STUDY_LEDGER).is_file():
        known, finished = read_study_ledger(config.folder)
    if not set(config.systems) <= set(known):
        raise UserError("read_reserve: the study has no results yet. Run it without this option")
    wanted = {trial.name for trial in build_final_trials(config, known)}
    absent = sorted(wanted - {folder.name for _, folder in finished})
    if absent:
        raise UserError(
            f"read_reserve: {len(absent)} of {len(wanted)} final runs are not finished, such as "
            f"{absent[0]}. Run the study without this option first"
        )
    return finished
