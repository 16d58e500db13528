"""Run a study: tune every system equally, then train every system with every seed.

<run root>/<name>/
  study.yaml        resolved configuration
  study.json        tuning results, and the status of each run
  run.json          MLflow run
  tuning/           tuning trials, evaluated on the validation splits
  runs/             final runs, one per system and seed; only these read the test splits
  report.html, …    report; see sweeps.report.report

:func:`run_study` is called by ``skillnet compare``. A second call resumes: finished runs are not
repeated. With ``--run_dir s3://bucket/runs`` the object store holds the same files: see
sweeps/trials/remote_ledger.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config.run import FinetuneConfig, PretrainConfig
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.config.schema import check_keys, nest_value
from skillnet_platform.errors import UserError
from skillnet_platform.storage import atomic_write, read_json, write_json
from sweeps.config.space import SearchDimension, format_setting
from sweeps.config.study import StudyConfig
from sweeps.config.trials import ScoreConfig
from sweeps.search.space import SearchSpace
from sweeps.study.identity import STUDY_FILE, check_unchanged
from sweeps.trials.remote_ledger import RUN, STUDY_LEDGER
from sweeps.trials.trial import Trial, TrialOutcome

if TYPE_CHECKING:
    from skillnet_platform.tracking import Tracker

#: Files that exist from the start of a study.
START_FILES = (STUDY_FILE, RUN)


@dataclass
class TuningResult:
    """Result of tuning one system.

    Args:
        label: label of the system.
        settings: flat key -> chosen value; empty for the run as configured.
        score: mean validation score of the chosen trial; None without trials.
        trials: settings, status, score, steps and seconds of each trial.
        reuse_tuning_of: system whose tuning was used, or None for own trials.
    """

    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    score: float | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)
    reuse_tuning_of: str | None = None


@dataclass
class StudyResult:
    """Result of a study: tuning and final runs.

    Args:
        config: the study.
        tuning: label -> tuning result.
        outcomes: outcomes of the final runs.
    """

    config: StudyConfig
    tuning: dict[str, TuningResult]
    outcomes: list[TrialOutcome]

    @property
    def failed_runs(self) -> list[TrialOutcome]:
        """Final runs without a result."""
        return [outcome for outcome in self.outcomes if outcome.status != "finished"]


def check_study(config: StudyConfig) -> None:
    """Check a study by building all of its trials; nothing is written.

    Raises:
        UserError: the study is invalid, or differs from the runs that exist under its name.
    """
    trials = build_tuning_trials(config)
    check_unchanged(config, trials, config.folder / "tuning")
    known: dict[str, TuningResult] = {}
    if (config.folder / STUDY_LEDGER).is_file():
        known, _ = read_study_ledger(config.folder)
    tuning = {label: known.get(label, TuningResult(label)) for label in config.systems}
    finals = build_final_trials(config, tuning)
    # Without the ledger the chosen settings are unknown, so the final runs are not compared.
    check_unchanged(
        config, [t for t in finals if not trials or t.group in known], config.folder / "runs"
    )


def run_study(config: StudyConfig, tracker: "Tracker") -> StudyResult:
    """Tune and train all systems; an unfinished study is resumed.

    Args:
        config: the study.
        tracker: the open MLflow run of the study.

    Raises:
        UserError: a trial is invalid (nothing is trained), or no tuning trial of a system
            finished.
        KeyboardInterrupt: after a graceful stop.
    """
    from sweeps.trials.engine import run_trials

    if not config.systems:
        raise UserError(
            "a study needs systems: give a file such as --config studies/headline, or name "
            "finished runs to compare"
        )
    folder, mirror = config.folder, config.mirror
    with atomic_write(folder / STUDY_FILE, "w") as stream:
        stream.write(configuration.to_yaml(config))
    if mirror is not None:
        mirror.upload_files(*START_FILES)
    trials = build_tuning_trials(config)
    tuned: list[TrialOutcome] = []
    if trials:
        tuned = run_trials(
            trials,
            folder=folder / "tuning",
            parent=tracker,
            score=ScoreConfig(),
            resources=config.resources,
            # Only the scores of tuning are used, so no weights are kept.
            keep=0,
            label="tuning",
            store=mirror.uri_of("tuning") if mirror is not None else None,
        )
    tuning = choose_settings(config, trials, tuned)
    # Written before the final runs, so that a killed study resumes with the same settings.
    write_study_ledger(StudyResult(config, tuning, []), folder)
    finals = build_final_trials(config, tuning)
    # Checked again, because only now the chosen settings are known.
    check_unchanged(config, finals, folder / "runs")
    outcomes = run_trials(
        finals,
        folder=folder / "runs",
        parent=tracker,
        resources=config.resources,
        label="final runs",
        store=mirror.uri_of("runs") if mirror is not None else None,
    )
    study = StudyResult(config, tuning, outcomes)
    write_study_ledger(study, folder)
    return study


def build_tuning_trials(config: StudyConfig) -> list[Trial]:
    """Return the tuning trials of all systems, which are evaluated on the validation splits."""
    trials: list[Trial] = []
    if not config.tuning.trials:
        return trials
    points = build_tuning_points(config)
    for label, entry in config.systems.items():
        if entry.reuse_tuning_of is not None:
            continue
        base = build_base_run(config, label, config.tuning.seed)
        steps = math.ceil(config.tuning.step_fraction * base.training.steps)
        # Trials must not read the test splits.
        base = replace(base, evaluate=False, training=replace(base.training, steps=steps))
        for index, settings in enumerate(points):
            run = override_run(base, settings, "tuning.space")
            trials.append(
                Trial(
                    f"{label}-t{index}",
                    run,
                    pretrain=build_pretraining(config, label, run),
                    splits=("validation",),
                    group=f"{label}-t{index}",
                    settings={"system": label, **settings},
                )
            )
    return trials


def build_tuning_points(config: StudyConfig) -> list[dict[str, Any]]:
    """Return the settings of the tuning trials, which are the same for every system.

    The first are the settings as configured, then points spread over the space, then the points
    of ``tuning.points``.
    """
    space = SearchSpace(config.tuning.space, config.run)
    spread = space.latin_hypercube_points(config.tuning.trials - 1, config.tuning.seed)
    # The settings as configured are always tried, so tuning cannot end below them by bad luck.
    points = [{}, *(space.resolve_assignments(point) for point in spread)]
    for point in config.tuning.points:
        try:
            SearchSpace(
                {key: SearchDimension(choice=[value]) for key, value in point.items()}, config.run
            )
        except UserError as error:
            raise UserError(f"tuning.points: {error}") from None
    return [*points[: config.tuning.trials], *config.tuning.points]


def choose_settings(
    config: StudyConfig, trials: Sequence[Trial], outcomes: Sequence[TrialOutcome]
) -> dict[str, TuningResult]:
    """Return the settings with the best mean validation score of each system.

    Args:
        config: the study.
        trials: tuning trials of all systems.
        outcomes: their outcomes. Among equal scores the first trial is chosen.

    Raises:
        UserError: no tuning trial of a system finished.
    """
    by_name = {outcome.name: outcome for outcome in outcomes}
    tuning: dict[str, TuningResult] = {}
    for label, entry in config.systems.items():
        if entry.reuse_tuning_of is not None:
            continue
        own = TuningResult(label)
        for trial in trials:
            if trial.settings["system"] != label:
                continue
            settings = {k: v for k, v in trial.settings.items() if k != "system"}
            outcome = by_name.get(trial.name)
            score = outcome.score if outcome and outcome.status == "finished" else None
            own.trials.append(
                {
                    "settings": settings,
                    "status": outcome.status if outcome else "not run",
                    "score": score,
                    "steps": trial.config.training.steps,
                    "seconds": outcome.seconds if outcome else None,
                }
            )
            # Strictly greater: among equal scores the first trial is chosen.
            if score is not None and (own.score is None or score > own.score):
                own.score, own.settings = score, settings
        # Untuned settings would make the comparison with tuned systems unfair.
        if own.trials and own.score is None:
            raise UserError(f"no tuning trial of {label} finished; see {config.folder / 'tuning'}")
        tuning[label] = own
    for label, entry in config.systems.items():
        if entry.reuse_tuning_of is not None:
            other = tuning[entry.reuse_tuning_of]
            tuning[label] = TuningResult(
                label, other.settings, other.score, [], entry.reuse_tuning_of
            )
    return {label: tuning[label] for label in config.systems}


def build_final_trials(config: StudyConfig, tuning: Mapping[str, TuningResult]) -> list[Trial]:
    """Return the final runs, ordered by seed.

    With this order an interrupted study has about as many runs of each system.

    Args:
        config: the study.
        tuning: label -> tuning result with the chosen settings.
    """
    seeds = dict.fromkeys(seed for label in config.systems for seed in config.seeds_of(label))
    return [
        build_final_trial(config, label, tuning[label].settings, seed)
        # Seeds are the outer loop, so that an interrupted study can already be compared.
        for seed in seeds
        for label in config.systems
        if seed in config.seeds_of(label)
    ]


def build_final_trial(
    config: StudyConfig, label: str, settings: Mapping[str, Any], seed: int
) -> Trial:
    """Return the final run of a system and a seed, which is evaluated on the test splits.

    Args:
        config: the study.
        label: label of the system.
        settings: flat key -> tuned value.
        seed: seed of the run.
    """
    run = override_run(build_base_run(config, label, seed), settings, f"systems.{label}")
    run = replace(run, evaluate=True)
    return Trial(
        f"{label}-seed{seed}",
        run,
        pretrain=build_pretraining(config, label, run),
        group=label,
        settings={"system": label, **settings},
    )


def build_base_run(config: StudyConfig, label: str, seed: int) -> FinetuneConfig:
    """Return the study's run with the system's own settings.

    Args:
        config: the study.
        label: label of the system.
        seed: seed of the run.

    Raises:
        UserError: an unknown system, option or key.
    """
    from skillnet.systems import find_system

    entry = config.systems[label]
    try:
        # Checked here, because a wrong option must fail before the first trial trains.
        find_system(entry.system).model.parse_options(entry.options)
    except (ValueError, TypeError) as error:
        raise UserError(f"systems.{label}: {error}") from None
    run = override_run(config.run, entry.set, f"systems.{label}.set")
    # Runs of a study are not registered, and the study's own run logs system metrics.
    tracking = replace(config.tracking, register=False, system_metrics=False)
    return replace(
        run, seed=seed, system=entry.system, options=dict(entry.options), tracking=tracking
    )


def build_pretraining(
    config: StudyConfig, label: str, run: FinetuneConfig
) -> PretrainConfig | None:
    """Return the pretraining of a run with its system, sizes and seed; None without one.

    Args:
        config: the study.
        label: label of the system.
        run: the run that starts from the pretraining.
    """
    if not config.systems[label].pretrain:
        return None
    plan = config.pretraining
    return replace(
        plan,
        seed=run.seed,
        data=run.data,
        system=run.system,
        options=dict(run.options),
        # Sizes of the run, but tasks of the pretraining.
        model=replace(run.model, tasks=plan.model.tasks),
        tracking=run.tracking,
    )


def override_run(run: FinetuneConfig, keys: Mapping[str, Any], where: str) -> FinetuneConfig:
    """Return a run with some flat keys set to other values.

    Args:
        run: the base run.
        keys: flat key -> value.
        where: source of the values, for error messages.

    Raises:
        UserError: an unknown key or a wrong value.
    """
    if not keys:
        return run
    tree = configuration.to_dict(run)
    for key, value in keys.items():
        configuration.merge_trees(tree, check_keys(FinetuneConfig, nest_value(key, value), where))
    return configuration.build_config(FinetuneConfig, tree, dict.fromkeys(keys, where))


# -- ledger --------------------------------------------------------------------------------


def write_study_ledger(study: StudyResult, folder: Path) -> None:
    """Write the tuning results and the status of each run to ``study.json``.

    Args:
        study: the study; without outcomes before the final runs.
        folder: directory of the study.
    """
    write_json(
        folder / STUDY_LEDGER,
        {
            "name": study.config.name,
            "seeds": {label: study.config.seeds_of(label) for label in study.config.systems},
            "tuning": {label: vars(result) for label, result in study.tuning.items()},
            "runs": [
                {
                    "system": outcome.group,
                    "seed": outcome.seed,
                    # Relative, so that a study can be moved or mirrored.
                    "folder": str(outcome.folder.relative_to(folder)),
                    "status": outcome.status,
                    "error": outcome.error,
                    "run_id": outcome.run_id,
                }
                for outcome in study.outcomes
            ],
        },
    )


def read_study_ledger(folder: Path) -> tuple[dict[str, TuningResult], list[tuple[str, Path]]]:
    """Read ``study.json``.

    Args:
        folder: directory of the study.

    Returns:
        Label -> tuning result, and (label, directory) of each finished run.
    """
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


def format_settings(settings: Mapping[str, Any]) -> str:
    """Return ``training.lr 0.002, training.weight_decay 0.1``, or "as configured" for none."""
    return (
        ", ".join(f"{key} {format_setting(value)}" for key, value in settings.items())
        or "as configured"
    )


def warn_about_failures(study: StudyResult) -> None:
    """Print a warning for each final run without a result."""
    for outcome in study.failed_runs:
        console.print_warning(f"{outcome.name} {outcome.status}: {outcome.error or 'no result'}")
