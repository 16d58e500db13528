"""Dense baseline: one model for all tasks, with all weights always active.

It is a SkillNet with a single skill, whose feed-forward width or depth follows from the comparison.
Stems, heads, layers, attention and regularization are those of SkillNet. With one feed-forward
network per modality it is the sparsity of Mixture-of-Transformers (Liang et al. 2024) in the
feed-forward layers alone.
"""

from dataclasses import dataclass
from typing import Literal

from skillnet.baselines import size_matching
from skillnet.bounds import LayerSize, check_bounds
from skillnet.config import SkillNetConfig
from skillnet.modality import modality_names
from skillnet.model import SkillNet
from skillnet.systems import SizeMatch, System

SKILL = "dense"


@dataclass(frozen=True)
class DenseOptions:
    """Size of the dense baseline.

    Args:
        size: quantity to match with the study's SkillNet, on average over the reference tasks.
            ``activated``: the parameters that a task activates; ``executed``: operations per
            example; ``total``: the parameters of all skills together, so that every task
            activates as many as the study's SkillNet has.
        shape: dimension that is solved for. ``width``: feed-forward width at the study's depth;
            ``depth``: as many layers as fit at the width of one skill, and their width matches the
            rest.
        feedforward: ``shared``: one feed-forward network for all inputs; ``modality``: one per
            modality, with shared attention.
        ffn_dim: feed-forward width; None derives it from ``size``.
    """

    size: Literal["activated", "executed", "total"] = "activated"
    shape: Literal["width", "depth"] = "width"
    feedforward: Literal["shared", "modality"] = "shared"
    ffn_dim: LayerSize | None = None

    def __post_init__(self) -> None:
        check_bounds(self, "options.")
        if self.ffn_dim is not None and self.shape == "depth":
            raise ValueError(
                "options.shape depth derives the width; remove options.ffn_dim, or set "
                "model.num_layers and options.ffn_dim of a dense model of shape width"
            )


class DenseModel(SkillNet):
    """SkillNet with one skill that every task activates."""

    system = "dense"
    options_class = DenseOptions


def configure_dense(config: SkillNetConfig, options: DenseOptions) -> SkillNetConfig:
    """Return the study's configuration with the depth and the width that the options request.

    Args:
        config: configuration of the study.
        options: size of the baseline.

    Raises:
        ValueError: no width gives the requested size.
    """
    layers, width = config.num_layers, options.ffn_dim
    if width is None:
        budget = size_matching.LayerBudget.of(
            config, options.size, _active_networks(config, options)
        )
        if options.shape == "depth":
            layers = budget.fitting_layers(config.ffn_dim)
        width = budget.width_at(layers, "options.ffn_dim")
    if options.feedforward == "modality":
        return size_matching.modality_skills(config, _modalities(config), width, layers)
    return size_matching.one_skill(config, SKILL, width, layers)


def _active_networks(config: SkillNetConfig, options: DenseOptions) -> float:
    """Return how many feed-forward networks of a layer the matched quantity counts."""
    if options.feedforward == "shared" or options.size == "executed":
        return 1
    if options.size == "total":
        return len(_modalities(config))
    tasks = size_matching.reference_tasks(config).values()
    return sum(len({p.modality for p in task.towers.values()}) for task in tasks) / len(tasks)


def _modalities(config: SkillNetConfig) -> list[str]:
    # Those of the compared tasks too, so that pretraining and fine-tuning build one model.
    tasks = [*config.tasks.values(), *size_matching.reference_tasks(config).values()]
    read = {plan.modality for task in tasks for plan in task.towers.values()}
    return [name for name in modality_names() if name in read]


def measure_dense(config: SkillNetConfig, options: DenseOptions) -> SizeMatch:
    """Return the size that the options aim at and the size of the dense layers.

    Args:
        config: configuration of the study.
        options: size of the baseline.
    """
    compared = size_matching.compared_config(config)
    own = configure_dense(compared, options)
    quantity, count = size_matching.QUANTITIES[options.size]
    return SizeMatch(quantity, count(compared), count(own))


DENSE = System(
    "dense",
    DenseModel,
    configure_dense,
    measure_dense,
    summary="one model for all tasks, everything always active",
)
