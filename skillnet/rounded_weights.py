"""Rounding of float32 weights to the type of matrix products, merged over skills, once per step.

Merging is bound by memory, so its cost is the number of passes over the weights. A weight is read
once and written in the smaller type at its place in the merged weight; no rounded copy of one
skill is made and joined afterwards. The plans of all towers of a step are merged together: they
share partial means, rounded parts and the sum of their gradients. :func:`share_merges` keeps the
merged weights for all parts of a step.

:class:`skillnet.layers.SkillWeights` calls this module.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Skills = tuple[str, ...]


class StepMerges:
    """Merged weights of one step; each is merged at its first use.

    Args:
        plans: sets of skills that the towers of the step activate.
    """

    def __init__(self, plans: Iterable[Skills]) -> None:
        self._plans = tuple(dict.fromkeys(plans))
        self._merged: dict[tuple[int, Skills, torch.dtype], Tensor] = {}

    def get(
        self,
        owner: object,
        skills: Skills,
        dtype: torch.dtype,
        merge: Callable[[tuple[Skills, ...]], Sequence[Tensor]],
    ) -> Tensor:
        """Return a merged weight.

        Args:
            owner: object that keeps the memory of the weights.
            skills: active skills.
            dtype: type of the result.
            merge: merges the weights of the owner for several plans.
        """
        if (id(owner), skills, dtype) not in self._merged:
            # A layer without skills has one set of weights, which is no plan.
            plans = self._plans if skills in self._plans else (skills,)
            # The first pass of a contrastive step has no gradients, a later one has.
            with torch.enable_grad():
                merged = merge(plans)
            for plan, weight in zip(plans, merged, strict=True):
                self._merged[id(owner), plan, dtype] = weight
        return self._merged[id(owner), skills, dtype]


_of_step: StepMerges | None = None


@contextlib.contextmanager
def share_merges(plans: Iterable[Skills]) -> Iterator[None]:
    """Merge weights once inside the block, also for several forward and backward passes.

    The weights must not change inside the block.

    Args:
        plans: sets of skills that the passes activate.
    """
    global _of_step
    before, _of_step = _of_step, StepMerges(plans)
    try:
        yield
    finally:
        _of_step = before


def find_step_merges() -> StepMerges | None:
    """Return the merged weights of the current :func:`share_merges` block, if any."""
    return _of_step


def merge_rounded(
    parts: dict[str, Tensor],
    plans: Sequence[Skills],
    dtype: torch.dtype,
    axis: int | None,
    is_scaled: bool,
) -> tuple[Tensor, ...]:
    """Merge weights for several plans, in another type than theirs.

    Args:
        parts: skill -> its weight; all have the same shape and type.
        plans: active skills of each result.
        dtype: type of the results.
        axis: None merges by the mean; 0 or 1 merges by concatenation along this axis.
        is_scaled: divide a concatenation by the number of active skills.
    """
    # Skills of many plans come first, so that plans share the mean of their first skills.
    order = sorted(parts, key=lambda name: -sum(name in plan for plan in plans))
    numbers = {name: number for number, name in enumerate(order)}
    numbered = [[numbers[name] for name in plan] for plan in plans]
    if axis is None:
        numbered = [sorted(plan) for plan in numbered]
    merged: tuple[Tensor, ...] = _RoundedMerge.apply(
        numbered, dtype, axis, is_scaled or axis is None, *(parts[name] for name in order)
    )
    return merged


class _RoundedMerge(torch.autograd.Function):
    """Merged weights of several plans. The gradient of a part is the sum over its plans.

    Gradients of several plans are summed in the smaller type, as autocast does for a weight that
    is used twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plans: list[list[int]],
        dtype: torch.dtype,
        axis: int | None,
        is_scaled: bool,
        *parts: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.plans, ctx.axis, ctx.is_scaled, ctx.dtype = plans, axis, is_scaled, parts[0].dtype
        ctx.set_materialize_grads(False)
        if axis is None:
            return _round_means(parts, plans, dtype)
        return _round_concatenations(parts, plans, dtype, axis, is_scaled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        pieces: dict[int, list[tuple[Tensor, int]]] = {}
        for plan, grad in zip(ctx.plans, grads, strict=True):
            if grad is not None:
                count = len(plan)
                cut = [grad] * count if ctx.axis is None else grad.chunk(count, ctx.axis)
                for number, piece in zip(plan, cut, strict=True):
                    if ctx.needs_input_grad[4 + number]:
                        pieces.setdefault(number, []).append((piece, count))
        found = _sum_gradients(pieces, ctx.dtype, ctx.is_scaled)
        return (None, None, None, None, *map(found.get, range(len(ctx.needs_input_grad) - 4)))


def _round_means(
    parts: Sequence[Tensor], plans: list[list[int]], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    means: dict[tuple[int, ...], Tensor] = {}
    merged = []
    for plan in plans:
        mean = parts[plan[0]]
        rounded = torch.empty_like(mean, dtype=dtype)
        for count in range(2, len(plan)):
            first = tuple(plan[:count])
            if first not in means:
                means[first] = torch.lerp(mean, parts[plan[count - 1]], 1 / count)
            mean = means[first]
        if len(plan) == 1:
            rounded.copy_(mean)
        else:
            # The last step of the running mean is written in the smaller type.
            torch.lerp(mean, parts[plan[-1]], 1 / len(plan), out=rounded)
        merged.append(rounded)
    return tuple(merged)


def _round_concatenations(
    parts: Sequence[Tensor],
    plans: list[list[int]],
    dtype: torch.dtype,
    axis: int,
    is_scaled: bool,
) -> tuple[Tensor, ...]:
    shape, merged = list(parts[0].shape), []
    # (part, factor) -> its place in an earlier result.
    rounded: dict[tuple[int, float], Tensor] = {}
    for plan in plans:
        scale = 1 / len(plan) if is_scaled else 1.0
        size = [n * len(plan) if i == axis else n for i, n in enumerate(shape)]
        merged.append(parts[0].new_empty(size, dtype=dtype))
        pieces = merged[-1].chunk(len(plan), axis)
        copies: list[tuple[Tensor, Tensor]] = []
        for number, piece in zip(plan, pieces, strict=True):
            source = rounded.setdefault((number, scale), piece)
            if source is piece and scale != 1:
                torch.mul(parts[number], scale, out=piece)
            else:
                copies.append((piece, parts[number] if source is piece else source))
        if copies:
            torch._foreach_copy_([piece for piece, _ in copies], [x for _, x in copies])
    return tuple(merged)


def _sum_gradients(
    pieces: dict[int, list[tuple[Tensor, int]]], dtype: torch.dtype, is_scaled: bool
) -> dict[int, Tensor]:
    """Return part -> its gradient.

    Args:
        pieces: part -> its gradients, each with the number of skills of its plan.
        dtype: type of the results.
        is_scaled: divide a gradient by the number of skills.
    """
    sums: dict[tuple[int, ...], Tensor] = {}
    shares: dict[int, Tensor] = {}
    found, unscaled = {}, {}
    for number, mine in pieces.items():
        total, count = mine[0]
        # All parts of a mean that the same plans use have one gradient.
        key = tuple(id(piece) for piece, _ in mine)
        if key not in sums:
            for piece, other in mine[1:]:
                total = torch.add(total, piece, alpha=count / other if is_scaled else 1)
            sums[key] = total
        if is_scaled and count > 1:
            # A tensor, unlike a number, lets the product have the type of the weights.
            if count not in shares:
                shares[count] = total.new_full((1,), 1 / count, dtype=dtype)
            found[number] = torch.mul(sums[key], shares[count])
        else:
            found[number] = torch.empty_like(sums[key], dtype=dtype)
            unscaled[number] = sums[key]
    if unscaled:
        torch._foreach_copy_([found[number] for number in unscaled], list(unscaled.values()))
    return found
