"""Dense baseline: one model for all tasks, with all weights always active.

It is a SkillNet with a single skill, whose feed-forward width follows from the comparison. Stems,
heads, layers, attention and regularization are those of SkillNet.
"""

from dataclasses import dataclass
from typing import Any, Literal

from skillnet.baselines import size_matching
from skillnet.bounds import LayerSize, check_bounds
from skillnet.config import SkillNetConfig
from skillnet.model import SkillNet
from skillnet.systems import System

SKILL = "dense"


@dataclass(frozen=True)
class DenseOptions:
    """Size of the dense baseline.

    Args:
        size: quantity to match with the study's SkillNet. ``activated``: the parameters that a task
            activates, on average over tasks; ``total``: all parameters; ``executed``: operations
            per example, on average.
        ffn_dim: feed-forward width; None derives it from ``size``.
    """

    size: Literal["activated", "total", "executed"] = "activated"
    ffn_dim: LayerSize | None = None

    def __post_init__(self) -> None:
        if self.size not in ("activated", "total", "executed"):
            raise ValueError(f"options.size is activated, total or executed, not {self.size!r}")
        check_bounds(self, "options.")


class DenseModel(SkillNet):
    """SkillNet with one skill that every task activates."""

    system = "dense"
    options_class = DenseOptions


def configure_dense(config: SkillNetConfig, options: DenseOptions) -> SkillNetConfig:
    """Return the study's configuration with one skill of the width that the options request.

    Args:
        config: configuration of the study.
        options: size of the baseline.
    """
    return size_matching.one_skill(config, SKILL, options.ffn_dim or _width(config, options))


def _width(config: SkillNetConfig, options: DenseOptions) -> int:
    if options.size == "executed":
        return size_matching.round_width(size_matching.executed_width(config))
    measure: Any = (
        size_matching.total_params
        if options.size == "total"
        else size_matching.mean_activated_params
    )
    # Parameters are linear in the width, so two evaluations give the line.
    each = 2 * config.dim * config.num_layers
    narrow = size_matching.total_params(size_matching.one_skill(config, SKILL, 1))
    return size_matching.solve_width(measure(config), narrow - each, each, "options.ffn_dim")


DENSE = System(
    "dense",
    DenseModel,
    configure_dense,
    summary="one model for all tasks, everything always active",
)
