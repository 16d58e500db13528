"""Typed settings of a sweep: what ``configs/sweeps/*.yaml`` and the command line fill in."""

from dataclasses import dataclass, field
from typing import Literal, Optional

from pipelines.config.run import FinetuneConfig
from skillnet_platform.errors import UserError
from skillnet_platform.tracking import TrackingConfig
from sweeps.config.space import SearchDimension
from sweeps.config.trials import AshaConfig, FixedCostConfig, ResourceConfig, ScoreConfig


@dataclass
class SweepConfig:
    """Many runs over a space of settings, ranked on the validation split.

    Args:
        name: name of the sweep and of its directory; the name of an unfinished one goes on with
            it. None makes a fresh name.
        run_dir: directory of runs; none takes the run root.
        run: the run that is varied, as ``skillnet finetune`` takes it; in a file it may start from
            a preset: ``run: {include: tiny}``.
        space: key of the run -> what it takes; see docs/sweeps.md.
        search: ``grid`` tries every combination of listed values, ``random`` draws, ``optuna``
            lets the tree-structured Parzen estimator choose from what it has seen.
        samples: configurations that random or optuna try; grids inside the space multiply it.
        seeds: repeats; a configuration's score is the mean over them. Without Optuna and without
            stopping early, more may be added to a sweep, finished or not.
        search_seed: of the drawing of configurations.
        scheduler: ``asha`` stops bad trials early, ``none`` runs all to their end.
        asha: how early.
        score: how the figures of a trial become one number.
        fixed_cost: give every configuration the width at which it costs what ``run`` costs.
        resources: of one trial.
        keep: configurations, best first, whose models and checkpoints stay on disk.
        max_failures: times that a trial whose process died is started again.
        tracking: where the sweep and its trials are recorded.
    """

    name: Optional[str] = None  # noqa: UP045
    run_dir: Optional[str] = None  # noqa: UP045
    run: FinetuneConfig = field(default_factory=FinetuneConfig)
    space: dict[str, SearchDimension] = field(default_factory=dict)
    search: Literal["grid", "random", "optuna"] = "grid"
    samples: int = 8
    seeds: list[int] = field(default_factory=lambda: [0])
    search_seed: int = 0
    scheduler: Literal["none", "asha"] = "none"
    asha: AshaConfig = field(default_factory=AshaConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    fixed_cost: FixedCostConfig = field(default_factory=FixedCostConfig)
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    keep: int = 1
    max_failures: int = 1
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples must be at least 1, got {self.samples}")
        if self.keep < 0 or self.max_failures < 0:
            raise UserError("keep and max_failures must not be negative")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds is a list of different numbers, got {self.seeds}")
