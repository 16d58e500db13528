"""Mixture of experts: a router selects per token where SkillNet's plans select per task.

Stems, heads, attention and number of layers are those of SkillNet. In every n-th layer, experts
(:mod:`skillnet.baselines.moe_layers`) replace the feed-forward part.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor

from skillnet.baselines import moe_layers, size_matching
from skillnet.baselines.moe_layers import ExpertFeedForward, RoutingResult
from skillnet.bounds import DropProbability, LayerSize, check_bounds
from skillnet.config import SkillNetConfig
from skillnet.encoder import Encoder, EncoderLayer
from skillnet.layers import LayerWeights, PackedRows, Padding, RaggedRows, Skills
from skillnet.model import SkillNet
from skillnet.multitask_model import Batch, Outputs
from skillnet.systems import SizeMatch, System

SKILL = "moe"


#: Weight of an auxiliary loss, relative to the loss of the task.
LossWeight = Annotated[float, Interval(ge=0, le=1000)]


@dataclass(frozen=True)
class MoEOptions:
    """Experts and their router.

    Args:
        experts: experts per layer.
        top_k: experts per token.
        size: quantity that ``top_k`` experts and the remaining layers match, on average over the
            tasks. ``activated``: the parameters that a task of SkillNet activates; ``executed``:
            operations per example.
        ffn_dim: feed-forward width of one expert; None derives it from ``size``.
        every: every n-th layer has experts. The feed-forward part of the other layers has ``top_k``
            times the width of an expert.
        balance: weight of the load balancing loss of a layer.
        z: weight of the router's z-loss of a layer.
        jitter: noise on the router's input in training, see ``TopKRouter``.

    Raises:
        ValueError: a value outside its range.
    """

    experts: LayerSize = 8
    top_k: LayerSize = 2
    size: Literal["activated", "executed"] = "activated"
    ffn_dim: LayerSize | None = None
    every: LayerSize = 1
    balance: LossWeight = 0.01
    z: LossWeight = 0.001
    jitter: DropProbability = 0.0

    def __post_init__(self) -> None:
        check_bounds(self, "options.")
        if self.experts <= self.top_k:
            raise ValueError(
                f"options.experts must be more than options.top_k {self.top_k}, got {self.experts}"
            )


class ExpertLayer(EncoderLayer):
    """Encoder layer with experts as feed-forward part. In training it stores its last routings.

    ``config.ffn_dim`` is the total width of the experts of a token.
    """

    def __init__(self, config: SkillNetConfig, index: int, options: MoEOptions) -> None:
        super().__init__(config, index)
        hidden = config.ffn_dim // options.top_k
        std = config.init_scale * config.dim**-0.5
        self.feedforward = ExpertFeedForward(  # type: ignore[assignment]
            config.dim,
            hidden,
            options.experts,
            options.top_k,
            std=std,
            out_std=config.init_scale * hidden**-0.5 * (2 * config.num_layers) ** -0.5,
            jitter=options.jitter,
        )
        self.routings: list[RoutingResult] = []
        self.stores_routings = False

    def merge_weights(self, x_BTD: Tensor, skills: Skills) -> LayerWeights:
        attention, _ = self._own(skills)
        return LayerWeights(self.attention.merge(x_BTD, attention), (), self.list_norms())

    def _feed(self, x_BTD: Tensor, weights: LayerWeights, padding: Padding) -> Tensor:
        x = self.normalize_input(x_BTD, weights.norms[1])
        if isinstance(padding, PackedRows):
            # Copies that fill up packed tokens are no load of an expert.
            y, routing = self.feedforward(x[: padding.real])
            y = F.pad(y, (0, 0, 0, len(x) - padding.real))
        elif isinstance(padding, RaggedRows):
            y, routing = self.feedforward(x, padding.mask_BT)
        else:
            # The bias is 0 at real tokens. Its rows are already those that drop path keeps.
            mask_BT = None if padding is None else padding[:, 0, 0] == 0
            y, routing = self.feedforward(x, mask_BT)
        if self.training and self.stores_routings:
            self.routings.append(routing)
        return y


class ExpertEncoder(Encoder):
    """Encoder with experts in every n-th layer."""

    # The rows of an expert depend on values.
    can_compile = False

    def __init__(self, config: SkillNetConfig, options: MoEOptions) -> None:
        super().__init__(config)
        # A dropped row must not be routed: it would count as load of an expert.
        self.can_mask_rows = False
        for index in range(options.every - 1, config.num_layers, options.every):
            self.layers[index] = ExpertLayer(config, index, options)


class MoE(SkillNet):
    """SkillNet with one skill and experts as feed-forward layers."""

    system = "moe"
    options_class = MoEOptions

    def __init__(self, config: SkillNetConfig, options: MoEOptions | None = None) -> None:
        options = options or MoEOptions()
        super().__init__(config, options)
        self.coefficients = {"balance": options.balance, "z": options.z}
        self.encoder = ExpertEncoder(config, options)

    @property
    def expert_layers(self) -> list[ExpertLayer]:
        """The layers with experts."""
        return [layer for layer in self.encoder.layers if isinstance(layer, ExpertLayer)]

    def forward(self, task: str, towers: dict[str, Batch]) -> Outputs:
        """Run a task; the routings of the previous pass are cleared first."""
        # Routings are kept per pass, because the balancing loss averages over the towers.
        for layer in self.expert_layers:
            layer.routings.clear()
            layer.stores_routings = True
        outputs = super().forward(task, towers)
        # The backward pass may compute a layer again; its routing then is one of those stored.
        for layer in self.expert_layers:
            layer.stores_routings = False
        return outputs

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Return the weighted balance and z losses: sums over layers of means over towers."""
        losses = {"balance": moe_layers.balance_loss, "z": moe_layers.z_loss}
        found = {}
        for name, weight in self.coefficients.items():
            layers = [
                _over(layer.routings, losses[name])
                for layer in self.expert_layers
                if layer.routings
            ]
            if weight and layers:
                found[name] = weight * torch.stack(layers).sum()
        return found

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """Return entropy (share of its maximum) and loads of experts (multiples of even).

        ``moe/…`` are means over layers, or the extreme of all layers. ``moe/layer_<n>/…`` are
        single layers, counted from 0.
        """
        found: dict[str, dict[str, float]] = {}
        for index, layer in enumerate(self.encoder.layers):
            if not isinstance(layer, ExpertLayer) or not layer.routings:
                continue
            loads_E = _over(layer.routings, moe_layers.expert_load)
            count = len(loads_E)
            found[f"layer_{index}"] = {
                "router_entropy": float(_over(layer.routings, moe_layers.router_entropy))
                / math.log(count),
                "load_max": float(loads_E.max()) * count,
                "load_min": float(loads_E.min()) * count,
                "balance": float(_over(layer.routings, moe_layers.balance_loss)),
                "z": float(_over(layer.routings, moe_layers.z_loss)),
            }
        if not found:
            return {}
        over: dict[str, Any] = {"load_max": max, "load_min": min}
        values = {
            f"moe/{what}": over.get(what, _mean)([layer[what] for layer in found.values()])
            for what in next(iter(found.values()))
        }
        return values | {
            f"moe/{layer}/{what}": value
            for layer, figures in found.items()
            for what, value in figures.items()
        }

    def activated_parameters(self, task: str) -> int:
        """Return the parameters that one example reads, with ``top_k`` experts per layer."""
        everything = super().activated_parameters(task)
        idle = 0
        for layer in self.expert_layers:
            feedforward = layer.feedforward
            assert isinstance(feedforward, ExpertFeedForward)
            each = feedforward.up[0].numel() + feedforward.down[0].numel()
            idle += (len(feedforward.up) - feedforward.router.top_k) * each
        return everything - idle


def configure_moe(config: SkillNetConfig, options: MoEOptions) -> SkillNetConfig:
    """Return the study's configuration with one skill of the total width of a token's experts.

    Args:
        config: configuration of the study.
        options: number and width of the experts.
    """
    hidden = options.ffn_dim or _width(config, options)
    return size_matching.one_skill(config, SKILL, hidden * options.top_k)


def _width(config: SkillNetConfig, options: MoEOptions) -> int:
    budget = size_matching.LayerBudget.of(config, options.size, options.top_k)
    # The router has a part of the budget, so experts get a little narrower.
    budget = replace(budget, fixed=budget.fixed + _count_routers(config, options))
    return budget.width_at(config.num_layers, "options.ffn_dim")


def _count_routers(config: SkillNetConfig, options: MoEOptions) -> int:
    """Return the size of all routers: their weights, or the operations of a token."""
    weights = config.num_layers // options.every * options.experts * config.dim
    # A product and a sum per weight and token.
    return weights * (2 if options.size == "executed" else 1)


def measure_moe(config: SkillNetConfig, options: MoEOptions) -> SizeMatch:
    """Return the size that the options aim at and the size of the layers with a token's experts.

    Args:
        config: configuration of the study.
        options: number and width of the experts.
    """
    compared = size_matching.compared_config(config)
    own = configure_moe(compared, options)
    quantity, count = size_matching.QUANTITIES[options.size]
    return SizeMatch(quantity, count(compared), count(own) + _count_routers(config, options))


def _over(routings: list[RoutingResult], what: Callable[[RoutingResult], Tensor]) -> Tensor:
    """Average a function of the routings over the passes of a task's towers."""
    return torch.stack([what(routing) for routing in routings]).mean(0)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


MOE = System(
    "moe",
    MoE,
    configure_moe,
    measure_moe,
    summary="feed-forward layers of experts, two for each token",
)
