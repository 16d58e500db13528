"""Floating-point operations of one example: closed formulas for SkillNet, a counter for others.

:mod:`skillnet.flops` reports the results. The models are described by protocols, so that
the base class of all systems can import this module. One multiply-add is two operations.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.encoder import Encoder, EncoderLayer
from skillnet.modality import find_modality
from skillnet.objectives.heads import head_class
from skillnet.precision import find_device
from skillnet.skill_weights import SkillWeights
from skillnet.skills import SkillPlan, find_task


class SupportsTasks(Protocol):
    """The part of a multi-task model that counting needs."""

    config: SkillNetConfig
    training: bool

    def tower_tokens(self, task: str, tower: str, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Encode the input of one tower: tokens (B, T, D) and their mask."""

    def parameters(self) -> Any:
        """Iterate over the parameters."""

    def train(self, mode: bool = True) -> Any:
        """Set training or evaluation mode."""

    def __call__(self, task: str, towers: dict[str, Any]) -> Any:
        """Run a task."""


class SupportsPlans(Protocol):
    """The part of a SkillNet that the closed formulas need."""

    config: SkillNetConfig
    stems: nn.ModuleDict
    encoder: Encoder


def count_flops(
    model: SupportsTasks, task: str, lengths: Mapping[str, int] | None = None
) -> tuple[int, int]:
    """Count the forward operations of one example with torch's counter, for any system.

    Args:
        model: a system; the task runs once on a batch of one row.
        task: name of the task.
        lengths: tower -> length of its input; the longest supported input by default.

    Returns:
        (floating-point operations, tokens), summed over towers.
    """
    from torch.utils.flop_counter import FlopCounterMode

    spec = find_task(task, model.config.tasks)
    device = find_device(model.parameters())
    towers = {}
    for tower, plan in spec.towers.items():
        half, length = find_modality(plan.modality).tensor_half, (lengths or {}).get(tower)
        batch = half.make_example(model.config, 1, length)
        towers[tower] = {name: x.to(device) for name, x in batch.items()}
    training = model.training
    model.train(False)
    # Without gradients the counter's module tracker fails on a weight that is passed as an
    # argument, as the token embedding is passed to the head of masked tokens.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        model(task, towers)
    tokens = 0
    with torch.no_grad():
        for tower, batch in towers.items():
            tokens += model.tower_tokens(task, tower, batch)[0].shape[1]
    model.train(training)
    return counter.get_total_flops(), tokens


def task_flops(
    model: SupportsPlans, task: str, lengths: Mapping[str, int] | None = None
) -> tuple[int, int]:
    """Compute the forward operations of one example of a SkillNet's task.

    Args:
        model: a SkillNet.
        task: name of the task.
        lengths: tower -> length of its input; the longest supported input by default.

    Returns:
        (floating-point operations, tokens), summed over towers, including the head.
    """
    spec = find_task(task, model.config.tasks)
    config, flops, tokens = model.config, 0, 0
    for tower, plan in spec.towers.items():
        tower_flops, tower_tokens = plan_flops(model, plan, (lengths or {}).get(tower))
        flops, tokens = flops + tower_flops, tokens + tower_tokens
        flops += head_class(spec).count_flops(config, spec, tower, tower_tokens)
    return flops, tokens


def plan_flops(model: SupportsPlans, plan: SkillPlan, length: int | None = None) -> tuple[int, int]:
    """Compute the operations of one example in stem and encoder, without a head.

    Args:
        model: a SkillNet.
        plan: active skills and modality.
        length: tokens of text or code, or frames of sound; the longest supported by default.

    Returns:
        (floating-point operations, tokens).
    """
    config, stem = model.config, model.stems[plan.stem]
    half = find_modality(plan.modality).tensor_half
    tokens, flops = half.count_tokens(config, length), half.count_stem_flops(config, stem, length)
    return flops + _encoder_flops(model.encoder, plan, tokens), tokens


def _encoder_flops(encoder: Encoder, plan: SkillPlan, tokens: int) -> int:
    flops = 0
    for layer in encoder.layers:
        assert isinstance(layer, EncoderLayer)
        dim = layer.attention.out.weight.shape[0]
        # Merged skills cost one projection: queries, keys, values and output.
        flops += 2 * tokens * 4 * dim * dim
        # Scores, and the weighted sum of values.
        flops += 2 * 2 * tokens * tokens * dim
        flops += layer.feedforward.flops(
            tokens, len(plan.skills) if layer.feedforward_skills else 1
        )
        weights = (part for part in layer.modules() if isinstance(part, SkillWeights))
        flops += sum(part.merge_flops(plan.skills) for part in weights)
    return flops
