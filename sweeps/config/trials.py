"""Configuration of trials: resources, early stopping, score and fixed cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from annotated_types import Interval

from pipelines.training.config.resources import request_workers
from pipelines.training.config.run import FinetuneConfig, TrainingConfig
from pipelines.training.evaluation.tables import average_scores, compute_overall_score
from pipelines.training.runs.mirror import RunMirror
from skillnet_platform.cluster.resource_request import (
    ResourceRequest,
    collect_locations,
    local_run_dir,
    select_model_paths,
)
from skillnet_platform.config.bounds import NonNegativeCount, PositiveAmount, require_bounds
from skillnet_platform.errors import UserError, suggest_name
from skillnet_platform.storage import directories, run_root
from skillnet_platform.storage.location import Location

TrialStatus = Literal["finished", "stopped", "failed", "interrupted"]


@dataclass
class FixedCostConfig:
    """Set the width of every configuration so that it costs as much as the base run.

    Args:
        adjust: width to set: ffn_dim (of a skill's feed-forward layer) or dim (of the model, in
            multiples of its heads); none disables the adjustment.
        by: cost that is held fixed, mean over the tasks: activated parameters, or flops of one
            example of full length.
        target: cost to reach; none takes the cost of run.
        tolerance: largest relative difference.
    """

    adjust: Literal["ffn_dim", "dim"] | None = None
    by: Literal["activated", "flops"] = "activated"
    target: Annotated[float, Interval(gt=0, le=1e24)] | None = None
    tolerance: Annotated[float, Interval(gt=0, lt=1)] = 0.01

    def __post_init__(self) -> None:
        require_bounds(self, "fixed_cost.")


@dataclass
class ResourceConfig:
    """Resources of one trial.

    Args:
        cpus: CPUs of a trial, or of each of its workers if training.workers is above 1; may be a
            fraction.
        gpus: the same for GPUs; requires training.use_gpu.
        max_concurrent_trials: maximum number of trials at the same time; 0 starts as many as fit.
    """

    cpus: Annotated[float, Interval(gt=0, le=10_000)] = 1.0
    gpus: Annotated[float, Interval(ge=0, le=10_000)] = 0.0
    max_concurrent_trials: NonNegativeCount = 0

    def __post_init__(self) -> None:
        require_bounds(self, "resources.")
        # Ray shares one GPU in fractions, but does not split several GPUs.
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise UserError(f"resources.gpus above 1 must be a whole number, got {self.gpus}")

    def check(self, use_gpu: bool) -> None:
        """Raise UserError if a GPU is reserved but not used, or used but not reserved.

        Args:
            use_gpu: ``training.use_gpu`` of the trials.
        """
        if self.gpus and not use_gpu:
            raise UserError(
                f"resources.gpus is {self.gpus:g}, but training.use_gpu is false: the trial would "
                "reserve GPUs and train on CPUs; set training.use_gpu true, or resources.gpus 0"
            )
        if use_gpu and not self.gpus:
            raise UserError(
                "training.use_gpu is true, but resources.gpus is 0: the trial would get no GPU; "
                "set resources.gpus (0.25 lets four trials share one), or training.use_gpu false"
            )


@dataclass
class AshaConfig:
    """Asynchronous successive halving (Li et al. 2020) stops bad trials early.

    Args:
        grace_period: steps before a trial may be stopped; 0 waits for its first evaluation.
        reduction_factor: one of this number of trials continues past a rung; also the ratio
            between the steps of two rungs.
    """

    grace_period: NonNegativeCount = 0
    reduction_factor: Annotated[float, Interval(gt=1, le=1e6)] = 3.0

    def __post_init__(self) -> None:
        require_bounds(self, "asha.")


@dataclass
class ScoreConfig:
    """Computation of one score from the evaluation of a trial; higher is better.

    The plain score of a task is its accuracy, its recall at 10, 1 − token error rate, or that of
    the metric which ``run.tasks.NAME.metric`` names. It is at least 0: error rates above 1, as of
    untrained models, count as 1.

    Args:
        kind: plain is the mean of the plain scores over tasks; relative first divides each score
            by its reference.
        split: split to score.
        tasks: tasks to include; empty includes all evaluated tasks.
        references: task -> plain score that counts as 1, for relative.
    """

    kind: Literal["plain", "relative"] = "plain"
    split: str = "validation"
    tasks: list[str] = field(default_factory=list)
    references: dict[str, PositiveAmount] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Rejecting test splits here keeps them unseen until the final runs.
        if self.split.startswith("test"):
            raise UserError(
                f"score.split {self.split}: a sweep must not choose settings on a test split; "
                "use the validation split"
            )
        require_bounds(self, "score.")

    def check(self, tasks: Sequence[str]) -> None:
        """Raise UserError if a task of the score is not evaluated or lacks its reference.

        Args:
            tasks: evaluated tasks.
        """
        for name in [*self.tasks, *self.references]:
            if name not in tasks:
                raise UserError(
                    f"score: {name!r} is not an evaluated task{suggest_name(name, tasks)}"
                )
        if self.kind == "relative":
            absent = [name for name in self.tasks or tasks if name not in self.references]
            if absent:
                raise UserError(
                    f"score.kind relative needs score.references.{absent[0]}: give the plain score "
                    "that counts as 1"
                )

    def compute_score(self, rows: Sequence[Mapping[str, Any]]) -> tuple[float, dict[str, float]]:
        """Return the score and the score of each task.

        Args:
            rows: tidy evaluation rows.
        """
        _, scores = compute_overall_score(rows, self.split)
        if self.tasks:
            scores = {name: scores[name] for name in self.tasks}
        if self.kind == "relative":
            scores = {name: value / self.references[name] for name, value in scores.items()}
        if not scores:
            raise UserError(f"no evaluated task has a metric on the split {self.split!r}")
        return average_scores(scores), scores


class TrialsConfig(Protocol):
    """Configuration of a command that runs trials: a sweep or a study."""

    name: str | None
    run_dir: str | None
    resources: ResourceConfig

    @property
    def run(self) -> FinetuneConfig:
        """Configuration of a trial."""


def request_trial(config: TrialsConfig, training: TrainingConfig) -> ResourceRequest:
    """Return the workers of one trial.

    Args:
        config: settings of the sweep or study.
        training: settings of the trial's training.
    """
    return request_workers(training, config.resources.cpus, config.resources.gpus)


def request_run(config: TrialsConfig, training: TrainingConfig) -> ResourceRequest:
    """Return the workers of one trial, with the places of its corpora, models and results.

    Args:
        config: settings of the sweep or study.
        training: settings of the trial's training.
    """
    return replace(
        request_trial(config, training),
        locations=collect_locations(config.run.data, config.run_dir, config.run.storage.mirror),
        models=select_model_paths(config.run.init_from),
        run_dir=local_run_dir(config.run_dir),
        run_name=config.name or "",
    )


def resolve_result_folder(root: Location, name: str) -> tuple[Path, RunMirror | None]:
    """Return the local directory of a sweep or study, and its mirror in an object store.

    Args:
        root: directory or URI that contains the results.
        name: name of the sweep or study.

    Returns:
        The local directory, and the mirror; None if ``root`` is a directory.
    """
    if isinstance(root, Path):
        return root / name, None
    # Files are written locally first, then mirrored to the object store.
    folder = run_root() / name
    return folder, RunMirror(directories.join_uri(root, name), folder)
