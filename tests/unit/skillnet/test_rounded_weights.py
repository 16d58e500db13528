"""Weights rounded and merged for a step: values, gradients, number of merges."""

import pytest
import torch
from torch import Tensor

from skillnet.layers import SkillFeedForward, SkillWeights
from skillnet.precision import assume_gpu
from skillnet.skill_weights import Skills, merge_rounded, share_merges

PLANS: tuple[Skills, ...] = (("alignment", "general", "text"), ("alignment", "general", "image"))
#: Ways of merging: mean, rows side by side, columns side by side and divided.
WAYS = ((None, False), (0, False), (1, True))


def make_parts(names: tuple[str, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(4, 6, dtype=torch.float64, generator=generator).requires_grad_()
        for name in names
    }


def merge_plainly(parts: dict[str, Tensor], plan: Skills, axis: int | None, scaled: bool) -> Tensor:
    active = [parts[name] for name in plan]
    if axis is None:
        return torch.stack(active).mean(0)
    joined = torch.cat(active, axis)
    return joined / len(plan) if scaled else joined


@pytest.mark.parametrize(("axis", "scaled"), WAYS)
@pytest.mark.parametrize(
    "plans", [(("text",),), (("general", "text"),), PLANS, (("text",), *PLANS, ("code", "text"))]
)
def test_values_and_gradients_equal_plain_merging(
    plans: tuple[Skills, ...], axis: int | None, scaled: bool
) -> None:
    parts = make_parts(("general", "text", "image", "alignment", "code"))
    used = {name: parts[name] for plan in plans for name in plan}
    rounded = merge_rounded(used, plans, torch.float32, axis, scaled)
    exact = [merge_plainly(parts, plan, axis, scaled) for plan in plans]
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-6, atol=1e-6)

    def gradients(results: list[Tensor]) -> tuple[Tensor, ...]:
        loss = sum((torch.linspace(-1, 1, x.numel()).view_as(x) * x).sum() for x in results)
        return torch.autograd.grad(loss, list(used.values()))

    for ours, theirs in zip(gradients(list(rounded)), gradients(exact), strict=True):
        assert ours.dtype == torch.float64
        assert ours.is_contiguous()  # so that it becomes the gradient without a copy
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_frozen_skills_and_unused_plans_get_no_gradient() -> None:
    parts = make_parts(("general", "text", "image", "alignment"))
    parts["general"].requires_grad_(False)
    first, _ = merge_rounded(parts, PLANS, torch.float32, 1, True)
    first.sum().backward()
    assert [name for name, part in parts.items() if part.grad is not None] == ["text", "alignment"]


@pytest.mark.parametrize("axis", [None, 0])
def test_a_step_merges_once_for_all_its_towers_and_parts(axis: int | None) -> None:
    skills = ("general", "text", "image", "alignment")
    weights = SkillWeights(skills, 4, 6, std=1.0, axis=axis)
    with assume_gpu(), share_merges(PLANS):
        with torch.no_grad():
            before = [weights.merged(plan, torch.bfloat16) for plan in PLANS]
        for _ in range(2):  # two micro-batches: the graph of the merge is passed twice
            merged = [weights.merged(plan, torch.bfloat16) for plan in PLANS]
            assert all(ours is theirs for ours, theirs in zip(merged, before, strict=True))
            sum(x.float().sum() for x in merged).backward()  # type: ignore[union-attr]
    once = SkillWeights(skills, 4, 6, std=1.0, axis=axis)
    for plan in PLANS:
        once.merged(plan, torch.bfloat16).float().sum().backward()
    for name, weight in weights.weights.items():
        torch.testing.assert_close(weight.grad, 2 * once.weights[name].grad)
    assert weights.merged(PLANS[0], torch.bfloat16) is not before[0]


def test_layers_without_skills_are_rounded_once() -> None:
    layer = SkillFeedForward(("shared",), 6, 8, std=1.0, out_std=1.0)
    with assume_gpu(), share_merges(PLANS):
        first = layer.up.merged(("shared",), torch.bfloat16)
        assert layer.up.merged(("shared",), torch.bfloat16) is first
    torch.testing.assert_close(first, layer.up.weights["shared"].bfloat16())


def test_the_mean_of_rounded_weights_is_rounded_once() -> None:
    """Sharded weights arrive in the type of products."""
    weights = SkillWeights("abc", 32, 24, std=1.0).bfloat16()
    expected = torch.stack([weights.get(name).double() for name in "abc"]).mean(0)
    found = weights.merged(tuple("abc"), torch.bfloat16)
    assert torch.equal(found, expected.bfloat16())
