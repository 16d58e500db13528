"""Fused layers compared with a loop over skills: values, gradients, memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skillnet.config import SkillNetConfig
from skillnet.encoder import SHARED, Encoder, EncoderLayer, draw_kept_rows, place_rows
from skillnet.layers import (
    PLAIN_TOKENS,
    SkillAttention,
    SkillFeedForward,
    SkillLinear,
    Skills,
    SkillWeights,
    multihead_attention,
    padding_bias,
)
from skillnet.precision import assume_gpu
from tests.helpers.small_models import small_config

SKILLS = ("general", "text", "image", "sound", "video", "code", "alignment")
PLANS = (("text",), ("general", "text"), ("alignment", "code", "general"), SKILLS)


# -- the reference: one skill after the other ----------------------------------


def loop_linear(layer: SkillLinear, x: Tensor, skills: Skills) -> Tensor:
    return sum(x @ layer.weight.weights[s].T for s in skills) / len(skills)  # type: ignore[return-value]


def loop_feedforward(layer: SkillFeedForward, x: Tensor, skills: Skills) -> Tensor:
    outputs = [F.gelu(x @ layer.up.weights[s].T) @ layer.down.weights[s].T for s in skills]
    return torch.stack(outputs).mean(0)


def loop_attention(
    layer: SkillAttention, x: Tensor, skills: Skills, mask_BT: Tensor | None
) -> Tensor:
    q, k, v = loop_linear(layer.qkv, x, skills).chunk(3, -1)
    heads = []
    for q1, k1, v1 in zip(*(y.chunk(layer.heads, -1) for y in (q, k, v)), strict=True):
        scores = q1 @ k1.transpose(1, 2) / q1.shape[-1] ** 0.5
        if mask_BT is not None:
            scores = scores.masked_fill(~mask_BT[:, None], -torch.inf)
        heads.append(scores.softmax(-1) @ v1)
    return loop_linear(layer.out, torch.cat(heads, -1), skills)


def loop_encoder(encoder: Encoder, x: Tensor, skills: Skills, mask_BT: Tensor | None) -> Tensor:
    for layer in encoder.layers:
        assert isinstance(layer, EncoderLayer)
        active = skills if layer.attention_skills else SHARED
        x = x + loop_attention(layer.attention, layer.attention_norm(x), active, mask_BT)
        active = skills if layer.feedforward_skills else SHARED
        x = x + loop_feedforward(layer.feedforward, layer.feedforward_norm(x), active)
    return encoder.norm(x)


def gradients(output: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor | None]:
    probe = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    values = torch.autograd.grad((output * probe).sum(), parameters.values(), allow_unused=True)
    return dict(zip(parameters, values, strict=True))


def assert_same(ours: Tensor, theirs: Tensor, parameters: dict[str, Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    left, right = gradients(ours, parameters), gradients(theirs, parameters)
    for name in parameters:
        a, b = left[name], right[name]
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


def encoder_of(config: SkillNetConfig) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(config).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return encoder


# -- equal to the loop ----------------------------------


@pytest.mark.parametrize("skills", PLANS, ids=len)
@pytest.mark.parametrize(
    ("modules", "every"), [(m, e) for m in ("attention", "feedforward", "both") for e in (1, 2, 3)]
)
def test_encoder_equals_the_loop_over_skills(modules: str, every: int, skills: Skills) -> None:
    encoder = encoder_of(small_config(skill_modules=modules, skill_every=every, num_layers=4))
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    parameters = {**dict(encoder.named_parameters()), "x": x}
    # Padding's own outputs are nobody's; what is compared is what real tokens give.
    real = mask[..., None]
    assert_same(
        encoder(x, skills, mask) * real, loop_encoder(encoder, x, skills, mask) * real, parameters
    )
    assert_same(encoder(x, skills), loop_encoder(encoder, x, skills, None), parameters)


@given(st.sets(st.sampled_from(SKILLS), min_size=1), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_any_plan_in_any_order_equals_the_loop(chosen: set[str], random) -> None:
    skills = tuple(random.sample(sorted(chosen), len(chosen)))
    torch.manual_seed(0)
    attention = SkillAttention(SKILLS, 8, 2, std=0.3, out_std=0.3).double()
    feedforward = SkillFeedForward(SKILLS, 8, 5, std=0.3, out_std=0.3).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    y = attention(x, attention.merge(x, skills))
    assert_same(y, loop_attention(attention, x, skills, None), _named(attention))
    y = feedforward(x, feedforward.merge(x, skills))
    assert_same(y, loop_feedforward(feedforward, x, skills), _named(feedforward))


def _named(module: torch.nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_stays_near_float64(dtype: torch.dtype) -> None:
    encoder = encoder_of(small_config())
    x = torch.randn(4, 20, 8, dtype=torch.float64)
    exact = encoder(x, ("general", "text"))
    with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
        rough = encoder.float()(x.float(), ("general", "text"))
    error = (rough.double() - exact).abs().max()
    assert error < (2e-5 if dtype == torch.float32 else 0.15)


# -- attention ----------------------------------


@pytest.mark.parametrize("tokens", [1, 7, 16, 40, PLAIN_TOKENS + 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_torchs(tokens: int, masked: bool) -> None:
    torch.manual_seed(tokens)
    qkv = torch.randn(2, tokens, 3 * 6, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[1, tokens // 2 + 1 :] = False
    q, k, v = qkv.view(2, tokens, 3, 2, 3).permute(2, 0, 3, 1, 4)
    bias = padding_bias(mask, torch.float64) if masked else None
    theirs = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask[:, None, None] if masked else None
    )
    ours = multihead_attention(qkv, 2, bias)
    assert_same(ours, theirs.transpose(1, 2).reshape(2, tokens, 6), {"qkv": qkv})


def test_attention_leaves_its_input_alone() -> None:
    qkv = torch.randn(2, 4, 12)
    before = qkv.clone()
    multihead_attention(qkv, 2)
    multihead_attention(qkv[:1, :1].expand(1, 1, 12), 1)  # already laid out as the product wants it
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_of_padding_gives_no_nan(dtype: torch.dtype) -> None:
    qkv = torch.randn(2, 20, 12, dtype=dtype, requires_grad=True)
    mask = torch.tensor([[True] * 20, [False] * 20])
    y = multihead_attention(qkv, 2, padding_bias(mask, dtype))
    (gradient,) = torch.autograd.grad(y.sum(), qkv)
    assert torch.isfinite(y).all()
    assert torch.isfinite(gradient).all()


# -- inactive skills ----------------------------------


def test_inactive_skills_stay_as_they_are_under_adamw_with_weight_decay() -> None:
    encoder = encoder_of(small_config(skill_every=2))
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        encoder(torch.randn(2, 3, 8, dtype=torch.float64), ("general", "text")).sum().backward()
        optimizer.step()
    for name, parameter in encoder.named_parameters():
        skill = name.rpartition(".")[2]
        if skill in SKILLS and skill not in ("general", "text"):
            assert torch.equal(parameter, before[name]), name
            assert parameter.grad is None, name
            assert parameter not in optimizer.state, name
        elif name != "norm.weight":  # a sum over a normalised row has no gradient to it
            assert not torch.equal(parameter, before[name]), name
            assert parameter.grad is not None, name
            assert parameter in optimizer.state, name


# -- merged weights ----------------------------------


def _weights(axis: int | None = None) -> SkillWeights:
    torch.manual_seed(1)
    return SkillWeights(SKILLS, 4, 3, std=0.5, axis=axis).eval()


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_merged_weights_are_kept_in_inference_until_a_weight_changes(axis: int | None) -> None:
    weights = _weights(axis)
    plan = ("general", "text")
    with torch.no_grad():
        first = weights.merged(plan, torch.float32)
        assert weights.merged(plan, torch.float32) is first
        assert weights.merged(plan, torch.bfloat16).dtype == torch.bfloat16

        weights.weights["image"].mul_(2)  # not of this plan
        assert weights.merged(plan, torch.float32) is first

        weights.weights["text"].add_(1)
        second = weights.merged(plan, torch.float32)
        assert not torch.equal(second, first)
        assert torch.equal(second, weights._merge(plan, first.dtype))


def test_merged_weights_follow_every_way_of_changing_a_weight() -> None:
    weights = _weights()
    plan = ("general", "text")

    def merged() -> Tensor:
        with torch.no_grad():
            return weights.merged(plan, torch.float32).clone()

    def mean() -> Tensor:
        return ((weights.weights["general"] + weights.weights["text"]) / 2).detach()

    def step() -> None:
        optimizer = torch.optim.SGD(weights.parameters(), lr=0.5)
        weights.merged(plan, torch.float32).sum().backward()
        optimizer.step()

    def replace() -> None:
        weights.weights["text"] = torch.nn.Parameter(torch.randn(4, 3))

    def load() -> None:
        weights.load_state_dict({k: v + 1 for k, v in weights.state_dict().items()})

    def point_elsewhere() -> None:
        weights.weights["general"].data = torch.randn(4, 3)

    previous = merged()
    for change in (step, replace, load, point_elsewhere):
        change()
        assert torch.equal(merged(), mean()), change.__name__
        assert not torch.equal(merged(), previous), change.__name__
        previous = merged()


def test_merged_weights_of_a_copy_are_its_own() -> None:
    weights = _weights()
    with torch.no_grad():
        kept = weights.merged(("general", "text"), torch.float32)
        twin = copy.deepcopy(weights)
        twin.weights["text"].zero_()
        assert not torch.equal(twin.merged(("general", "text"), torch.float32), kept)
        assert weights.merged(("general", "text"), torch.float32) is kept


def test_training_keeps_no_merged_weights() -> None:
    weights = _weights()
    with torch.no_grad():
        weights.merged(("general", "text"), torch.float32)
        weights.train()
        assert not weights._merged
        weights.merged(("general", "text"), torch.float32)
    assert not weights._merged
    assert weights.merged(("general", "text"), torch.float32).requires_grad


def test_weights_made_in_inference_mode_work() -> None:
    with torch.inference_mode():
        weights = _weights()
        before = weights.merged(("general", "text"), torch.float32)
        weights.weights["text"].add_(1)
        assert not torch.equal(weights.merged(("general", "text"), torch.float32), before)


# -- stochastic depth ----------------------------------


def test_drop_path_leaves_out_a_share_of_the_rows_and_scales_the_rest() -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(small_config(drop_path=0.25), 0).double()
    x = torch.randn(8, 3, 8, dtype=torch.float64, requires_grad=True)
    weights = layer.merge_weights(x, ("text",))
    branch = layer._attend(x, weights, None)
    drawn = draw_kept_rows(x, 1, 0.25)
    assert drawn is not None
    y = layer._add(layer._attend, x, weights, None, drawn[0][0])
    moved = (y - x).abs().amax((1, 2)) > 0
    assert moved.sum() == 6
    torch.testing.assert_close(y[moved], (x + branch * 8 / 6)[moved])
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient[~moved], torch.ones_like(gradient[~moved]))
    encoder = encoder_of(small_config(drop_path=0.25)).eval()
    assert torch.equal(encoder(x, ("text",)), encoder(x, ("text",)))


@pytest.mark.parametrize("is_masked", [False, True])
def test_the_position_of_a_row_decides_whether_it_is_dropped(is_masked: bool) -> None:
    """And not the number of rows that are computed with it; each tower has a draw of its own."""
    x = torch.zeros(12, 1, 1)

    def draw(first: int, rows: int, seed: int = 3) -> Tensor:
        with place_rows(seed, 12, first):
            towers = [draw_kept_rows(x[:rows], 2, 0.3, is_masked) for _ in range(2)]
        found = torch.zeros(2, 2, 2, rows)
        for tower, layers in enumerate(towers):
            for layer, drawn in enumerate(layers or ()):
                for branch, kept in enumerate(drawn):
                    if isinstance(kept, Tensor):
                        found[tower, layer, branch] = kept.flatten()
                    else:
                        found[tower, layer, branch, kept.rows] = kept.scale
        return found

    whole = draw(0, 12)
    assert ((whole > 0).sum(-1) == 8).all()
    for parts in ((5, 7), (1, 1, 10), (4, 4, 4), (1,) * 12):
        starts = [sum(parts[:number]) for number in range(len(parts))]
        split = [draw(first, rows) for first, rows in zip(starts, parts, strict=True)]
        assert torch.equal(torch.cat(split, -1), whole)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(draw(0, 12, seed=4), whole)


def test_the_skill_of_every_nth_layer() -> None:
    encoder = Encoder(small_config(num_layers=6, skill_every=3))
    carries = [layer.attention_skills for layer in encoder.layers]
    assert carries == [False, False, True, False, False, True]
    dense = {name for name, _ in encoder.named_parameters() if name.endswith(".shared")}
    assert {name.split(".")[1] for name in dense} == {"0", "1", "3", "4"}


def test_gpus_give_dropped_rows_the_weight_zero() -> None:
    """The kernels of GPUs run on the CPU here, with the same draw."""
    torch.manual_seed(0)
    encoder = encoder_of(small_config(drop_path=0.1, num_layers=3)).train()
    x = torch.randn(16, 3, 8, dtype=torch.float64)
    with place_rows(5, 16, 0):
        left_out = draw_kept_rows(x, 3, 0.1)
    with assume_gpu(), place_rows(5, 16, 0):
        masked = draw_kept_rows(x, 3, 0.1)
        assert draw_kept_rows(x, 3, 0.0) is None
        assert isinstance(draw_kept_rows(x, 3, 0.2)[0], tuple)  # type: ignore[index]
    assert left_out is not None
    assert masked is not None
    for layer, rows, weights in zip(encoder.layers, left_out, masked, strict=True):
        assert isinstance(weights, Tensor)
        assert weights.shape == (2, 16, 1, 1)
        assert ((weights == 0).sum(1) == 2).all()
        torch.testing.assert_close(weights.sum(1), torch.full_like(weights.sum(1), 16))
        plan = ("general", "text")
        one, other = layer(x, plan, None, weights), layer(x, plan, None, rows)
        assert_same(one, other, dict(layer.named_parameters()))
    with assume_gpu():
        assert encoder(x, ("general", "text")).isfinite().all()
