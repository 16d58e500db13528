"""Mixture of experts compared with a loop over experts, and properties of its losses."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.moe import Sizes, ours, theirs
from skillnet.accounting import account_task
from skillnet.baselines import moe_layers
from skillnet.baselines.moe import MoE, MoEOptions
from skillnet.baselines.moe_layers import ExpertFeedForward, RoutingResult
from skillnet.skills import default_tasks
from skillnet.systems import build_system
from tests.helpers.small_models import loss_of, small_config, small_model, towers_of


def layer(experts: int = 5, top_k: int = 2, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    made = ExpertFeedForward(8, 12, experts, top_k, std=0.5, out_std=0.5).to(dtype)
    with torch.no_grad():
        made.router.weight.mul_(40)
    return made


def looped(layer: ExpertFeedForward, x_ND: Tensor) -> Tensor:
    """Every expert on every token, added up with weights that are 0 for those not chosen."""
    p_NE = F.linear(x_ND, layer.router.weight).softmax(-1)
    top, chosen = p_NE.topk(layer.router.top_k, -1)
    gates = torch.zeros_like(p_NE).scatter(1, chosen, top / top.sum(-1, keepdim=True))
    y_ND = torch.zeros_like(x_ND)
    for e in range(len(layer.up)):
        y_ND = y_ND + gates[:, e, None] * F.linear(
            F.gelu(F.linear(x_ND, layer.up[e])), layer.down[e]
        )
    return y_ND


@pytest.mark.parametrize(("experts", "top_k"), [(5, 2), (2, 1), (7, 3), (40, 2)])
def test_equals_a_loop_over_experts(experts: int, top_k: int) -> None:
    made = layer(experts, top_k)
    x = torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True)
    probe = torch.randn_like(x)
    leaves = [x, *made.parameters()]
    found = made(x)[0]
    expected = looped(made, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    one = torch.autograd.grad((found * probe).sum(), leaves)
    other = torch.autograd.grad((expected * probe).sum(), leaves)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_equals_the_block_of_transformers(way: str) -> None:
    sizes = Sizes(rows=2, tokens=5, dim=16, hidden=24, experts=4)
    made, block = ours(sizes), theirs(sizes, way)
    with torch.no_grad():
        made.router.weight.copy_(block.gate.weight)
        made.up.copy_(block.experts.up_proj)
        made.down.copy_(block.experts.down_proj)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(made(x)[0], block(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 16), (6, 16), (8, 13)])
def test_torchs_grouped_product_computes_the_same(inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    counts = torch.tensor([3, 0, 5, 2])
    x = torch.randn(10, inputs, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, outputs, inputs, dtype=torch.bfloat16, requires_grad=True)
    probe = torch.randn(10, outputs, dtype=torch.bfloat16)
    found = []
    for product in (moe_layers.grouped_linear, moe_layers.one_kernel):
        y = product(x, weight, counts)
        found.append((y, *torch.autograd.grad((y * probe).sum(), (x, weight))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_slices_of_whole_steps_of_rows_change_nothing() -> None:
    made = layer(4, dtype=torch.float32)
    x = torch.randn(3, 7, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = made(x)[0]
    torch.testing.assert_close(rounded.float(), made(x)[0], rtol=0.05, atol=0.05)
    chosen = made(x)[1].experts_Nk
    rows_E, tokens_R, rows_S = moe_layers.expert_slices(chosen, 4, 8)
    assert (rows_E % 8 == 0).all()
    assert int(rows_E.sum()) == len(tokens_R)
    # Row r of the pair (n, j) holds token n and lies in the slice of that pair's expert.
    expected = torch.arange(21).repeat_interleave(2)
    assert torch.equal(tokens_R[rows_S], expected)
    ends = rows_E.cumsum(0)
    assert torch.equal(torch.searchsorted(ends, rows_S, right=True), chosen.flatten())
    assert len(set(rows_S.tolist())) == 42


def test_padding_is_not_routed() -> None:
    made = layer()
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    y, routing = made(x, mask)
    alone, _ = made(x[mask][None])
    assert torch.equal(y[mask], alone[0])
    assert torch.equal(y[~mask], torch.zeros(3, 8, dtype=torch.float64))
    assert len(routing.logits_NE) == 5
    nothing, routing = made(x, torch.zeros_like(mask))
    assert not nothing.any()
    assert (
        moe_layers.balance_loss(routing)
        == moe_layers.z_loss(routing)
        == moe_layers.router_entropy(routing)
        == 0
    )


def test_routed_padding_changes_no_result() -> None:
    """A GPU routes padding, because only the device knows which tokens are real."""
    made = layer()
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    probe = torch.randn(2, 4, 8, dtype=torch.float64)
    figures = (
        moe_layers.balance_loss,
        moe_layers.z_loss,
        moe_layers.router_entropy,
        moe_layers.expert_load,
    )
    found = []
    for run in (made.forward, made.run_with_padding):
        y, routing = run(x, mask)
        values = [each(routing) for each in figures]
        loss = (y * probe).sum() + values[0] + values[1]
        found.append((y, *values, *torch.autograd.grad(loss, [x, *made.parameters()])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    _, nothing = made.run_with_padding(x, torch.zeros_like(mask))
    assert not any(each(nothing).any() for each in figures)


def test_padding_of_a_batch_is_not_routed_with_drop_path_either() -> None:
    model = moe(drop_path=0.5).train()
    batch = towers_of("text_classification", model.config, rows=4)
    lengths = (batch["input"]["tokens"] != 0).sum(1)
    model("text_classification", batch)
    for each in model.expert_layers:
        assert len(each.routings[0].logits_NE) in {
            int(a + b) for i, a in enumerate(lengths) for b in lengths[i + 1 :]
        }


def test_losses_at_known_routings() -> None:
    even = RoutingResult(
        torch.zeros(6, 3), torch.full((6, 2), 0.5), torch.tensor([[0, 1], [1, 2], [2, 0]] * 2)
    )
    assert float(moe_layers.balance_loss(even)) == pytest.approx(1)
    assert float(moe_layers.z_loss(even)) == pytest.approx(math.log(3) ** 2)
    assert float(moe_layers.router_entropy(even)) == pytest.approx(math.log(3))
    logits = torch.tensor([[50.0, 0.0, 0.0]]).expand(6, 3)
    worst = RoutingResult(logits, torch.ones(6, 1), torch.zeros(6, 1, dtype=torch.long))
    assert float(moe_layers.balance_loss(worst)) == pytest.approx(3)
    assert float(moe_layers.router_entropy(worst)) == pytest.approx(0)


@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_the_balance_loss_spreads_the_load(balance: float) -> None:
    torch.manual_seed(0)
    made = layer(4)
    x = torch.randn(8, 8, 8, dtype=torch.float64) + 1
    with torch.no_grad():
        made.router.weight[1:].mul_(0.2)  # nearly all tokens go to the first expert
    optimizer = torch.optim.Adam(made.parameters(), lr=0.03)
    for _ in range(60):
        y, routing = made(x)
        loss = (y - x).square().mean() + balance * moe_layers.balance_loss(routing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loads = moe_layers.expert_load(made(x)[1])
    assert (float(loads.max()) < 0.3) == bool(balance)


def moe(seed: int = 0, **changes: Any) -> MoE:
    torch.manual_seed(seed)
    options = changes.pop("options", {})
    model = build_system("moe", small_config(**changes), {"ffn_dim": 6, "experts": 4} | options)
    assert isinstance(model, MoE)
    return model.double()


def test_auxiliary_losses_are_sums_over_layers_of_means_over_towers() -> None:
    model = moe(options={"balance": 0.5, "z": 0.25}).train()
    model("text_to_image", towers_of("text_to_image", model.config))
    layers = model.expert_layers
    assert [len(each.routings) for each in layers] == [2, 2]
    found = model.auxiliary_losses()
    expected = (
        sum(float(moe_layers.balance_loss(r).detach()) for e in layers for r in e.routings) / 2
    )
    assert float(found["balance"].detach()) == pytest.approx(0.5 * expected)
    expected = sum(float(moe_layers.z_loss(r).detach()) for e in layers for r in e.routings) / 2
    assert float(found["z"].detach()) == pytest.approx(0.25 * expected)
    model("text_classification", towers_of("text_classification", model.config))
    assert [len(each.routings) for each in layers] == [1, 1]
    found["balance"].backward()
    assert all(each.feedforward.router.weight.grad is not None for each in layers)


def test_statistics_tell_loads_and_entropy_of_the_last_training_pass() -> None:
    model = moe().train()
    assert model.statistics() == {}
    model("text_to_image", towers_of("text_to_image", model.config))
    found = model.statistics()
    assert 0 < found["moe/router_entropy"] <= 1
    assert found["moe/load_min"] <= 1 <= found["moe/load_max"] <= 4
    assert found["moe/load_max"] == max(found[f"moe/layer_{i}/load_max"] for i in (0, 1))
    assert found["moe/balance"] >= 0.9
    model.eval()("text_to_image", towers_of("text_to_image", model.config))
    assert model.statistics() == {}


def test_sharing_a_batch_out_changes_no_gradient_but_that_of_the_balance() -> None:
    model = moe(options={"balance": 0.0, "z": 0.0}).train()
    batch = towers_of("text_classification", model.config, rows=4)["input"]["tokens"]

    def gradients(*parts: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        for part in parts:
            loss = model("text_classification", {"input": {"tokens": part}})["logits"].square()
            loss.sum().backward()
            assert model.auxiliary_losses() == {}
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole, halves = gradients(batch), gradients(batch[:1], batch[1:])
    for name in whole:
        torch.testing.assert_close(halves[name], whole[name], rtol=1e-10, atol=1e-12)


def test_experts_without_a_token_have_a_gradient_of_zeros() -> None:
    model = moe(options={"experts": 30}).train()
    loss_of(model, "text_classification").backward()
    active = dict(model.active_parameters("text_classification"))
    assert all(parameter.grad is not None for parameter in active.values())
    grad = model.expert_layers[-1].feedforward.up.grad
    assert any(not part.any() for part in grad)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(active)


def test_costs() -> None:
    config = small_config(dim=32, ffn_dim=48, num_heads=4, embedding_dim=32)
    model, reference = build_system("moe", config), small_model(dim=32, ffn_dim=48, num_heads=4)
    means = [
        sum(m.activated_parameters(task) for task in default_tasks()) / 5
        for m in (model, build_system("dense", config))
    ]
    assert means[0] == pytest.approx(means[1], rel=0.01)
    assert account_task(model, "text_to_code").total > sum(
        p.numel() for p in reference.parameters()
    )
    for task in config.tasks:
        towers = towers_of(task, config, rows=1)
        lengths = {
            tower: next(iter(batch.values())).shape[1]
            for tower, batch in towers.items()
            if "tokens" in batch or "log_mel" in batch
        }
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval().float()(task, {k: floats(v) for k, v in towers.items()})
        assert account_task(model, task, lengths).flops_per_example == counter.get_total_flops()


def floats(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: x.float() if x.is_floating_point() else x for k, x in batch.items()}


def test_every_second_layer_has_experts() -> None:
    model = moe(num_layers=4, options={"every": 2})
    assert [layer.__class__.__name__ for layer in model.encoder.layers] == [
        "EncoderLayer",
        "ExpertLayer",
    ] * 2
    assert model.encoder.layers[0].feedforward.up.shape[0] == 12


def test_mistakes_are_named() -> None:
    for key, value, words in (
        ("experts", 2, "must be more than options.top_k 2, got 2"),
        ("top_k", 0, "options.top_k must be from 1 to"),
        ("balance", -1.0, "options.balance must be from 0 to 1000"),
        ("jitter", 1.0, "options.jitter must be from 0 to below 1"),
        ("z", float("nan"), "options.z must be from 0 to 1000, got nan"),
        ("z", "1e-3", "options.z must be from 0 to 1000, got '1e-3'"),
    ):
        with pytest.raises(ValueError, match=words):
            MoEOptions(**{key: value})
