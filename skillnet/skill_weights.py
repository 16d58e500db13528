"""Weights of skills: one per skill, and their merging for a set of active skills.

A skill has a whole matrix of its own, or with a rank a low-rank difference to the skill ``general``
(LoRA, Hu et al. 2022): W = W_general + A B. Both are merged into one matrix before the product.

:class:`SkillWeights` is the parameter container of the layers in :mod:`skillnet.layers`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from skillnet.config import BASE_SKILL
from skillnet.precision import uses_gpu_kernels
from skillnet.rounded_weights import Skills, find_step_merges, merge_rounded
from skillnet.skills import nearest_hint
from skillnet.skipped_init import draw_truncated_normal, place_weight

#: Containers of the weights of skills in :class:`SkillWeights`.
_CONTAINERS = ("weights", "left", "right")


def find_weight_skill(name: str) -> str | None:
    """Return the skill that a parameter belongs to, ``shared`` for a layer without skills.

    Args:
        name: identifier of a parameter; None is returned if it is no weight of a skill.
    """
    container, _, skill = name.rpartition(".")
    return skill if container.rpartition(".")[2] in _CONTAINERS else None


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
        rank: columns of A in the differences to ``general``; 0 gives every skill a whole weight.
            Vectors are always whole, and those of a new skill start as a copy.
    """

    def __init__(
        self,
        skills: Iterable[str],
        *shape: int,
        std: float = 0.0,
        axis: int | None = None,
        scale_by_count: bool = False,
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.std = std
        self.axis = axis
        self.scale_by_count = scale_by_count
        skills = tuple(skills)
        # A layer without skills has one weight, which is no difference.
        self.rank = rank if BASE_SKILL in skills else 0
        self.weights = nn.ParameterDict()
        if self.is_low_rank:
            self.left, self.right = nn.ParameterDict(), nn.ParameterDict()
            skills = (BASE_SKILL, *(name for name in skills if name != BASE_SKILL))
        # (skills, dtype) -> (versions of the parts, merged weight); filled only in inference.
        self._merged: dict[tuple[Skills, torch.dtype], tuple[tuple[int, ...], Tensor]] = {}
        # skills -> (versions of the parts, whether the weights are equal); only in inference.
        self._copies: dict[Skills, tuple[tuple[int, ...], bool]] = {}
        for name in skills:
            self.add(name)

    @property
    def is_low_rank(self) -> bool:
        """Whether all skills but ``general`` are low-rank differences."""
        return self.rank > 0 and len(self.shape) == 2

    @property
    def names(self) -> tuple[str, ...]:
        """All skills."""
        return (*self.weights, *self.left) if self.is_low_rank else tuple(self.weights)

    def add(self, name: str, init_from: str | None = None) -> None:
        """Add a skill with random weights, or with a copy of another skill's weights.

        Args:
            name: key of the new skill in ``model.skills``.
            init_from: skill to copy; None draws random weights. A low-rank skill equals ``general``
                then.

        Raises:
            ValueError: the name is in use, or ``init_from`` does not exist.
        """
        require_unused_name(self.weights, name, "skill")
        if self.is_low_rank and self.weights:
            self._add_difference(name, None if init_from == BASE_SKILL else init_from)
            return
        if self.rank and self.weights:
            init_from = init_from or BASE_SKILL
        weight = self._new(self.shape)
        if init_from is not None:
            with torch.no_grad():
                weight.copy_(self.get(init_from))
        elif self.std:
            draw_truncated_normal(weight, self.std)
        else:
            nn.init.zeros_(weight)
        self.weights[name] = nn.Parameter(place_weight(name, weight))

    def _add_difference(self, name: str, init_from: str | None) -> None:
        require_unused_name(self.left, name, "skill")
        rows, columns = self.shape
        left, right = self._new((rows, self.rank)), self._new((self.rank, columns))
        if init_from is None:
            # Rows of unit length: a step changes the matrix as much as a step on a whole one does.
            nn.init.normal_(left, std=self.rank**-0.5)
            # The product is zero, so the skill starts as `general`.
            nn.init.zeros_(right)
        else:
            self._require(init_from)
            with torch.no_grad():
                left.copy_(self.left[init_from])
                right.copy_(self.right[init_from])
        self.left[name] = nn.Parameter(place_weight(name, left))
        self.right[name] = nn.Parameter(place_weight(name, right))

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
            del self.left[name]
            del self.right[name]
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
        base = self.weights[BASE_SKILL]
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
        for name in skills:
            self._require(name)
        if not self.is_low_rank:
            return [self.weights[name] for name in skills]
        factors = [part[n] for n in skills if n in self.left for part in (self.left, self.right)]
        return [self.weights[BASE_SKILL], *factors]

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
        # A graph has no state, and its weights may change between two calls.
        if torch.compiler.is_compiling():
            return self._merge(skills, dtype)
        # In training mode the next step changes the weights, so caching would only hold memory.
        if torch.is_grad_enabled() or self.training:
            step = find_step_merges()
            if step is None or not self._is_rounded(self._read_parameters(skills[:1])[0], dtype):
                return self._merge(skills, dtype)
            return step.get(self, skills, dtype, lambda plans: self._merge_rounded(plans, dtype))
        parts = self._read_parameters(skills)
        # An in-place update raises _version, and load_state_dict may replace the storage.
        if any(part.is_inference() for part in parts):  # these tensors have no version counter
            return self._merge(skills, dtype)
        versions = _read_versions(parts)
        kept = self._merged.get((skills, dtype))
        if kept is not None and kept[0] == versions:
            return kept[1]
        merged = self._merge(skills, dtype)
        self._merged[skills, dtype] = (versions, merged)
        return merged

    def has_copies(self, skills: Skills) -> bool:
        """Return whether some skills have equal weights, as copies of one have.

        The result is cached until a weight changes.

        Args:
            skills: active skills, sorted.

        Raises:
            ValueError: an unknown skill.
        """
        parts = self._read_parameters(skills)
        if any(part.is_inference() for part in parts):  # these tensors have no version counter
            return False
        versions = _read_versions(parts)
        kept = self._copies.get(skills)
        if kept is None or kept[0] != versions:
            first, *rest = (self.get(name) for name in skills)
            kept = versions, all(torch.equal(first, other) for other in rest)
            self._copies[skills] = kept
        return kept[1]

    def _merge(self, skills: Skills, dtype: torch.dtype) -> Tensor:
        parts = [self.get(name) for name in skills]
        count = len(parts)
        if count == 1:
            return parts[0].to(dtype)
        if self._is_rounded(parts[0], dtype):
            return self._merge_rounded((skills,), dtype)[0]
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

    def merge_flops(self, skills: Skills) -> int:
        """Return the operations of computing the whole weights of low-rank skills.

        Args:
            skills: active skills.
        """
        if not self.is_low_rank:
            return 0
        rows, columns = self.shape
        return 2 * rows * columns * self.rank * sum(name in self.left for name in skills)

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
        rank = f", rank {self.rank}" if self.is_low_rank else ""
        return f"{'x'.join(map(str, self.shape))} per skill{rank}, {merge}"


def _read_versions(parts: list[Tensor]) -> tuple[int, ...]:
    """Return numbers that change whenever one of the weights does."""
    return tuple(x for part in parts for x in (part._version, part.data_ptr()))
