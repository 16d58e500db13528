"""Layers computed again in the backward pass: equal gradients, less memory between the passes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from skillnet.encoder import KeptTokens
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
    checkpointed.limit_kept_tokens(0)
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


@pytest.mark.parametrize("system", ["skillnet", "alone", "moe"])
def test_a_limit_between_keeps_a_part(system: str) -> None:
    """The towers of a pass share the limit, and the next pass has all of it."""
    task, kept = "text_to_image", []
    plain = build(system)
    loss, _ = step(plain, task)
    expected = {name: p.grad for name, p in plain.named_parameters()}
    # Six rows of at most 16 tokens in four layers: nothing, a part of the first tower, all of it,
    # everything.
    for limit in (0, 100, 200, 10**6):
        model = build(system)
        model.limit_kept_tokens(limit)
        sizes = []
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            other, size = step(model, task)
            sizes.append(size)
            assert torch.equal(loss, other)
        assert sizes[0] == sizes[1]
        for name, parameter in model.named_parameters():
            wanted = expected[name]
            assert (parameter.grad is None) == (wanted is None), name
            assert wanted is None or torch.equal(parameter.grad, wanted), name
        kept.append(sizes[0])
    assert kept == sorted(set(kept)), kept
    model.limit_kept_tokens(None)
    assert step(model, task)[1] == kept[-1]


@pytest.mark.parametrize(
    ("limit", "tokens", "layers", "counts"),
    [
        (0, 10, 12, [0, 0]),
        (95, 10, 12, [9, 0]),
        (89, 10, 12, [6, 0]),
        (200, 10, 12, [12, 6]),
        (30, 10, 3, [3, 0]),
        (25, 10, 2, [2, 0]),
        (5, 0, 4, [4, 4]),
    ],
)
def test_towers_keep_quarters_of_their_layers(
    limit: int, tokens: int, layers: int, counts: list[int]
) -> None:
    kept = KeptTokens(limit)
    assert [kept.take(tokens, layers) for _ in counts] == counts


def test_inference_recomputes_nothing() -> None:
    model = build("skillnet").eval()
    model.limit_kept_tokens(0)
    with torch.no_grad():
        assert not loss_of(model, "text_to_image").requires_grad  # type: ignore[arg-type]


def test_a_system_without_it_says_so() -> None:
    class Other(TaskModel):
        system = "other"

    with pytest.raises(ValueError, match="other cannot compute layers again; set training"):
        Other(small_config()).limit_kept_tokens(0)
    Other(small_config()).limit_kept_tokens(None)
