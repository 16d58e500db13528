"""Dense: one model for all tasks, of which everything is always active.

SkillNet with a single skill, whose feed-forward layers are as wide as the comparison wants; stems,
heads, depth, attention and regularisation are SkillNet's own.
"""

from dataclasses import dataclass
from typing import Any, Literal

from skillnet.baselines import size_matching
from skillnet.config import SkillNetConfig
from skillnet.model import SkillNet
from skillnet.systems import System

SKILL = "dense"


@dataclass(frozen=True)
class DenseOptions:
    """How large the model is.

    Args:
        size: what it has in common with the study's SkillNet. ``activated``: as many parameters
            as a task of SkillNet activates, on average over tasks; ``total``: as many as
            SkillNet has; ``executed``: as many operations per example, on average.
        ffn_dim: feed-forward width; none follows from ``size``.
    """

    size: Literal["activated", "total", "executed"] = "activated"
    ffn_dim: int | None = None

    def __post_init__(self) -> None:
        if self.size not in ("activated", "total", "executed"):
            raise ValueError(f"options.size is activated, total or executed, not {self.size!r}")
        if self.ffn_dim is not None and self.ffn_dim < 1:
            raise ValueError(f"options.ffn_dim must be at least 1, got {self.ffn_dim}")


class Dense(SkillNet):
    """SkillNet with one skill."""

    system = "dense"


def configure(config: SkillNetConfig, options: DenseOptions) -> SkillNetConfig:
    """The study's configuration with one skill, as wide as the options say."""
    return size_matching.one_skill(config, SKILL, options.ffn_dim or _width(config, options))


def _width(config: SkillNetConfig, options: DenseOptions) -> int:
    if options.size == "executed":
        return size_matching.rounded(size_matching.executed_width(config))
    measure: Any = size_matching.total if options.size == "total" else size_matching.activated
    each = 2 * config.dim * config.num_layers
    narrow = size_matching.total(size_matching.one_skill(config, SKILL, 1))
    return size_matching.solve_width(measure(config), narrow - each, each, "options.ffn_dim")


DENSE = System(
    "dense",
    Dense,
    configure,
    DenseOptions,
    summary="one model for all tasks, everything always active",
)
