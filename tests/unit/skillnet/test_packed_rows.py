"""Real tokens computed alone give what padded rows give: outputs and every gradient."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from skillnet import encoder as encoders
from skillnet import layers
from skillnet.baselines.moe import ExpertEncoder, MoEOptions
from skillnet.encoder import Encoder, place_rows
from tests.helpers.small_models import small_config

SKILLS = ("general", "text")
LENGTHS = {
    "captions": (9, 1, 3, 2, 3),
    "rows without a token": (9, 0, 3, 0, 3),
    "only rows without a token": (0, 0),
    "one row": (4,),
}
BUILDERS: dict[str, Callable[..., Encoder]] = {
    "skills": Encoder,
    "experts": lambda config: ExpertEncoder(config, MoEOptions(experts=4)),
}


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a test have fewer tokens than the multiple of a training."""
    monkeypatch.setattr(layers, "PACKED_MULTIPLE", 4)


def build(system: str = "skills", **changes: object) -> Encoder:
    torch.manual_seed(0)
    encoder = BUILDERS[system](small_config(**changes)).to(torch.float64)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder.train()


def rows_of(lengths: tuple[int, ...], T: int = 12) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    mask_BT = torch.arange(T) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), T, 8, dtype=torch.float64), mask_BT


def run(
    encoder: Encoder, x_BTD: Tensor, mask_BT: Tensor, share: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Return the real tokens, and the gradients of a loss of all of them."""
    monkeypatch.setattr(encoders, "PACKED_SHARE", share)
    x_BTD = x_BTD.clone().requires_grad_()
    with place_rows(3, len(x_BTD), 0):
        y_BTD = encoder(x_BTD, SKILLS, mask_BT)
    assert y_BTD.shape == x_BTD.shape
    if share > 0:
        assert not y_BTD[~mask_BT].any(), "a token of padding was computed"
    y_ND = y_BTD[mask_BT]
    encoder.zero_grad()
    (y_ND * torch.linspace(-1, 1, y_ND.numel(), dtype=y_ND.dtype).view(y_ND.shape)).sum().backward()
    assert x_BTD.grad is not None
    gradients = {name: p.grad for name, p in encoder.named_parameters()}
    return y_ND.detach(), {**gradients, "input": x_BTD.grad[mask_BT]}


@pytest.mark.parametrize("changes", [{}, {"norm_position": "post"}, {"drop_path": 0.4}], ids=str)
@pytest.mark.parametrize("system", BUILDERS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_tokens_give_outputs_and_gradients_of_padded_rows(
    lengths: str, system: str, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, inputs = build(system, **changes), rows_of(LENGTHS[lengths])
    expected, wanted = run(encoder, *inputs, -1.0, monkeypatch)
    found, gradients = run(encoder, *inputs, 1.0, monkeypatch)
    torch.testing.assert_close(found, expected)
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            gradients[name], gradient, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_long_rows_and_recomputed_layers_are_packed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "PLAIN_TOKENS", 4)
    encoder, inputs = build(drop_path=0.4), rows_of(LENGTHS["captions"])
    expected, wanted = run(encoder, *inputs, -1.0, monkeypatch)
    encoder.recompute_layers = True
    found, gradients = run(encoder, *inputs, 1.0, monkeypatch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients["input"], wanted["input"])


def test_layers_see_the_real_tokens_and_few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, (x_BTD, mask_BT) = build(), rows_of(LENGTHS["captions"])
    seen = []
    encoder.layers[0].register_forward_hook(lambda _, given, made: seen.append(given[0].shape))
    encoder(x_BTD, SKILLS, mask_BT)
    encoder(x_BTD, SKILLS, torch.ones_like(mask_BT))
    encoder(x_BTD, SKILLS)
    assert seen == [(20, 8), (5, 12, 8), (5, 12, 8)], "18 of 60 tokens are real"


@pytest.mark.parametrize("system", BUILDERS)
def test_rows_without_padding_give_the_bits_of_rows_without_a_mask(system: str) -> None:
    encoder, (x_BTD, _) = build(system).eval(), rows_of((12, 12))
    for dtype in (torch.float64, torch.bfloat16):
        encoder, x_BTD = encoder.to(dtype), x_BTD.to(dtype)
        found = encoder(x_BTD, SKILLS, torch.ones(2, 12, dtype=torch.bool))
        assert torch.equal(found, encoder(x_BTD, SKILLS))


def test_experts_do_not_count_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, (x_BTD, mask_BT) = build("experts"), rows_of(LENGTHS["captions"])
    layer = encoder.layers[0]
    layer.stores_routings = True
    encoder(x_BTD, SKILLS, mask_BT)
    assert [len(routing.logits_NE) for routing in layer.routings] == [18]


def attend_apart(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Attention of each sequence alone, for the operation that only GPUs have."""
    assert bounds.dtype == torch.int32
    edges = bounds.tolist()
    assert (edges[0], edges[-1]) == (0, len(q))
    pairs = list(itertools.pairwise(edges))
    assert max(end - start for start, end in pairs) <= longest
    attended = [
        F.scaled_dot_product_attention(*(x[start:end].transpose(0, 1) for x in (q, k, v)))
        for start, end in pairs
    ]
    return torch.cat(attended, 1).transpose(0, 1)


@pytest.mark.parametrize("changes", [{}, {"norm_position": "post"}, {"drop_path": 0.4}], ids=str)
@pytest.mark.parametrize("system", BUILDERS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths_give_outputs_and_gradients_of_a_bias(
    lengths: str, system: str, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of GPUs, with a kernel for CPUs in place of flash attention."""
    encoder, inputs = build(system, **changes), rows_of(LENGTHS[lengths])
    expected, wanted = run(encoder, *inputs, -1.0, monkeypatch)
    monkeypatch.setattr(encoders, "takes_lengths", lambda x_BTD, head_width: True)
    monkeypatch.setattr(layers, "attend_sequences", attend_apart)
    found, gradients = run(encoder, *inputs, -1.0, monkeypatch)
    torch.testing.assert_close(found, expected)
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            gradients[name], gradient, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_answers_keep_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real tokens of a row need not be its first ones."""
    monkeypatch.setattr(encoders, "takes_lengths", lambda x_BTD, head_width: True)
    encoder, (x_BTD, mask_BT) = build().eval(), rows_of(LENGTHS["captions"])
    mask_BT[0, 2] = False
    order = [*(number for number in range(12) if number != 2), 2]
    found, moved = encoder(x_BTD, SKILLS, mask_BT), x_BTD[:, order]
    expected = encoder(moved, SKILLS, mask_BT[:, order])
    torch.testing.assert_close(found[:, order][mask_BT[:, order]], expected[mask_BT[:, order]])
