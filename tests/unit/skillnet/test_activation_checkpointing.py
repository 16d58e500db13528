"""Layers computed again in the backward pass: equal gradients, less memory between the passes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from skillnet.multitask_model import TaskModel
from skillnet.systems import find_system
from tests.helpers.small_models import loss_of, small_config

SYSTEMS = ("skillnet", "alone", "dense", "moe", "specialist")
TASKS = tuple(small_config().tasks)


def build(system: str) -> TaskModel:
    """Return a model in training mode, with random dropout and stochastic depth."""
    kind = find_system(system).model
    torch.manual_seed(0)
    config = small_config(mel_stack=4, num_layers=4, drop_path=0.3)
    return kind(config, kind.parse_options({})).double().train()


def step(model: Any, task: str) -> tuple[Tensor, int]:
    """Return the loss after the backward pass, and the bytes kept between the passes."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, task, rows=6)
        for extra in model.auxiliary_losses().values():
            loss = loss + extra
    loss.backward()
    return loss.detach(), sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("task", TASKS)
def test_gradients_equal_those_of_the_plain_step(system: str, task: str) -> None:
    plain = build(system)
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_activation_checkpointing()
    loss, kept = step(plain, task)
    other_loss, other_kept = step(checkpointed, task)
    assert torch.equal(loss, other_loss)
    expected = dict(plain.named_parameters())
    for name, parameter in checkpointed.named_parameters():
        wanted = expected[name].grad
        assert (parameter.grad is None) == (wanted is None), name
        if wanted is not None and parameter.grad is not None:
            assert torch.equal(parameter.grad, wanted), name
    assert other_kept < 0.7 * kept
    assert checkpointed.statistics() == plain.statistics()


def test_inference_recomputes_nothing() -> None:
    model = build("skillnet").eval()
    model.enable_activation_checkpointing()
    with torch.no_grad():
        assert not loss_of(model, "text_to_image").requires_grad  # type: ignore[arg-type]


def test_a_system_without_it_says_so() -> None:
    class Other(TaskModel):
        system = "other"

    with pytest.raises(ValueError, match="other cannot compute layers again; set training"):
        Other(small_config()).enable_activation_checkpointing()
