"""Weights of skills: one per skill, and their merging for a set of active skills.

:class:`SkillWeights` is the parameter container of the layers in :mod:`skillnet.layers`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from skillnet.gpu_kernels import uses_gpu_kernels
from skillnet.rounded_weights import Skills, find_step_merges, merge_rounded
from skillnet.skills import nearest_hint


def require_unused_name(container: nn.Module, name: str, what: str) -> None:
    """Raise ValueError if a container already has an attribute of this name, such as ``keys``.

    Args:
        container: module that gets the new entry.
        name: of the new skill or task.
        what: ``skill`` or ``task``, for the message.
    """
    if hasattr(container, name):
        raise ValueError(f"the {what} name {name!r} is taken; choose another")


class SkillWeights(nn.Module):
    """One weight per skill, a matrix or a vector, merged on demand for a set of active skills.

    Args:
        skills: names of the skills.
        *shape: of the weight of each skill.
        std: standard deviation of the initial values; 0 gives all of them the value ``mean``.
        mean: of the initial values.
        axis: None merges by the mean; 0 or 1 merges by concatenation along this axis.
        scale_by_count: divide a concatenation by the number of active skills.
    """

    def __init__(
        self,
        skills: Iterable[str],
        *shape: int,
        std: float = 0.0,
        mean: float = 0.0,
        axis: int | None = None,
        scale_by_count: bool = False,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.std, self.mean = std, mean
        self.axis = axis
        self.scale_by_count = scale_by_count
        self.weights = nn.ParameterDict()
        # (skills, dtype) -> (versions of the parts, merged weight); filled only in inference.
        self._merged: dict[tuple[Skills, torch.dtype], tuple[tuple[int, ...], Tensor]] = {}
        for name in skills:
            self.add(name)

    def add(self, name: str, init_from: str | None = None) -> None:
        """Add a skill with random weights, or with a copy of another skill's weights.

        Args:
            name: of the new skill.
            init_from: skill to copy; None draws random weights.

        Raises:
            ValueError: the name is in use, or ``init_from`` does not exist.
        """
        require_unused_name(self.weights, name, "skill")
        # A new skill joins the device and type of the existing ones.
        some = next(iter(self.weights.values()), None)
        weight = torch.empty(self.shape, device=None if some is None else some.device)
        if some is not None:
            weight = weight.to(some.dtype)
        if init_from is not None:
            with torch.no_grad():
                weight.copy_(self._get(init_from))
        elif self.std:
            low, high = self.mean - 3 * self.std, self.mean + 3 * self.std
            nn.init.trunc_normal_(weight, self.mean, self.std, a=low, b=high)
        else:
            nn.init.constant_(weight, self.mean)
        self.weights[name] = nn.Parameter(weight)

    def remove(self, name: str) -> None:
        """Remove a skill with its weights."""
        del self.weights[name]
        self._merged.clear()

    def _get(self, name: str) -> Tensor:
        if name not in self.weights:
            raise ValueError(
                f"this model has no skill {name!r}{nearest_hint(name, list(self.weights))}"
            )
        return self.weights[name]

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
            if step is None or not self._is_rounded(self._get(skills[0]), dtype):
                return self._merge(skills, dtype)
            return step.get(self, skills, dtype, lambda plans: self._merge_rounded(plans, dtype))
        parts = [self._get(name) for name in skills]
        # An in-place update raises _version, and load_state_dict may replace the storage.
        if any(part.is_inference() for part in parts):  # these tensors have no version counter
            return self._merge(skills, dtype)
        versions = tuple(x for part in parts for x in (part._version, part.data_ptr()))
        kept = self._merged.get((skills, dtype))
        if kept is not None and kept[0] == versions:
            return kept[1]
        merged = self._merge(skills, dtype)
        self._merged[skills, dtype] = (versions, merged)
        return merged

    def _merge(self, skills: Skills, dtype: torch.dtype) -> Tensor:
        parts = [self._get(name) for name in skills]
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
        parts = {name: self._get(name) for plan in plans for name in plan}
        return merge_rounded(parts, plans, dtype, self.axis, self.scale_by_count)

    @staticmethod
    def _is_rounded(part: Tensor, dtype: torch.dtype) -> bool:
        # CPUs keep weights of these sizes in their caches, and a compiler fuses plain operations.
        is_eager = not torch.compiler.is_compiling()
        return part.dtype != dtype and is_eager and uses_gpu_kernels(part)

    def train(self, mode: bool = True) -> "SkillWeights":
        if mode:
            self._merged.clear()
        return super().train(mode)

    # Copies and workers rebuild the cache; it would multiply the size of a transfer.
    def __getstate__(self) -> dict:
        return {**self.__dict__, "_merged": {}}

    def extra_repr(self) -> str:
        merge = "mean" if self.axis is None else f"cat {self.axis}"
        return f"{'x'.join(map(str, self.shape))} per skill, {merge}"
