"""Configuration of a study and of ``skillnet compare``; the presets are ``configs/studies``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from pipelines.training.config.run import FinetuneConfig, LearningRate, PretrainConfig
from pipelines.training.runs.mirror import RunMirror
from skillnet_evidence.claims import ClaimsConfig
from skillnet_platform.config import command_field, positional_field
from skillnet_platform.config.bounds import (
    NonNegativeCount,
    RandomSeed,
    require_bounds,
)
from skillnet_platform.errors import UserError, suggest_name
from skillnet_platform.storage import run_root
from skillnet_platform.storage.location import parse_location
from skillnet_platform.tracking import TrackingConfig
from skillnet_platform.tracking.backend import STUDY_EXPERIMENT
from sweeps.config.space import SearchDimension
from sweeps.config.trials import ResourceConfig, resolve_result_folder

#: Configuration of a study, and its tuning results and run status.
STUDY_FILE, STUDY_LEDGER = "study.yaml", "study.json"
#: Limits of a study that were found after it, in its directory; one per line.
NOTICE = "notice.txt"
#: Scores of the simple references of a study.
REFERENCES_FILE = "references.json"
#: Smallest fraction of the steps of a run after which its settings are judged.
MIN_STEP_FRACTION = 0.6
#: Distance between the seeds of two folds.
FOLD_SEEDS = 10_000


@dataclass
class SystemConfig:
    """One system of a study.

    Args:
        system: model to train: skillnet, a baseline, or a third-party system.
        options: options of the system.
        pretrain: start each run from its own pretraining, with the seed of the run.
        set: flat key -> value that overrides the study's run for this system. A key that starts
            with ``pretraining.`` overrides the study's pretraining.
        reuse_tuning_of: system whose tuned settings are used instead of own tuning trials. A
            pretrained system that names one without pretraining tunes its own rates.
        rate_per_task: choose the learning rate of each task by its own scores, for a system whose
            tasks share no weights.
        steps_factor: steps of the system as a multiple of the run's, to see whether gaps close.
    """

    system: str
    options: dict[str, Any] = field(default_factory=dict)
    pretrain: bool = False
    set: dict[str, Any] = field(default_factory=dict)
    reuse_tuning_of: str | None = None
    rate_per_task: bool = False
    steps_factor: Annotated[float, Interval(gt=0, le=100)] = 1.0

    def __post_init__(self) -> None:
        require_bounds(self, "systems: ")


@dataclass
class TuningConfig:
    """Search for training settings, equal for every system, before the final runs.

    The settings of the space come first: one trial is the run as configured, the others are spread
    over the space by Latin hypercube sampling. Then every system tries the same learning rates
    with its settings, and takes the top of a parabola over the logarithm of the rate, near the
    best one.

    Args:
        trials: trials per system over the space; 0 keeps the settings as configured.
        space: key -> values, as in a sweep.
        rates: learning rates of the run that every system tries; empty tunes no rate.
        pretraining_rates: learning rates of the pretraining that every pretrained system tries.
        seeds: seeds of each trial; none may be a seed of the study. The first draws the points.
        step_fraction: steps of a trial, as a fraction of the run's steps. Shorter trials prefer
            settings that learn fast.
    """

    trials: NonNegativeCount = 0
    space: dict[str, SearchDimension] = field(default_factory=dict)
    rates: list[LearningRate] = field(default_factory=list)
    pretraining_rates: list[LearningRate] = field(default_factory=list)
    seeds: list[RandomSeed] = field(default_factory=lambda: [1000])
    step_fraction: Annotated[float, Interval(ge=MIN_STEP_FRACTION, le=1)] = 1.0

    def __post_init__(self) -> None:
        require_bounds(self, "tuning.")
        if self.trials > 1 and not self.space:
            raise UserError("tuning.trials needs a tuning.space: name the settings to tune")
        if self.rates and "training.lr" in self.space:
            raise UserError("tuning.space has training.lr, as has tuning.rates; remove one")
        for key in ("rates", "pretraining_rates"):
            given = getattr(self, key)
            if given and len(set(given)) < max(len(given), 3):
                raise UserError(
                    f"tuning.{key}: a parabola needs three or more different rates, got {given}"
                )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"tuning.seeds must be different numbers, got {self.seeds}")

    @property
    def is_enabled(self) -> bool:
        """Whether there is any trial."""
        return bool(self.trials or self.rates or self.pretraining_rates)


def shift_seed(seed: int, fold: int) -> int:
    """Return the seed of a final run: each fold has initial weights of its own.

    Replicates with equal initial weights would not show the variance of these.

    Args:
        seed: one of the study's seeds.
        fold: number of the run's fold; 0 keeps the seed.
    """
    return seed + FOLD_SEEDS * fold


@dataclass
class StudyConfig:
    """Compare systems: run a study, or read finished runs.

    Args:
        runs: finished runs or studies to compare: names, directories or URIs; nothing is trained.
        names: labels of the systems in the report, one per configuration, in order.
        name: name of the study, its directory and the report.
        run_dir: parent of the study's directory, by default the run root; a URI
            ("s3://bucket/runs") for nodes without a shared disk.
        seeds: seeds of the final runs of every system; with ``run.fold``, of each fold.
        folds: number of the folds of ``run.fold`` that are run, from the first; 0 runs all.
        run: settings that all systems share: data, model, tasks, training.
        pretraining: pretraining of the systems with pretrain; model sizes are those of run.
        systems: label -> system. A label that ends in -pretrained is compared with the other
            pretrained systems.
        tuning: search for training settings of each system.
        keep: directory for NAME.parquet and NAME.yaml with the results of each finished replicate,
            without weights; the study resumes from them on another machine. The models of a
            complete replicate are evaluated on the reserve first.
        seal_reserve: evaluate these models on the reserve. Set it to false in a study beside
            another, whose reserve it must not read.
        read_reserve: report all final runs on the reserve of ``run.fold``: once, or again, which
            is recorded.
        resources: resources of one run.
        reference: label of the system that the others are tested against; by default skillnet.
        specialist: label of the system whose scores count as 1; by default specialist.
        claims: claims of the study, with margins and order.
        power: an earlier study, or finished runs: state what this study could decide, given their
            variances; nothing is trained.
        interpret: add figures about the skills of the reference: ablations, similarity,
            gradients.
        output: directory of the report; by default the study's directory.
        open: open the page in a browser.
        tracking: MLflow settings.
    """

    runs: list[str] = positional_field([])
    names: list[str] = field(default_factory=list)
    name: str | None = None
    run_dir: str | None = None
    seeds: list[RandomSeed] = field(default_factory=lambda: [0, 1, 2])
    folds: NonNegativeCount = 0
    run: FinetuneConfig = command_field(FinetuneConfig, "finetune")
    pretraining: PretrainConfig = command_field(PretrainConfig, "pretrain")
    systems: dict[str, SystemConfig] = field(default_factory=dict)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    keep: str | None = None
    seal_reserve: bool = True
    read_reserve: Literal["never", "once", "again"] = "never"
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    reference: str | None = None
    specialist: str | None = None
    claims: ClaimsConfig = field(default_factory=ClaimsConfig)
    power: list[str] = field(default_factory=list)
    interpret: bool = True
    output: str | None = None
    open: bool = False
    tracking: TrackingConfig = field(
        default_factory=lambda: TrackingConfig(experiment=STUDY_EXPERIMENT)
    )

    def __post_init__(self) -> None:
        # Finished runs have their own seeds and systems, so the study's keys are not used.
        if self.runs:
            return
        if not self.seeds:
            raise UserError("seeds must not be empty")
        if self.folds > self.run.fold.count:
            raise UserError(
                f"folds: {self.folds} folds are more than the {self.run.fold.count} of "
                "run.fold.count"
            )
        if self.read_reserve != "never" and not self.seal_reserve:
            raise UserError(
                "read_reserve: the study does not read its reserve (seal_reserve: false)"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds must differ, got {self.seeds}")
        if self.run.fold.count and max(self.seeds) >= FOLD_SEEDS:
            raise UserError(
                f"seeds: {max(self.seeds)} may be the seed of another fold; choose seeds below "
                f"{FOLD_SEEDS:,}"
            )
        # Settings chosen with a seed of a final run would favour that run.
        final = {shift_seed(seed, fold) for seed in self.seeds for fold in self.fold_numbers}
        both = sorted(final & set(self.tuning.seeds)) if self.tuning.is_enabled else []
        if both:
            raise UserError(
                f"tuning.seeds {both} are also seeds: settings must not be chosen and evaluated "
                "with one seed; choose other tuning.seeds"
            )
        for label, entry in self.systems.items():
            if "/" in label or label.startswith(".") or not label:
                raise UserError(f"systems: {label!r} is not a valid directory name; rename it")
            other = entry.reuse_tuning_of
            if other is not None and (other == label or other not in self.systems):
                raise UserError(
                    f"systems.{label}.reuse_tuning_of: {other!r} is not another system"
                    f"{suggest_name(other, self.systems)}"
                )
            # A chain of references would make the number of trials per system unclear.
            if other is not None and self.systems[other].reuse_tuning_of is not None:
                raise UserError(
                    f"systems.{label}.reuse_tuning_of: {other} has no tuning trials; name a system "
                    "that has"
                )

    @property
    def fold_numbers(self) -> range:
        """Numbers of the folds of the final runs; only 0 without folds."""
        return range(self.folds or max(self.run.fold.count, 1))

    @property
    def folder(self) -> Path:
        """Local directory of the study."""
        return self._location[0]

    @property
    def mirror(self) -> RunMirror | None:
        """Mirror of the study in an object store, or None."""
        return self._location[1]

    @property
    def _location(self) -> tuple[Path, RunMirror | None]:
        return resolve_result_folder(parse_location(self.run_dir, run_root()), self.name or "study")
