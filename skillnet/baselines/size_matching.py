"""Width of a baseline that costs as much as a SkillNet; docs/baselines.md has the rules.

Only Transformer layers are compared. Heads, and for the dense and mixture-of-experts baselines
also stems, are equal on both sides and cancel out.

The mean is over the reference tasks of the configuration. A run sets them to the tasks that it
trains and evaluates. A pretraining keeps those of fine-tuning, so both build baselines of one size.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import torch

from skillnet.config import SkillNetConfig
from skillnet.encoder import Encoder, EncoderLayer
from skillnet.modality import find_modality
from skillnet.objectives.base import find_objective
from skillnet.skill_weights import find_weight_skill
from skillnet.skills import SkillPlan, Task

#: Largest relative change of a width that makes it a multiple of a power of two (faster products).
TOLERANCE = 0.005


def reference_tasks(config: SkillNetConfig) -> dict[str, Task]:
    """Return the tasks over which costs are averaged.

    These are the reference tasks of the configuration. A configuration without them, or of a
    baseline whose skills they do not name, is measured on its own tasks, without masked modelling
    if it has others.
    """
    given = config.reference_tasks
    if given and all(set(task.skills) <= set(config.skills) for task in given.values()):
        return given
    measured = {
        name: task
        for name, task in config.tasks.items()
        if find_objective(task.objective).has_labels
    }
    return measured or config.tasks


def compared_config(config: SkillNetConfig) -> SkillNetConfig:
    """Return the configuration with the reference tasks as its only tasks."""
    return dataclasses.replace(config, tasks=reference_tasks(config), reference_tasks={})


def mean_activated_params(config: SkillNetConfig) -> float:
    """Return the mean number of parameters of SkillNet's layers that a task activates."""
    encoder = _encoder(config)
    tasks = reference_tasks(config)
    counts = [_count(encoder, config.find_sources(task.skills)) for task in tasks.values()]
    return sum(counts) / len(counts)


def total_params(config: SkillNetConfig) -> int:
    """Return the number of parameters of SkillNet's layers."""
    return _count(_encoder(config), config.skills)


def one_skill(
    config: SkillNetConfig, name: str, hidden: int, layers: int | None = None
) -> SkillNetConfig:
    """Return the configuration with one skill, active in every tower and layer.

    Args:
        config: configuration of the study.
        name: key of the skill in ``model.skills``.
        hidden: feed-forward width.
        layers: depth; None keeps that of the study.
    """
    return dataclasses.replace(
        config,
        skills=(name,),
        tasks=_replace_skills(config.tasks, lambda plan: name),
        ffn_dim=hidden,
        num_layers=layers or config.num_layers,
        skill_modules="both",
        skill_every=1,
        skill_rank=0,
        low_rank_skills={},
    )


def modality_skills(
    config: SkillNetConfig, modalities: Iterable[str], hidden: int, layers: int
) -> SkillNetConfig:
    """Return the configuration with one feed-forward network per modality and shared attention.

    Args:
        config: configuration of the study.
        modalities: names of the networks.
        hidden: width of each network.
        layers: depth.
    """
    return dataclasses.replace(
        config,
        skills=tuple(modalities),
        tasks=_replace_skills(config.tasks, lambda plan: plan.modality),
        ffn_dim=hidden,
        num_layers=layers,
        skill_modules="feedforward",
        skill_every=1,
        skill_rank=0,
        low_rank_skills={},
    )


def _replace_skills(
    tasks: Mapping[str, Task], skill_of: Callable[[SkillPlan], str]
) -> dict[str, Task]:
    return {
        name: dataclasses.replace(
            task,
            towers={t: SkillPlan((skill_of(p),), p.modality) for t, p in task.towers.items()},
        )
        for name, task in tasks.items()
    }


@dataclasses.dataclass(frozen=True)
class LayerBudget:
    """Size of a stack of equal layers, as a linear function of depth and width.

    The size is ``fixed + layers * (per_layer + per_unit * width)``: parameters, or operations per
    token.

    Args:
        wanted: size of the layers of the study's SkillNet.
        fixed: part that depends on neither depth nor width.
        per_layer: part of a layer that does not depend on the width.
        per_unit: part of a layer per unit of feed-forward width.
    """

    wanted: float
    fixed: float
    per_layer: float
    per_unit: float

    @classmethod
    def of(cls, config: SkillNetConfig, size: str, networks: float) -> "LayerBudget":
        """Return the budget of a baseline with shared attention.

        Args:
            config: configuration of the study.
            size: ``activated``, ``executed`` or ``total``.
            networks: feed-forward networks of a layer that count.
        """
        if size == "executed":
            attention = attention_operations(config)
            return cls(executed_operations(config), 0, attention, 4 * config.dim * networks)
        one = total_params(one_skill(config, "one", 1, layers=1))
        two = total_params(one_skill(config, "one", 1, layers=2))
        # Parameters of a network per unit of width.
        per_unit = 2 * config.dim + config.bias
        wanted = total_params(config) if size == "total" else mean_activated_params(config)
        return cls(wanted, 2 * one - two, two - one - per_unit, per_unit * networks)

    def fitting_layers(self, width: int) -> int:
        """Return the largest number of layers of a width that fits; at least 1."""
        return max(int((self.wanted - self.fixed) / (self.per_layer + self.per_unit * width)), 1)

    def width_at(self, layers: int, where: str) -> int:
        """Return the rounded width at which a number of layers has the wanted size.

        Raises:
            ValueError: nothing is left for the feed-forward layer.
        """
        fixed = self.fixed + layers * self.per_layer
        return solve_width(self.wanted, fixed, layers * self.per_unit, where)


def attention_operations(config: SkillNetConfig) -> float:
    """Return the operations of a token in the attention of one layer, mean over tokens."""
    # Projections, and the products of scores and values.
    return _average_tokens(config, lambda _, n: n * (8 * config.dim**2 + 4 * config.dim * n))


def executed_operations(config: SkillNetConfig) -> float:
    """Return the operations of a token in all layers, mean over tokens of the longest examples.

    The cost of attention does not depend on the number of merged skills. The width of a layer is
    the mean executed width of SkillNet's feed-forward layers, over layers and tokens.
    """
    layers = [layer for layer in _encoder(config).layers if isinstance(layer, EncoderLayer)]

    def add_widths(plan: SkillPlan, tokens: int) -> float:
        active = (len(plan.skills) if layer.feedforward_skills else 1 for layer in layers)
        return tokens * config.ffn_dim * sum(active) / len(layers)

    feedforward = 4 * config.dim * _average_tokens(config, add_widths)
    return config.num_layers * (attention_operations(config) + feedforward)


def _average_tokens(config: SkillNetConfig, add_costs: Callable[[SkillPlan, int], float]) -> float:
    """Return the mean cost of a token of the longest examples, from the sum of each example."""
    work = count = 0.0
    for task in reference_tasks(config).values():
        for plan in task.towers.values():
            tokens: int = find_modality(plan.modality).tensor_half.count_tokens(config)
            work += add_costs(plan, tokens)
            count += tokens
    return work / count


#: Option ``size`` of a baseline -> the quantity in words, and the function that measures it.
QUANTITIES: dict[str, tuple[str, Callable[[SkillNetConfig], float]]] = {
    "activated": ("activated parameters", mean_activated_params),
    "executed": ("executed operations", executed_operations),
    "total": ("total parameters", total_params),
}


def solve_width(wanted: float, fixed: float, each: float, where: str) -> int:
    """Solve ``fixed + each * h = wanted`` for the width h, rounded by :func:`round_width`.

    Args:
        wanted: number of parameters.
        fixed: parameters that do not depend on the width.
        each: parameters per unit of width.
        where: option of the width, for the message.

    Raises:
        ValueError: no parameters are left for the feed-forward layer.
    """
    if wanted < fixed + each:
        raise ValueError(
            f"{where}: SkillNet's {wanted:.0f} parameters are fewer than those of the other "
            f"layers, {fixed:.0f}; set {where} explicitly"
        )
    return round_width((wanted - fixed) / each)


def round_width(width: float) -> int:
    """Round to the multiple of the largest power of two that changes the width by at most 0.5 %."""
    # Matrix kernels are fastest at multiples of large powers of two.
    for step in (64, 32, 16, 8, 4, 2):
        near = round(width / step) * step
        if near and abs(near - width) <= TOLERANCE * width:
            return near
    return max(round(width), 1)


def _encoder(config: SkillNetConfig) -> Encoder:
    # The meta device has shapes only: no memory is allocated and no random number is drawn.
    with torch.device("meta"):
        return Encoder(config)


def _count(encoder: Encoder, skills: Iterable[str]) -> int:
    """Count the parameters of an encoder that a set of active skills reads."""
    names = {*skills, "shared", None}
    return sum(
        p.numel() for name, p in encoder.named_parameters() if find_weight_skill(name) in names
    )
