"""Sparse layers: one set of weights per skill, of which only the active ones are computed.

Shapes: B batch, T tokens, D model width, F feed-forward width of one skill, K active skills,
H heads, I and O input and output width of a projection.

The output of a layer is the mean of the outputs of its active skills (source: the SkillNet-NLG
code). Two identities compute it exactly at the cost of one dense layer:

* linear projection: the mean of K products is one product with the mean weight,
      (x W_1' + ... + x W_K') / K  =  x ((W_1 + ... + W_K) / K)'
* feed-forward: K hidden layers side by side are one hidden layer that is K times as wide,
      sum_k gelu(x U_k') V_k' / K  =  gelu(x [U_1; ...; U_K]') [V_1 ... V_K]' / K

Biases merge like the weights that they follow, and the scales and shifts of norms by the mean.
Inactive skills are not read. They get no gradient, no weight decay, no optimizer state and no
communication.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skillnet.attention import multihead_attention
from skillnet.gpu_kernels import uses_gpu_kernels
from skillnet.rounded_weights import Skills
from skillnet.skill_weights import SkillWeights


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type of matrix products with ``x``: that of autocast if enabled, else of ``x``."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class SkillLinear(nn.Module):
    """Linear projection, averaged over the active skills. (B, T, I) -> (B, T, O)."""

    def __init__(
        self,
        skills: Iterable[str],
        inputs: int,
        outputs: int,
        *,
        std: float,
        has_bias: bool = False,
        rank: int = 0,
    ) -> None:
        super().__init__()
        skills = tuple(skills)
        self.weight = SkillWeights(skills, outputs, inputs, std=std, rank=rank)
        self.bias = SkillWeights(skills, outputs, rank=rank) if has_bias else None

    def forward(self, x_BTI: Tensor, skills: Skills) -> Tensor:
        dtype = compute_dtype(x_BTI)
        return F.linear(x_BTI, self.weight.merged(skills, dtype), _merge(self.bias, skills, dtype))


def _merge(bias: SkillWeights | None, skills: Skills, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.merged(skills, dtype)


class SkillFeedForward(nn.Module):
    """Two-layer feed-forward network, averaged over active skills. (B, T, D) -> (B, T, D)."""

    def __init__(
        self,
        skills: Iterable[str],
        dim: int,
        hidden: int,
        *,
        std: float,
        out_std: float,
        has_bias: bool = False,
        rank: int = 0,
    ) -> None:
        super().__init__()
        skills = tuple(skills)
        # Rows of `up` and columns of `down` of all active skills lie side by side (see the module).
        self.up = SkillWeights(skills, hidden, dim, std=std, axis=0, rank=rank)
        self.down = SkillWeights(
            skills, dim, hidden, std=out_std, axis=1, scale_by_count=True, rank=rank
        )
        self.up_bias = SkillWeights(skills, hidden, axis=0, rank=rank) if has_bias else None
        self.down_bias = SkillWeights(skills, dim, rank=rank) if has_bias else None

    def forward(self, x_BTD: Tensor, skills: Skills) -> Tensor:
        dtype = compute_dtype(x_BTD)
        if self._has_copies(x_BTD, skills):
            skills = skills[:1]
        up_bias, down_bias = (_merge(b, skills, dtype) for b in (self.up_bias, self.down_bias))
        h_BTKF = F.gelu(F.linear(x_BTD, self.up.merged(skills, dtype), up_bias))
        return F.linear(h_BTKF, self.down.merged(skills, dtype), down_bias)

    def _has_copies(self, x_BTD: Tensor, skills: Skills) -> bool:
        """Return whether the active skills are copies, in inference: one computes all outputs.

        The wide product would add the same terms in another order, so an upcycled model would
        differ from its source in the last bits.
        """
        if len(skills) == 1 or self.training or torch.is_grad_enabled():
            return False
        # The host would wait for the comparison on a GPU, and a graph cannot branch on it.
        if uses_gpu_kernels(x_BTD) or torch.compiler.is_compiling():
            return False
        parts = (self.up, self.up_bias, self.down, self.down_bias)
        return all(part is None or part.has_copies(skills) for part in parts)

    def flops(self, tokens: int, active: int) -> int:
        """Return the floating-point operations of a number of tokens and of active skills."""
        hidden, dim = self.up.shape
        return 2 * tokens * 2 * dim * hidden * active


class SkillAttention(nn.Module):
    """Multi-head self-attention with skill projections. (B, T, D) -> (B, T, D)."""

    def __init__(
        self,
        skills: Iterable[str],
        dim: int,
        heads: int,
        *,
        std: float,
        out_std: float,
        has_bias: bool = False,
        rank: int = 0,
    ) -> None:
        super().__init__()
        skills = tuple(skills)
        self.heads = heads
        # One product for queries, keys and values: a third of the kernel launches.
        self.qkv = SkillLinear(skills, dim, 3 * dim, std=std, has_bias=has_bias, rank=rank)
        self.out = SkillLinear(skills, dim, dim, std=out_std, has_bias=has_bias, rank=rank)

    def forward(self, x_BTD: Tensor, skills: Skills, bias_B11T: Tensor | None = None) -> Tensor:
        """Attend over all tokens; ``bias_B11T`` is added to the scores (see ``padding_bias``)."""
        return self.out(multihead_attention(self.qkv(x_BTD, skills), self.heads, bias_B11T), skills)
