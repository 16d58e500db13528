"""TODO: sweeps.config.trials."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

from pipelines.evaluation.tables import HEADLINE
from skillnet_platform.errors import UserError, nearest

#: The primary figure of a task with labels, and whether more of it is better.
PRIMARY_METRICS = dict(figure for objective, figure in HEADLINE.items() if objective != "masked")
TrialStatus = Literal["finished", "stopped", "failed", "interrupted"]


@dataclass
class FixedCostConfig:
    """Give every configuration the width at which it costs what the reference costs.

    Args:
        adjust: the width that is set: ``ffn_dim`` (of a skill's feed-forward layer) or ``dim`` (of
            the model, in steps of its heads); none leaves widths alone.
        by: what is held fixed, on average over the tasks: ``activated`` parameters, or
            ``flops`` of one example of full length.
        target: that number; none takes what ``run`` costs.
        tolerance: largest relative difference.
    """

    adjust: Optional[Literal["ffn_dim", "dim"]] = None  # noqa: UP045
    by: Literal["activated", "flops"] = "activated"
    target: Optional[float] = None  # noqa: UP045
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if self.target is not None and self.target <= 0:
            raise UserError(f"fixed_cost.target must be above 0, got {self.target}")
        if not 0 < self.tolerance < 1:
            raise UserError(f"fixed_cost.tolerance must be in (0, 1), got {self.tolerance}")


@dataclass
class ResourceConfig:
    """What one trial takes.

    Args:
        cpus: CPUs of a trial, or of each of its workers where training.workers is above 1; may
            be a fraction.
        gpus: the same for GPUs, along with training.use_gpu: one without the other is refused.
        max_concurrent_trials: trials at the same time; 0 as many as fit.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    max_concurrent_trials: int = 0

    def __post_init__(self) -> None:
        if self.cpus <= 0:
            raise UserError(f"resources.cpus must be above 0, got {self.cpus}")
        if self.gpus < 0:
            raise UserError(f"resources.gpus must not be negative, got {self.gpus}")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise UserError(f"resources.gpus above 1 must be whole, got {self.gpus}")
        if self.max_concurrent_trials < 0:
            raise UserError(
                f"resources.max_concurrent_trials must not be negative, got {self.max_concurrent_trials}"
            )

    def check(self, use_gpu: bool) -> None:
        """Refuse a GPU that is kept and not used, and one that is wanted and not given.

        Raises:
            UserError: says which of the two settings to change.
        """
        if self.gpus and not use_gpu:
            raise UserError(
                f"resources.gpus is {self.gpus:g}, but training.use_gpu is false: it would keep "
                "GPUs and train on CPUs; set training.use_gpu true, or resources.gpus 0"
            )
        if use_gpu and not self.gpus:
            raise UserError(
                "training.use_gpu is true, but resources.gpus is 0: it would be given no GPU; set "
                "resources.gpus (0.25 lets four trials share one), or training.use_gpu false"
            )


@dataclass
class AshaConfig:
    """Asynchronous successive halving (Li et al. 2020): bad trials are stopped early.

    Args:
        grace_period: steps before a trial may be stopped; 0 until its first evaluation.
        reduction_factor: of so many trials that reach a rung, one goes on; rungs lie apart by this factor.
    """

    grace_period: int = 0
    reduction_factor: float = 3.0

    def __post_init__(self) -> None:
        if self.grace_period < 0:
            raise UserError(f"asha.grace_period must not be negative, got {self.grace_period}")
        if self.reduction_factor <= 1:
            raise UserError(f"asha.reduction_factor must be above 1, got {self.reduction_factor}")


@dataclass
class ScoreConfig:
    """How the figures of a trial's evaluation become one number; more is better.

    A task's plain score is its accuracy, its recall at 10, or 1 − token error rate; at least 0: a
    model that says far too much, as untrained ones do, counts as one that says nothing.

    Args:
        kind: ``plain`` is the mean over tasks of the plain scores; ``relative`` divides each
            by its reference first.
        split: the split that is scored.
        tasks: the tasks that count; empty takes all that are evaluated.
        references: task -> plain score that counts as 1, for ``relative``.
    """

    kind: Literal["plain", "relative"] = "plain"
    split: str = "validation"
    tasks: list[str] = field(default_factory=list)
    references: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.split.startswith("test"):
            raise UserError(
                f"score.split {self.split}: a sweep chooses by the validation split; test splits "
                "are for what was chosen"
            )
        for task, value in self.references.items():
            if value <= 0:
                raise UserError(f"score.references.{task} must be above 0, got {value}")

    def check(self, tasks: Sequence[str]) -> None:
        """Raise UserError if a task of the score is not evaluated, or lacks its reference."""
        for name in [*self.tasks, *self.references]:
            if name not in tasks:
                raise UserError(f"score: {name!r} is no evaluated task{nearest(name, tasks)}")
        if self.kind == "relative":
            absent = [name for name in self.tasks or tasks if name not in self.references]
            if absent:
                raise UserError(
                    f"score.kind relative needs score.references.{absent[0]}: the plain score "
                    "that counts as 1"
                )

    def compute_score(self, rows: Sequence[Mapping[str, Any]]) -> tuple[float, dict[str, float]]:
        """The score, and each task's, of tidy evaluation rows."""
        scores: dict[str, float] = {}
        for row in rows:
            if row["split"] == self.split and row["metric"] in PRIMARY_METRICS:
                value = float(row["value"])
                scores[row["task"]] = (
                    value if PRIMARY_METRICS[row["metric"]] else max(1.0 - value, 0.0)
                )
        if self.tasks:
            scores = {name: scores[name] for name in self.tasks}
        if self.kind == "relative":
            scores = {name: value / self.references[name] for name, value in scores.items()}
        if not scores:
            raise UserError(f"no evaluated task has a figure on the split {self.split!r}")
        return sum(scores.values()) / len(scores), scores
