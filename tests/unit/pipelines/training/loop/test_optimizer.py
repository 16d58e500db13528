"""AdamW on active parameters only, learning rates, clipping, averages."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from pipelines.training.config.run import TrainingConfig
from pipelines.training.loop.optimizer import (
    WeightAverage,
    build_optimizer,
    clip_gradients,
    compute_learning_rate,
    has_weight_decay,
    set_learning_rate,
    update_weights,
)
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import build_model
from pipelines.training.loop.step import step_loss
from skillnet.precision import choose_precision
from tests.helpers.small_corpora import small_config


def test_weight_matrices_decay_and_vectors_do_not() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)).double()
    theirs = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)).double()
    theirs.load_state_dict(ours.state_dict())
    groups: list[dict[str, object]] = [
        {"params": [p for p in theirs.parameters() if p.ndim == 2], "weight_decay": 0.3},
        {"params": [p for p in theirs.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98))
    config = TrainingConfig(weight_decay=0.3, lr=0.01)
    optimizer = build_optimizer(ours.named_parameters(), config)
    for _ in range(5):
        x = torch.randn(3, 4, dtype=torch.float64)
        for model in (ours, theirs):
            model.zero_grad()
            model(x).square().sum().backward()
        optimizer.step()
        reference.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_inactive_skill_is_unchanged(data: Path) -> None:
    """Weights, gradients and optimizer state, also with weight decay and after active steps."""
    config = small_config(data, weight_decay=0.5)
    stream, model = ResolvedRun(config).dataloader, build_model(config).double()
    optimizer = build_optimizer(model.named_parameters(), config.training)
    precision = choose_precision("fp64", torch.device("cpu"))
    everything = dict(model.named_parameters())

    def one_step(task: str) -> None:
        step = next(s for s in range(100) if stream.batch_spec(s).task == task)
        batch = stream.batch(step).to(precision.device, torch.float64)
        step_loss(model, config.model.tasks[task], batch, precision, config).backward()
        active = list(model.active_parameters(task))
        missing = [name for name, parameter in active if parameter.grad is None]
        assert not missing
        outside = everything.keys() - {name for name, _ in active}
        assert all(everything[name].grad is None for name in outside)
        optimizer.step()
        optimizer.zero_grad()

    for task in ("text_to_image", "text_to_video"):
        one_step(task)
    image = [name for name in everything if model.file_of(name) == "skill-image"]
    assert image
    assert not any(
        model.file_of(name) == "skill-sound"
        for name in everything
        if everything[name] in optimizer.state
    )
    weights = {name: everything[name].detach().clone() for name in everything}
    state = {n: {k: x.clone() for k, x in optimizer.state[everything[n]].items()} for n in image}
    for task in ("text_to_video", "speech_recognition", "text_classification", "text_to_code"):
        one_step(task)
    for name in image:
        assert torch.equal(everything[name], weights[name]), name
        for key, value in state[name].items():
            assert torch.equal(optimizer.state[everything[name]][key], value), name
    changed = [n for n in everything if model.file_of(n) == "skill-general"]
    assert all(not torch.equal(everything[name], weights[name]) for name in changed)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("encoder.layers.0.attention.qkv.weight.weights.text", (4, 4), True),
        ("encoder.layers.0.attention.qkv.weight.weights.norm", (4, 4), True),
        ("heads.text_to_image.query.weight", (4, 4), True),
        ("stems.patch.project.weight", (4, 4), True),
        ("stems.token.embedding.weight", (4, 4), False),
        ("stems.patch.position", (4, 4), False),
        ("encoder.norm.weight", (4,), False),
        ("encoder.layers.0.feedforward.up", (3, 4, 4), True),
        ("towers.a.input.model.pos_embed", (1, 4, 4), False),
        ("towers.a.input.model.embeddings.word_embeddings.weight", (4, 4), False),
        ("towers.a.input.model.embeddings.patch_embeddings.projection.weight", (4, 4), True),
        ("towers.a.input.model.embeddings.cls_token", (1, 1, 4), False),
        ("heads.text_classification.project.bias", (4,), False),
    ],
)
def test_weight_decay_applies_to_matrices_only(name, shape, expected):
    assert has_weight_decay(name, torch.zeros(shape)) == expected


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_learning_rate_rises_then_never_rises(schedule: str) -> None:
    config = TrainingConfig(steps=200, warmup_fraction=0.1, lr=2.0, schedule=schedule)
    rates = [compute_learning_rate(config, step) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[19] == pytest.approx(2.0)
    assert all(b > a for a, b in pairwise(rates[:20]))
    assert all(b <= a for a, b in pairwise(rates[19:]))
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.04, abs=0.04)
    if schedule == "wsd":
        assert rates[139] == 2.0
        assert rates[160] < 2.0


def test_warmup_is_a_fraction_of_the_steps() -> None:
    def rate(step: int, fraction: float) -> float:
        config = TrainingConfig(steps=100, lr=1.0, warmup_fraction=fraction)
        return compute_learning_rate(config, step)

    assert rate(4, 0.1) == pytest.approx(0.5)
    assert rate(0, 0.0) == 1.0
    # 1 is no number of steps.
    assert rate(49, 1.0) == pytest.approx(0.5)


def test_all_parameters_get_the_learning_rate_of_the_step() -> None:
    config = TrainingConfig(steps=50, lr=0.3)
    optimizer = build_optimizer(nn.Linear(2, 2).named_parameters(), config)
    for step in (0, 1, 20, 49):
        rate = set_learning_rate(optimizer, config, step)
        assert rate == compute_learning_rate(config, step)
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate]


def test_clipping() -> None:
    layer = nn.Linear(2, 2).double()
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    norm = clip_gradients(layer.parameters(), 1.5)
    assert float(norm) == pytest.approx(24**0.5)
    scaled = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
    assert float(scaled.norm()) == pytest.approx(1.5)
    assert float(clip_gradients(layer.parameters(), 0)) == pytest.approx(1.5)
    assert float(clip_gradients(layer.parameters(), 9)) == pytest.approx(1.5)


def test_gradients_that_are_not_finite_change_nothing() -> None:
    """Also not the step count of the optimizer, which corrects the bias of its averages."""
    torch.manual_seed(0)
    updates: list[list[float]] = [[1.0, 2.0], [1.0, float("inf"), 2.0, float("nan")]]
    layers = []
    for scales in updates:
        layer = nn.Linear(3, 3).double()
        nn.init.ones_(layer.weight)
        nn.init.ones_(layer.bias)
        named = list(layer.named_parameters())
        optimizer = build_optimizer(named, TrainingConfig(weight_decay=0.1, lr=0.1))
        for scale in scales:
            for _, parameter in named:
                parameter.grad = torch.full_like(parameter, scale)
            norm, is_finite = update_weights(optimizer, named, 1.0)
            assert bool(is_finite) == (scale in updates[0]) == bool(norm.isfinite())
        layers.append((layer, optimizer))
    (one, first), (other, second) = layers
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in first.state[a].items():
            assert torch.equal(value, second.state[b][key]), key


def test_average_follows_and_swaps_back() -> None:
    layer = nn.Linear(3, 3, bias=False)
    average = WeightAverage(0.5)
    seen = []
    for step in range(4):
        with torch.no_grad():
            layer.weight.fill_(float(step))
        average.update(list(layer.named_parameters()))
        seen.append(float(average.values["weight"][0, 0]))
    # Decays: 2/11, then 3/12, 4/13, 5/14, all below 0.5.
    expected = 0.0
    for step, decay in ((1, 3 / 12), (2, 4 / 13), (3, 5 / 14)):
        expected = decay * expected + (1 - decay) * step
    assert seen[0] == 0
    assert seen[3] == pytest.approx(expected)
    average.swap(layer)
    assert float(layer.weight.detach()[0, 0]) == pytest.approx(expected)
    average.swap(layer)
    assert float(layer.weight.detach()[0, 0]) == 3.0
