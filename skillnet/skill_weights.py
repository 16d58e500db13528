"""Weights of skills: one per skill, and their merging for a set of active skills.

A skill has a whole matrix of its own, or a low-rank difference to another skill, its source (LoRA,
Hu et al. 2022): W = W_source + A B. Both are merged into one matrix before the product.

:class:`SkillWeights` is the parameter container of the layers in :mod:`skillnet.layers`.

On GPUs, float32 weights are rounded to the type of matrix products while they are merged, once per
step (:func:`share_merges`). Merging is bound by memory, so its cost is the number of passes over
the weights. A weight is read once and written in the smaller type at its place in the merged
weight; no rounded copy of one skill is made and joined afterwards. The plans of all towers of a
step are merged together: they share partial means, rounded parts and the sum of their gradients.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from skillnet.config import LowRankSkill
from skillnet.precision import uses_gpu_kernels
from skillnet.skills import nearest_hint
from skillnet.skipped_init import draw_truncated_normal, place_weight

Skills = tuple[str, ...]
Key = TypeVar("Key")
Value = TypeVar("Value")

#: Low-rank skill -> its form.
Forms = Mapping[str, LowRankSkill]
NO_FORMS: Forms = MappingProxyType({})

#: Containers of the weights of skills in :class:`SkillWeights`.
_CONTAINERS = ("weights", "left", "right")


def find_weight_skill(name: str) -> str | None:
    """Return the skill that a parameter belongs to, ``shared`` for a layer without skills.

    Args:
        name: identifier of a parameter; None is returned if it is no weight of a skill.
    """
    container, _, skill = name.rpartition(".")
    return skill if container.rpartition(".")[2] in _CONTAINERS else None


def is_read_by_plan(name: str, skills: Collection[str]) -> bool:
    """Return whether a weight of the active skills and their sources is read.

    A low-rank skill reads the matrices of its source, and has vectors of its own.

    Args:
        name: identifier of a parameter.
        skills: active skills.
    """
    owner, _, skill = name.rpartition(".weights.")
    return not owner.endswith("bias") or skill in ("shared", *skills)


def require_unused_name(container: nn.Module, name: str, what: str) -> None:
    """Raise ValueError if a container already has an attribute of this name, such as ``keys``.

    Args:
        container: module that gets the new entry.
        name: key of the new skill or task in the model's configuration.
        what: ``skill`` or ``task``, for the message.
    """
    if hasattr(container, name):
        raise ValueError(f"the {what} name {name!r} is taken; choose another")


class SkillWeights(nn.Module):
    """One weight per skill, a matrix or a vector, merged on demand for a set of active skills.

    Args:
        skills: names of the skills.
        *shape: size of each skill's weight.
        std: standard deviation of the initial values; 0 gives all of them the value ``mean``.
        axis: None merges by the mean; 0 or 1 merges by concatenation along this axis.
        scale_by_count: divide a concatenation by the number of active skills.
        forms: source and rank of the skills that are low-rank differences; all others are whole.
            Vectors are always whole, and those of a low-rank skill start as a copy of its source.
    """

    def __init__(
        self,
        skills: Iterable[str],
        *shape: int,
        std: float = 0.0,
        axis: int | None = None,
        scale_by_count: bool = False,
        forms: Forms = NO_FORMS,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.std = std
        self.axis = axis
        self.scale_by_count = scale_by_count
        self.weights = nn.ParameterDict()
        self.left, self.right = nn.ParameterDict(), nn.ParameterDict()
        #: Low-rank skill -> its form, of matrices only.
        self.forms: dict[str, LowRankSkill] = {}
        # (skills, dtype) -> (versions of the parts, merged weight); filled only in inference.
        self._merged: dict[tuple[Skills, torch.dtype], tuple[list[int], Tensor]] = {}
        # skills -> (versions of the parts, whether the weights are equal); only in inference.
        self._copies: dict[Skills, tuple[list[int], bool]] = {}
        # A difference follows its source.
        for name in sorted(skills, key=lambda name: _count_sources(name, forms)):
            self.add(name, form=forms.get(name))

    @property
    def is_low_rank(self) -> bool:
        """Whether a skill is a low-rank difference."""
        return bool(self.forms)

    @property
    def names(self) -> tuple[str, ...]:
        """All skills."""
        return (*self.weights, *self.left)

    def add(
        self, name: str, init_from: str | None = None, form: LowRankSkill | None = None
    ) -> None:
        """Add a skill with random weights, or with a copy of another skill's weights.

        Args:
            name: key of the new skill in ``model.skills``.
            init_from: skill to copy; None draws random weights. A low-rank skill equals its source
                then.
            form: source and rank of a low-rank skill; None adds whole weights.

        Raises:
            ValueError: the name is in use, ``init_from`` does not exist, or a difference to the
                source cannot be a copy of it.
        """
        require_unused_name(self.weights, name, "skill")
        if form is not None:
            init_from = init_from or form.source
            if len(self.shape) == 2:
                self._add_difference(name, init_from, form)
                return
        weight = self._new(self.shape)
        if init_from is not None:
            with torch.no_grad():
                weight.copy_(self.get(init_from))
        elif self.std:
            draw_truncated_normal(weight, self.std)
        else:
            nn.init.zeros_(weight)
        self.weights[name] = nn.Parameter(place_weight(name, weight))

    def _add_difference(self, name: str, init_from: str, form: LowRankSkill) -> None:
        require_unused_name(self.left, name, "skill")
        for known in (init_from, form.source):
            self._require(known)
        rows, columns = self.shape
        left, right = self._new((rows, form.rank)), self._new((form.rank, columns))
        if init_from == form.source:
            # Rows of unit length: a step changes the matrix as much as a step on a whole one does.
            nn.init.normal_(left, std=form.rank**-0.5)
            # The product is zero, so the skill starts as its source.
            nn.init.zeros_(right)
        elif self.forms.get(init_from) != form:
            raise ValueError(
                f"{name} is a difference of rank {form.rank} to {form.source} and cannot start as "
                f"{init_from}; give the new skill a rank, which makes it a difference to it"
            )
        else:
            with torch.no_grad():
                left.copy_(self.left[init_from])
                right.copy_(self.right[init_from])
        self.left[name] = nn.Parameter(place_weight(name, left))
        self.right[name] = nn.Parameter(place_weight(name, right))
        self.forms[name] = form

    def _new(self, shape: tuple[int, ...]) -> Tensor:
        # A new skill joins the device and type of the existing ones.
        some = next(iter(self.weights.values()), None)
        if some is None:
            return torch.empty(shape)
        return torch.empty(shape, device=some.device).to(some.dtype)

    def remove(self, name: str) -> None:
        """Remove a skill with its weights."""
        if name in self.weights:
            del self.weights[name]
        else:
            del self.left[name], self.right[name], self.forms[name]
        self._merged.clear()

    def get(self, name: str) -> Tensor:
        """Return the whole weight of a skill.

        Args:
            name: key of the skill in ``model.skills``.

        Raises:
            ValueError: an unknown skill.
        """
        self._require(name)
        if name in self.weights:
            return self.weights[name]
        base = self.get(self.forms[name].source)
        # In the type of the weights: autocast would round the difference before it is added.
        with torch.autocast(base.device.type, enabled=False):
            return torch.addmm(base, self.left[name], self.right[name])

    def _require(self, name: str) -> None:
        # Each step asks this for each weight, so it must not list all skills.
        if name not in self.weights and not (self.is_low_rank and name in self.left):
            raise ValueError(
                f"this model has no skill {name!r}{nearest_hint(name, list(self.names))}"
            )

    def _read_parameters(self, skills: Skills) -> list[Tensor]:
        """Return the parameters that the weights of some skills are computed from."""
        # Every product of every pass asks this, and an attribute of a module is found slowly.
        weights, found = self.weights, []
        for name in skills:
            while name in self.forms:
                found += [self.left[name], self.right[name]]
                name = self.forms[name].source
            if name not in weights:
                self._require(name)
            found.append(weights[name])
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(iter(self.weights.values())).dtype

    def merged(self, skills: Skills, dtype: torch.dtype) -> Tensor:
        """Return the weight that replaces all active skills.

        Without gradients (inference) the result is cached per plan until a weight changes.

        Args:
            skills: active skills, sorted.
            dtype: type of the result.

        Raises:
            ValueError: an unknown skill.
        """
        # An exported graph has no state, and its weights may change between two calls.
        if torch.compiler.is_compiling():
            return self._merge(skills, dtype)
        # In training mode the next step changes the weights, so caching would only hold memory.
        if torch.is_grad_enabled() or self.training:
            step = _of_step
            if step is None or not self._is_rounded(self._read_parameters(skills[:1])[0], dtype):
                return self._merge(skills, dtype)
            return step.get(self, skills, dtype, lambda plans: self._merge_rounded(plans, dtype))
        parts = self._read_parameters(skills)
        return _remember(self._merged, (skills, dtype), parts, lambda: self._merge(skills, dtype))

    def has_copies(self, skills: Skills) -> bool:
        """Return whether some skills have equal weights, as copies of one have.

        The result is cached until a weight changes.

        Args:
            skills: active skills, sorted.

        Raises:
            ValueError: an unknown skill.
        """
        parts = self._read_parameters(skills)
        if any(part.is_inference() for part in parts):
            return False

        def are_equal() -> bool:
            first, *rest = (self.get(name) for name in skills)
            return all(torch.equal(first, other) for other in rest)

        return _remember(self._copies, skills, parts, are_equal)

    def _merge(self, skills: Skills, dtype: torch.dtype) -> Tensor:
        parts = [self.get(name) for name in skills]
        count = len(parts)
        if count == 1:
            return parts[0].to(dtype)
        if self._is_rounded(parts[0], dtype):
            return self._merge_rounded((skills,), dtype)[0]
        if self.axis is None and parts[0].dtype.itemsize == 2:
            return torch.stack(parts).mean(0).to(dtype)  # torch sums 16-bit types in float32
        if self.axis is None:
            total = torch.add(parts[0], parts[1])
            for part in parts[2:]:
                total = torch.add(total, part)
            return (total / count).to(dtype)  # summed in full precision, rounded once
        joined = torch.cat([part.to(dtype) for part in parts], self.axis)
        return joined / count if self.scale_by_count else joined

    def _merge_rounded(self, plans: tuple[Skills, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        parts = {name: self.get(name) for plan in plans for name in plan}
        return merge_rounded(parts, plans, dtype, self.axis, self.scale_by_count)

    @staticmethod
    def _is_rounded(part: Tensor, dtype: torch.dtype) -> bool:
        # CPUs keep weights of these sizes in their caches, and a compiler fuses plain operations.
        is_eager = not torch.compiler.is_compiling()
        return part.dtype != dtype and is_eager and uses_gpu_kernels(part)

    def outline(
        self, skills: Skills, dtype: torch.dtype, device: torch.device, is_gathered: bool
    ) -> Tensor:
        """Return zeros of the shape and kind of a merged weight, without reading a weight.

        Args:
            skills: active skills.
            dtype: type of the merged weight.
            device: where it is used.
            is_gathered: ranks gather the weights in ``dtype``.
        """
        sources = self._read_parameters(skills)
        size = list(self.shape)
        if self.axis is not None:
            size[self.axis] *= len(skills)
        has_gradient = any(part.requires_grad for part in sources)
        values = torch.zeros(size, dtype=dtype, device=device)
        # The weight of one skill is itself, unless it is rounded.
        if len(sources) == 1 and (is_gathered or sources[0].dtype == dtype):
            return nn.Parameter(values, has_gradient)
        return values.requires_grad_(has_gradient)

    def merge_flops(self, skills: Skills) -> int:
        """Return the operations of computing the whole weights of low-rank skills.

        Args:
            skills: active skills.
        """
        ranks = 0
        for name in skills:
            while name in self.forms:
                ranks += self.forms[name].rank
                name = self.forms[name].source
        return 2 * math.prod(self.shape) * ranks

    def train(self, mode: bool = True) -> "SkillWeights":
        if mode:
            self._merged.clear()
            self._copies.clear()
        return super().train(mode)

    # Copies and workers rebuild the cache; it would multiply the size of a transfer.
    def __getstate__(self) -> dict:
        return {**self.__dict__, "_merged": {}, "_copies": {}}

    def extra_repr(self) -> str:
        merge = "mean" if self.axis is None else f"cat {self.axis}"
        rank = f", {len(self.forms)} of low rank" if self.forms else ""
        return f"{'x'.join(map(str, self.shape))} per skill{rank}, {merge}"


def _count_sources(name: str, forms: Forms) -> int:
    count = 0
    while name in forms:
        name, count = forms[name].source, count + 1
    return count


def _remember(
    kept: dict[Key, tuple[list[int], Value]],
    key: Key,
    parts: list[Tensor],
    compute: Callable[[], Value],
) -> Value:
    """Return a value that is computed from some weights, and kept until one of them changes."""
    # An in-place update raises _version, and load_state_dict may replace the storage.
    versions: list[int] = []
    for part in parts:
        if part.is_inference():  # has no version counter
            return compute()
        versions += (part._version, part.data_ptr())
    found = kept.get(key)
    if found is None or found[0] != versions:
        found = kept[key] = versions, compute()
    return found[1]


# -- rounded merges ------------------------------------------------------------------------


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
