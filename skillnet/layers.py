"""Sparse layers: one set of weights per skill, of which only the active ones are computed.

Shapes: B batch, T tokens, D model width, F feed-forward width of one skill, K active skills,
H heads, I and O input and output width of a projection.

The output of a layer is the mean of the outputs of its active skills (source: the SkillNet-NLG
code). Two identities compute it exactly at the cost of one dense layer:

* linear projection: the mean of K products is one product with the mean weight,
      (x W_1' + ... + x W_K') / K  =  x ((W_1 + ... + W_K) / K)'
* feed-forward: K hidden layers side by side are one hidden layer that is K times as wide,
      sum_k gelu(x U_k') V_k' / K  =  gelu(x [U_1; ...; U_K]') [V_1 ... V_K]' / K

Inactive skills are not read. They get no gradient, no weight decay, no optimizer state and no
communication.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skillnet.attention import multihead_attention
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
    """One weight matrix per skill, merged on demand for a set of active skills.

    Args:
        skills: names of the skills.
        rows, columns: shape of the matrix of each skill.
        std: standard deviation of the initial values.
        axis: None merges by the mean; 0 or 1 merges by concatenation along this axis.
        scale_by_count: divide a concatenation by the number of active skills.
    """

    def __init__(
        self,
        skills: Iterable[str],
        rows: int,
        columns: int,
        *,
        std: float,
        axis: int | None = None,
        scale_by_count: bool = False,
    ) -> None:
        super().__init__()
        self.shape = (rows, columns)
        self.std = std
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
        if init_from is None:
            nn.init.trunc_normal_(weight, std=self.std, a=-3 * self.std, b=3 * self.std)
        else:
            with torch.no_grad():
                weight.copy_(self._get(init_from))
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
        return f"{self.shape[0]}x{self.shape[1]} per skill, {merge}"


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type of matrix products with ``x``: that of autocast if enabled, else of ``x``."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class SkillLinear(nn.Module):
    """Linear projection without bias, averaged over the active skills. (B, T, I) -> (B, T, O)."""

    def __init__(self, skills: Iterable[str], inputs: int, outputs: int, *, std: float) -> None:
        super().__init__()
        self.weight = SkillWeights(skills, outputs, inputs, std=std)

    def forward(self, x_BTI: Tensor, skills: Skills) -> Tensor:
        return F.linear(x_BTI, self.weight.merged(skills, compute_dtype(x_BTI)))


class SkillFeedForward(nn.Module):
    """Two-layer feed-forward network, averaged over active skills. (B, T, D) -> (B, T, D)."""

    def __init__(self, skills: Iterable[str], dim: int, hidden: int, *, std: float, out_std: float):
        super().__init__()
        skills = tuple(skills)
        # Rows of `up` and columns of `down` of all active skills lie side by side (see the module).
        self.up = SkillWeights(skills, hidden, dim, std=std, axis=0)
        self.down = SkillWeights(skills, dim, hidden, std=out_std, axis=1, scale_by_count=True)

    def forward(self, x_BTD: Tensor, skills: Skills) -> Tensor:
        dtype = compute_dtype(x_BTD)
        h_BTKF = F.gelu(F.linear(x_BTD, self.up.merged(skills, dtype)))
        return F.linear(h_BTKF, self.down.merged(skills, dtype))

    def flops(self, tokens: int, active: int) -> int:
        """Return the floating-point operations of a number of tokens and of active skills."""
        hidden, dim = self.up.shape
        return 2 * tokens * 2 * dim * hidden * active


class SkillAttention(nn.Module):
    """Multi-head self-attention with skill projections. (B, T, D) -> (B, T, D)."""

    def __init__(
        self, skills: Iterable[str], dim: int, heads: int, *, std: float, out_std: float
    ) -> None:
        super().__init__()
        skills = tuple(skills)
        self.heads = heads
        # One product for queries, keys and values: a third of the kernel launches.
        self.qkv = SkillLinear(skills, dim, 3 * dim, std=std)
        self.out = SkillLinear(skills, dim, dim, std=out_std)

    def forward(self, x_BTD: Tensor, skills: Skills, bias_B11T: Tensor | None = None) -> Tensor:
        """Attend over all tokens; ``bias_B11T`` is added to the scores (see ``padding_bias``)."""
        return self.out(multihead_attention(self.qkv(x_BTD, skills), self.heads, bias_B11T), skills)
