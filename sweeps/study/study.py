"""A study: systems x seeds, each tuned as much as the others, through the engine of sweeps.

<run root>/<name>/
  study.yaml        the resolved configuration
  study.json        what each system got in tuning, and what became of each run
  run.json          the MLflow run
  tuning/           trials of the tuning, measured on the validation splits
  runs/             the final runs, one per system and seed; only they read the test splits
  report.html, …    the report; see sweeps.report.report

Called again it goes on: what is finished is not run again. With ``--run_dir s3://bucket/runs`` the
same lies in the store: see sweeps/trials/remote_ledger.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config.run import FinetuneConfig, PretrainConfig
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.config.schema import checked, nested
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

START_FILES = (STUDY_FILE, RUN)


@dataclass
class TuningResult:
    """What one system got in tuning.

    Args:
        label: of the system.
        settings: flat key -> chosen value; empty is the run as configured.
        score: mean validation score of the chosen trial; none without trials.
        trials: settings, status, score, steps and seconds of each.
        reuse_tuning_of: the system whose trials these are, if they are another's.
    """

    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    score: float | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)
    reuse_tuning_of: str | None = None


@dataclass
class StudyResult:
    """A study that was run: what was tuned, and what became of the final runs."""

    config: StudyConfig
    tuning: dict[str, TuningResult]
    outcomes: list[TrialOutcome]

    @property
    def failed_runs(self) -> list[TrialOutcome]:
        """Final runs without a result."""
        return [outcome for outcome in self.outcomes if outcome.status != "finished"]


def check_study(config: StudyConfig) -> None:
    """Build everything once before anything is written: a mistake shows now.

    Raises:
        UserError: what does not fit, or is not what the study of this name has run so far.
    """
    trials = build_tuning_trials(config)
    check_unchanged(config, trials, config.folder / "tuning")
    known: dict[str, TuningResult] = {}
    if (config.folder / STUDY_LEDGER).is_file():
        known, _ = read_study_ledger(config.folder)
    tuned = {label: known.get(label, TuningResult(label)) for label in config.systems}
    finals = build_final_trials(config, tuned)
    # What will be chosen is not known without the ledger.
    check_unchanged(
        config, [t for t in finals if not trials or t.group in known], config.folder / "runs"
    )


def run_study(config: StudyConfig, tracker: "Tracker") -> StudyResult:
    """Tune and run all systems; go on where an earlier call ended.

    Args:
        config: of the study.
        tracker: the open MLflow run of the study.

    Raises:
        UserError: what does not fit, before anything is trained; a system none of whose tuning
            trials finished.
        KeyboardInterrupt: after an orderly stop.
    """
    from sweeps.trials.engine import run_trials

    if not config.systems:
        raise UserError(
            "a study needs systems: give a file such as --config studies/headline, or finished "
            "runs to compare"
        )
    folder, mirror = config.folder, config.mirror
    with atomic_write(folder / STUDY_FILE, "w") as stream:
        stream.write(configuration.to_yaml(config))
    if mirror is not None:
        mirror.upload_files(*START_FILES)
    trials = build_tuning_trials(config)
    tried: list[TrialOutcome] = []
    if trials:
        tried = run_trials(
            trials,
            folder=folder / "tuning",
            parent=tracker,
            score=ScoreConfig(),
            resources=config.resources,
            keep=0,
            label="tuning",
            store=mirror.uri_of("tuning") if mirror is not None else None,
        )
    tuned = choose_settings(config, trials, tried)
    write_study_ledger(StudyResult(config, tuned, []), folder)
    finals = build_final_trials(config, tuned)
    check_unchanged(config, finals, folder / "runs")
    outcomes = run_trials(
        finals,
        folder=folder / "runs",
        parent=tracker,
        resources=config.resources,
        label="final runs",
        store=mirror.uri_of("runs") if mirror is not None else None,
    )
    study = StudyResult(config, tuned, outcomes)
    write_study_ledger(study, folder)
    return study


def build_tuning_trials(config: StudyConfig) -> list[Trial]:
    """The tuning trials of all systems, measured on the validation splits."""
    trials: list[Trial] = []
    if not config.tuning.trials:
        return trials
    drawn = build_tuning_points(config)
    for label, entry in config.systems.items():
        if entry.reuse_tuning_of is not None:
            continue
        base = build_base_run(config, label, config.tuning.seed)
        steps = math.ceil(config.tuning.step_fraction * base.training.steps)
        base = replace(base, evaluate=False, training=replace(base.training, steps=steps))
        for place, settings in enumerate(drawn):
            made = override_run(base, settings, "tuning.space")
            trials.append(
                Trial(
                    f"{label}-t{place}",
                    made,
                    pretrain=build_pretraining(config, label, made),
                    splits=("validation",),
                    group=f"{label}-t{place}",
                    settings={"system": label, **settings},
                )
            )
    return trials


def build_tuning_points(config: StudyConfig) -> list[dict[str, Any]]:
    """Settings of every system's tuning trials: none, points spread over the space, those named."""
    space = SearchSpace(config.tuning.space, config.run)
    spread = space.latin_hypercube_points(config.tuning.trials - 1, config.tuning.seed)
    made = [{}, *(space.resolve_assignments(point) for point in spread)]
    for point in config.tuning.points:
        try:
            SearchSpace(
                {key: SearchDimension(choice=[value]) for key, value in point.items()}, config.run
            )
        except UserError as problem:
            raise UserError(f"tuning.points: {problem}") from None
    return [*made[: config.tuning.trials], *config.tuning.points]


def choose_settings(
    config: StudyConfig, trials: Sequence[Trial], outcomes: Sequence[TrialOutcome]
) -> dict[str, TuningResult]:
    """The settings with the best mean validation score of each system; of equals the first.

    Raises:
        UserError: no trial of a system finished.
    """
    by_name = {outcome.name: outcome for outcome in outcomes}
    tuned: dict[str, TuningResult] = {}
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
            if score is not None and (own.score is None or score > own.score):
                own.score, own.settings = score, settings
        if own.trials and own.score is None:
            raise UserError(f"no tuning trial of {label} finished; see {config.folder / 'tuning'}")
        tuned[label] = own
    for label, entry in config.systems.items():
        if entry.reuse_tuning_of is not None:
            other = tuned[entry.reuse_tuning_of]
            tuned[label] = TuningResult(
                label, other.settings, other.score, [], entry.reuse_tuning_of
            )
    return {label: tuned[label] for label in config.systems}


def build_final_trials(config: StudyConfig, tuned: Mapping[str, TuningResult]) -> list[Trial]:
    """The final runs, seed by seed: what is stopped early has as many of each system."""
    seeds = dict.fromkeys(seed for label in config.systems for seed in config.seeds_of(label))
    return [
        build_final_trial(config, label, tuned[label].settings, seed)
        for seed in seeds
        for label in config.systems
        if seed in config.seeds_of(label)
    ]


def build_final_trial(
    config: StudyConfig, label: str, settings: Mapping[str, Any], seed: int
) -> Trial:
    """The run of a system and a seed that is measured on the test splits."""
    made = override_run(build_base_run(config, label, seed), settings, f"systems.{label}")
    made = replace(made, evaluate=True)
    return Trial(
        f"{label}-seed{seed}",
        made,
        pretrain=build_pretraining(config, label, made),
        group=label,
        settings={"system": label, **settings},
    )


def build_base_run(config: StudyConfig, label: str, seed: int) -> FinetuneConfig:
    """The study's run with what a system sets.

    Raises:
        UserError: an unknown system, option or key.
    """
    from skillnet.systems import find_system

    entry = config.systems[label]
    try:
        find_system(entry.system).model.parse_options(entry.options)
    except (ValueError, TypeError) as problem:
        raise UserError(f"systems.{label}: {problem}") from None
    run = override_run(config.run, entry.set, f"systems.{label}.set")
    tracking = replace(config.tracking, register=False, system_metrics=False)
    return replace(
        run, seed=seed, system=entry.system, options=dict(entry.options), tracking=tracking
    )


def build_pretraining(
    config: StudyConfig, label: str, run: FinetuneConfig
) -> PretrainConfig | None:
    """The pretraining that a run starts from: its system, sizes and seed; none without."""
    if not config.systems[label].pretrain:
        return None
    plan = config.pretraining
    return replace(
        plan,
        seed=run.seed,
        data=run.data,
        system=run.system,
        options=dict(run.options),
        model=replace(run.model, tasks=plan.model.tasks),
        tracking=run.tracking,
    )


def override_run(run: FinetuneConfig, keys: Mapping[str, Any], where: str) -> FinetuneConfig:
    """A run with some flat keys set to other values.

    Raises:
        UserError: an unknown key or a wrong value; names it.
    """
    if not keys:
        return run
    tree = configuration.to_dict(run)
    for key, value in keys.items():
        configuration.merge(tree, checked(FinetuneConfig, nested(key, value), where))
    return configuration.build(FinetuneConfig, tree, dict.fromkeys(keys, where))


# -- the ledger ----------------------------------------------------------------------------


def write_study_ledger(study: StudyResult, folder: Path) -> None:
    """Write down what is known of a study."""
    write_json(
        folder / STUDY_LEDGER,
        {
            "name": study.config.name,
            "seeds": {label: study.config.seeds_of(label) for label in study.config.systems},
            "tuning": {label: vars(tuned) for label, tuned in study.tuning.items()},
            "runs": [
                {
                    "system": outcome.group,
                    "seed": outcome.seed,
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
    """What each system got in tuning, and (system, folder) of the finished runs of a study."""
    told = read_json(folder / STUDY_LEDGER)
    known = {f.name for f in fields(TuningResult)}
    tuned = {
        label: TuningResult(**{key: value for key, value in entry.items() if key in known})
        for label, entry in told["tuning"].items()
    }
    runs = [
        (entry["system"], folder / entry["folder"])
        for entry in told["runs"]
        if entry["status"] == "finished"
    ]
    return tuned, runs


def format_settings(settings: Mapping[str, Any]) -> str:
    """``training.lr 0.002, training.weight_decay 0.1``; "as configured" for none."""
    return (
        ", ".join(f"{key} {format_setting(value)}" for key, value in settings.items())
        or "as configured"
    )


def warn_about_failures(study: StudyResult) -> None:
    """Name the final runs that have no result."""
    for outcome in study.failed_runs:
        console.warn(f"{outcome.name} {outcome.status}: {outcome.error or 'no result'}")
