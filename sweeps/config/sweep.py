"""Configuration of a sweep; the presets are ``configs/sweeps``."""

from dataclasses import dataclass, field
from typing import Literal

from pipelines.training.config.run import FinetuneConfig
from skillnet_platform.config import command_field
from skillnet_platform.config.bounds import (
    NonNegativeCount,
    PositiveCount,
    RandomSeed,
    require_bounds,
)
from skillnet_platform.errors import UserError
from skillnet_platform.tracking import TrackingConfig
from skillnet_platform.tracking.backend import SWEEP_EXPERIMENT
from sweeps.config.space import SearchDimension
from sweeps.config.trials import AshaConfig, FixedCostConfig, ResourceConfig, ScoreConfig


@dataclass
class SweepConfig:
    """Train many runs over a search space and rank them on the validation split.

    Args:
        name: name of the sweep and its directory; the name of an unfinished sweep resumes it.
            None generates a name.
        run_dir: parent directory or URI; by default the run root.
        run: base run, as for skillnet finetune; a file may include a preset, such as
            run: {include: tiny}.
        space: key of the run -> values; see docs/sweeps.md.
        search: grid tries every combination, random draws points, optuna proposes points with the
            tree-structured Parzen estimator.
        samples: configurations that random or optuna try; grids in the space multiply the number.
        seeds: seeds of each configuration; its score is the mean over them. More can be added
            later, except with optuna or asha.
        search_seed: seed of the search.
        scheduler: asha stops bad trials early, none runs all trials to the end.
        asha: settings of asha.
        score: computation of a trial's score.
        fixed_cost: set the width of every configuration so that it costs as much as run.
        resources: resources of one trial.
        keep: number of best configurations whose models and checkpoints are kept.
        max_failures: restarts of a trial whose process died.
        tracking: MLflow settings of the sweep and its trials.
    """

    name: str | None = None
    run_dir: str | None = None
    run: FinetuneConfig = command_field(FinetuneConfig, "finetune")
    space: dict[str, SearchDimension] = field(default_factory=dict)
    search: Literal["grid", "random", "optuna"] = "grid"
    samples: PositiveCount = 8
    seeds: list[RandomSeed] = field(default_factory=lambda: [0])
    search_seed: RandomSeed = 0
    scheduler: Literal["none", "asha"] = "none"
    asha: AshaConfig = field(default_factory=AshaConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    fixed_cost: FixedCostConfig = field(default_factory=FixedCostConfig)
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    keep: NonNegativeCount = 1
    max_failures: NonNegativeCount = 1
    tracking: TrackingConfig = field(
        default_factory=lambda: TrackingConfig(experiment=SWEEP_EXPERIMENT)
    )

    def __post_init__(self) -> None:
        require_bounds(self)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds must be a list of different numbers, got {self.seeds}")
