"""Typed settings of a study and of ``skillnet compare``: what ``configs/studies`` fill in."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from pipelines.config.run import FinetuneConfig, PretrainConfig
from pipelines.runs.mirror import RunMirror
from skillnet_platform.config import positional
from skillnet_platform.errors import UserError, nearest
from skillnet_platform.storage import run_root
from skillnet_platform.storage.location import place
from skillnet_platform.tracking import TrackingConfig
from sweeps.config.location import resolve_result_folder
from sweeps.config.space import SearchDimension
from sweeps.config.trials import ResourceConfig


@dataclass
class ClaimsConfig:
    """Thresholds of the claims.

    Args:
        relative: mean relative score to the specialists that SkillNet shall reach.
        margin: a score counts as "at or above" another if the interval of their difference
            lies above minus this, in fractions (0.01 is one point).
        equal_cost: activated parameters count as equal within this share.
    """

    relative: float = 1.02
    margin: float = 0.01
    equal_cost: float = 0.1

    def __post_init__(self) -> None:
        for key in ("relative", "margin", "equal_cost"):
            if getattr(self, key) < 0:
                raise UserError(f"claims.{key} must not be negative, got {getattr(self, key)}")


@dataclass
class SystemConfig:
    """One system of a study.

    Args:
        system: what is trained: ``skillnet``, a baseline, or a third party's system.
        options: options of that system.
        pretrain: start each run from a pretraining of its own, with the run's seed.
        set: flat key -> value, over the study's ``run``, for this system alone.
        reuse_tuning_of: take the settings that were chosen for that system in place of trials of its
            own.
        extra_seeds: seeds beyond the study's, for what is close. Two systems are tested on the
            seeds that both have.
    """

    system: str
    options: dict[str, Any] = field(default_factory=dict)
    pretrain: bool = False
    set: dict[str, Any] = field(default_factory=dict)
    reuse_tuning_of: Optional[str] = None  # noqa: UP045
    extra_seeds: list[int] = field(default_factory=list)


@dataclass
class TuningConfig:
    """The search for training settings that every system gets before its final runs.

    The first trial is the run as configured, the others are spread over the space so that no part
    of a range goes untried: the same for all systems.

    Args:
        trials: per system; 0 tunes nothing.
        space: key -> what it takes, as in a sweep.
        seed: of the trials, and of their points; none of the study's seeds.
        step_fraction: steps of a trial, as a share of the run's.
        points: settings (key -> value) that every system tries besides: where the best lay at an
            end of a range, one beyond it.
    """

    trials: int = 0
    space: dict[str, SearchDimension] = field(default_factory=dict)
    seed: int = 1000
    step_fraction: float = 1.0
    points: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.trials < 0:
            raise UserError(f"tuning.trials must not be negative, got {self.trials}")
        if not 0 < self.step_fraction <= 1:
            raise UserError(
                f"tuning.step_fraction must be above 0 and at most 1, got {self.step_fraction}"
            )
        if self.trials > 1 and not self.space:
            raise UserError("tuning.trials without a tuning.space: name what is to be tuned")


@dataclass
class StudyConfig:
    """Compare systems: run a study, or take finished runs.

    Args:
        runs: finished runs, or studies, to compare: names, folders, URIs; nothing is trained then.
        names: names of their systems in the report, one per configuration, in their order.
        name: of the study and of its folder; of the report.
        run_dir: folder that the study's folder lies in, by default the run root; or a URI
            ("s3://bucket/runs"), which hosts without a common disk share.
        seeds: of the final runs of every system; a system may have more of its own.
        run: what all systems share: data, model, tasks, training.
        pretraining: how systems with ``pretrain`` are pretrained; the sizes of the model are
            those of ``run``.
        systems: name in the report -> system. A name that ends in ``-pretrained`` is held
            against other pretrained ones.
        tuning: the search for training settings that each system gets.
        resources: of one run.
        reference: name of the system that the others are tested against.
        specialist: name of the system whose scores count as 1.
        claims: thresholds of the claims.
        interpret: also show what the skills of the reference do: knock-outs, similarity,
            gradients.
        output: folder of the report; by default the study's own.
        open: open the page in a browser.
        tracking: where it is recorded.
    """

    runs: list[str] = positional([])
    names: list[str] = field(default_factory=list)
    name: Optional[str] = None  # noqa: UP045
    run_dir: Optional[str] = None  # noqa: UP045
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    run: FinetuneConfig = field(default_factory=FinetuneConfig)
    pretraining: PretrainConfig = field(default_factory=PretrainConfig)
    systems: dict[str, SystemConfig] = field(default_factory=dict)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    reference: str = "skillnet"
    specialist: str = "specialist"
    claims: ClaimsConfig = field(default_factory=ClaimsConfig)
    interpret: bool = True
    output: Optional[str] = None  # noqa: UP045
    open: bool = False
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.runs:
            return
        if not self.seeds:
            raise UserError("seeds must not be empty")
        for label in [None, *self.systems]:
            seeds = self.seeds if label is None else self.seeds_of(label)
            key = "seeds" if label is None else f"seeds and systems.{label}.extra_seeds"
            if len(set(seeds)) < len(seeds):
                raise UserError(f"{key} must differ, got {seeds}")
            if self.tuning.trials and self.tuning.seed in seeds:
                raise UserError(
                    f"tuning.seed {self.tuning.seed} is also one of {key}: what is chosen by "
                    "a seed must not be judged by it"
                )
        for label, entry in self.systems.items():
            if "/" in label or label.startswith(".") or not label:
                raise UserError(f"systems: {label!r} cannot be a folder's name")
            other = entry.reuse_tuning_of
            if other is not None and (other == label or other not in self.systems):
                raise UserError(
                    f"systems.{label}.reuse_tuning_of: {other!r} is no other system"
                    f"{nearest(other, self.systems)}"
                )
            if other is not None and self.systems[other].reuse_tuning_of is not None:
                raise UserError(f"systems.{label}.reuse_tuning_of: {other} is not tuned itself")

    def seeds_of(self, label: str) -> list[int]:
        """Seeds of a system's final runs."""
        return [*self.seeds, *self.systems[label].extra_seeds]

    @property
    def folder(self) -> Path:
        """Of the study, on this disk."""
        return self._location[0]

    @property
    def mirror(self) -> RunMirror | None:
        """Its place in a store, if it is kept in one."""
        return self._location[1]

    @property
    def _location(self) -> tuple[Path, RunMirror | None]:
        return resolve_result_folder(place(self.run_dir, run_root()), self.name or "study")
