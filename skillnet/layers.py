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

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from skillnet.precision import native_bf16, uses_gpu_kernels
from skillnet.skill_weights import NO_FORMS, Forms, Skills, SkillWeights

#: Longest sequence (tokens) whose T x T probabilities are kept for the backward pass.
PLAIN_TOKENS = 256

#: Lengths (tokens) at which the CPU's softmax is faster in float32 (up to twice, measured).
FLOAT32_SOFTMAX = range(16, 64)


#: Packed tokens are a multiple of this number: oneDNN compiles a kernel for each shape.
PACKED_MULTIPLE = 64


def padding_bias(mask_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive attention bias (B, 1, 1, T): 0 at real tokens, -10,000 at padding.

    exp(-10,000) is 0 in every floating-point type, so padding gets no weight. Unlike -inf, the bias
    gives no NaN for a row that is all padding.

    Args:
        mask_BT: True at real tokens.
        dtype: type of the result.
    """
    return (~mask_BT)[:, None, None, :].to(dtype) * -1e4


class PackedRows(NamedTuple):
    """Places of the N real tokens of padded rows. Layers compute these tokens alone, as (P, D).

    P is N, rounded up to a multiple of :data:`PACKED_MULTIPLE`. The last P - N tokens are copies of
    the first one. No result and no gradient of them is used.

    Args:
        places_P: place of each token among the B T tokens of the rows.
        real: number of real tokens N.
        bias_B11T: see :func:`padding_bias`.
    """

    places_P: Tensor
    real: int
    bias_B11T: Tensor

    @classmethod
    def find(cls, places_N: Tensor, bias_B11T: Tensor) -> "PackedRows":
        """Return the layout of real tokens.

        Args:
            places_N: place of each real token among the B T tokens.
            bias_B11T: see :func:`padding_bias`.
        """
        return cls(_round_up(places_N), len(places_N), bias_B11T)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens, (B, T)."""
        return self.bias_B11T.shape[0], self.bias_B11T.shape[-1]

    def pack(self, x_BTD: Tensor) -> Tensor:
        """Return the tokens without padding, (B, T, D) -> (P, D)."""
        return x_BTD.flatten(0, 1).index_select(0, self.places_P)

    def pad(self, x_PD: Tensor) -> Tensor:
        """Return the tokens at their places and 0 at padding, (P, D) -> (B, T, D)."""
        B, T = self.shape
        padded = x_PD.new_zeros(B * T, x_PD.shape[1])
        padded = padded.index_copy(0, self.places_P[: self.real], x_PD[: self.real])
        return padded.view(B, T, -1)

    def select_rows(self, rows_K: Tensor) -> tuple[Tensor, "PackedRows"]:
        """Return the tokens of K rows, as numbers below P, and their places in these rows."""
        B, T = self.shape
        places_N = self.places_P[: self.real]
        new_B = rows_K.new_full((B,), -1)
        new_B[rows_K] = torch.arange(len(rows_K), device=rows_K.device)
        row_N = new_B.index_select(0, places_N.div(T, rounding_mode="floor"))
        tokens_M = (row_N >= 0).nonzero()[:, 0]
        places_M = row_N[tokens_M] * T + places_N[tokens_M] % T
        bias_K11T = self.bias_B11T.index_select(0, rows_K)
        return _round_up(tokens_M), PackedRows.find(places_M, bias_K11T)


def _round_up(index_N: Tensor) -> Tensor:
    """Repeat the first entry until the length is a multiple of :data:`PACKED_MULTIPLE`."""
    more = -len(index_N) % PACKED_MULTIPLE
    return torch.cat([index_N, index_N[:1].expand(more)]) if len(index_N) else index_N


class RaggedRows(NamedTuple):
    """Lengths of padded rows, for flash attention of GPUs, which takes no bias.

    Real tokens and padding of a row are two sequences, so the host need not know the lengths::

        row 0   a b c . .       bounds  0 3 5 7 10
        row 1   d e . . .

    Args:
        mask_BT: True at real tokens. Padding follows them.
        bounds_R: first token of each sequence and the end of the last, (2 B + 1,) int32.
    """

    mask_BT: Tensor
    bounds_R: Tensor

    @classmethod
    def find(cls, mask_BT: Tensor) -> "RaggedRows":
        """Return the lengths of rows.

        Args:
            mask_BT: True at real tokens. Padding follows them.
        """
        B, T = mask_BT.shape
        starts = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=mask_BT.device)
        lengths_B1 = mask_BT.sum(1, keepdim=True, dtype=torch.int32)
        bounds = starts[:, None] + F.pad(lengths_B1, (1, 0, 0, 1))
        return cls(mask_BT, bounds.flatten()[:-1])


def takes_lengths(x_BTD: Tensor, head_width: int) -> bool:
    """Return whether attention over tokens can take lengths of rows in place of a bias.

    Args:
        x_BTD: tokens.
        head_width: width d of a head.
    """
    is_rounded = x_BTD.is_cuda and compute_dtype(x_BTD) == torch.bfloat16
    return is_rounded and head_width % 8 == 0 and head_width <= 256 and _has_flash(x_BTD.device)


@lru_cache
def _has_flash(device: torch.device) -> bool:
    return native_bf16(device)


# As torch.compiler.assume_constant_result, which imports the compiler: seconds of each start.
_has_flash._dynamo_marked_constant = True  # type: ignore[attr-defined]


#: What the attention must know of the tokens: nothing if all of (B, T, D) are real, a bias or the
#: lengths for padded ones, or the places of packed ones.
Padding = Tensor | RaggedRows | PackedRows | None


def multihead_attention(qkv: Tensor, heads: int, padding: Padding = None) -> Tensor:
    """Compute multi-head scaled dot-product attention, (B, T, 3 D) -> (B, T, D).

    Args:
        qkv: (B, T, 3 D), or (N, 3 D) of packed rows: queries, keys and values side by side, each
            with its heads side by side.
        heads: number of heads H.
        padding: bias (B, 1, 1, T) that is added to the scores of every query, lengths of rows on a
            GPU (:func:`takes_lengths`), or packed rows.

    Returns:
        (B, T, D), or (N, D) of packed rows.
    """
    if isinstance(padding, RaggedRows):
        return _attend_ragged(qkv, heads, padding)
    if not isinstance(padding, PackedRows):
        return _attend(qkv, heads, padding)
    if padding.shape[1] > PLAIN_TOKENS:
        return padding.pack(_attend(padding.pad(qkv), heads, padding.bias_B11T))
    packed = padding._replace(bias_B11T=padding.bias_B11T.to(qkv.dtype))
    return _PlainAttention.apply(qkv, (*padding.shape, heads), packed.bias_B11T, packed)


def _attend(qkv_BT3D: Tensor, heads: int, bias_B11T: Tensor | None) -> Tensor:
    B, T, width = qkv_BT3D.shape
    if bias_B11T is not None:
        bias_B11T = bias_B11T.to(qkv_BT3D.dtype)
    # Longer sequences would need T x T memory per head, so they use torch's fused kernel.
    is_plain = qkv_BT3D.device.type == "cpu" and not uses_gpu_kernels(qkv_BT3D)
    # The choice by length would need a graph for each range of lengths.
    is_plain = is_plain and not torch.compiler.is_compiling()
    if is_plain and T <= PLAIN_TOKENS:
        return _PlainAttention.apply(qkv_BT3D, (B, T, heads), bias_B11T, None)
    # Cut before the axes are exchanged, so that the gradient is joined in its own layout.
    qkv_BT3Hd = qkv_BT3D.view(B, T, 3, heads, width // (3 * heads))
    q_BHTd, k_BHTd, v_BHTd = (x_BTHd.transpose(1, 2) for x_BTHd in qkv_BT3Hd.unbind(2))
    y_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, attn_mask=bias_B11T)
    return y_BHTd.transpose(1, 2).reshape(B, T, width // 3)


def _attend_ragged(qkv_BT3D: Tensor, heads: int, rows: RaggedRows) -> Tensor:
    B, T, width = qkv_BT3D.shape
    q_NHd, k_NHd, v_NHd = qkv_BT3D.view(B * T, 3, heads, width // (3 * heads)).unbind(1)
    y_NHd = attend_sequences(q_NHd, k_NHd, v_NHd, rows.bounds_R, T)
    return y_NHd.reshape(B, T, width // 3)


def attend_sequences(
    q_NHd: Tensor, k_NHd: Tensor, v_NHd: Tensor, bounds_R: Tensor, longest: int
) -> Tensor:
    """Compute attention within sequences of N tokens on a GPU, (N, H, d).

    Args:
        q_NHd: queries.
        k_NHd: keys.
        v_NHd: values.
        bounds_R: see :class:`RaggedRows`.
        longest: largest number of tokens of a sequence.
    """
    # ``torch.nn.attention.varlen`` calls this operation too, and fills three more tensors for it.
    attend = torch.ops.aten._flash_attention_forward
    found = attend(q_NHd, k_NHd, v_NHd, bounds_R, bounds_R, longest, longest, 0.0, False, False)
    attended: Tensor = found[0]
    return attended


class _PlainAttention(torch.autograd.Function):
    """softmax(q k' / sqrt(d) + bias) v of all heads, in batched products of B H matrices.

    Packed tokens are put at their places, and taken from there, inside of the function: autograd
    would need more copies for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        shape: tuple[int, int, int],
        bias_B11T: Tensor | None,
        packed: PackedRows | None,
    ) -> Tensor:
        B, T, H = shape
        width = qkv.shape[-1]
        d = width // (3 * H)
        padded = _pad(qkv, packed).view(B, T, 3, H, d)
        # Always a new tensor, because the queries are scaled in place.
        laid_out = padded.permute(2, 0, 3, 1, 4).clone(memory_format=torch.contiguous_format)
        q, k, v = laid_out.view(3, B * H, T, d).unbind(0)
        q.mul_(d**-0.5)
        scores = torch.bmm(q, k.transpose(1, 2))
        if bias_B11T is not None:
            scores.view(B, H, T, T).add_(bias_B11T)
        if scores.dtype == torch.bfloat16 and T in FLOAT32_SOFTMAX:
            p = torch.softmax(scores, -1, dtype=torch.float32).to(scores.dtype)
        else:
            p = torch.softmax(scores, -1)
        # The probabilities are kept, not recomputed: at these lengths memory is cheap.
        ctx.save_for_backward(q, k, v, p)
        ctx.shape, ctx.packed = (B, T, H, d), packed
        y_BTD = torch.bmm(p, v).view(B, H, T, d).transpose(1, 2).reshape(B, T, H * d)
        return y_BTD if packed is None else packed.pack(y_BTD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        q, k, v, p = ctx.saved_tensors
        B, T, H, d = ctx.shape
        packed: PackedRows | None = ctx.packed
        g = _pad(grads[0], packed).view(B, T, H, d).transpose(1, 2).reshape(B * H, T, d)
        # All three gradients share one tensor, so the layout is converted back only once.
        grad = g.new_empty(3, B * H, T, d)
        torch.bmm(p.transpose(1, 2), g, out=grad[2])
        scores = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
        torch.bmm(scores, k, out=grad[0]).mul_(d**-0.5)
        torch.bmm(scores.transpose(1, 2), q, out=grad[1])
        joined = grad.view(3, B, H, T, d).permute(1, 3, 0, 2, 4).reshape(B * T, 3 * H * d)
        if packed is None:
            return joined.view(B, T, -1), None, None, None
        result = joined.new_zeros(len(packed.places_P), joined.shape[1])
        places_N = packed.places_P[: packed.real]
        torch.index_select(joined, 0, places_N, out=result[: packed.real])
        return result, None, None, None


def _pad(x: Tensor, packed: PackedRows | None) -> Tensor:
    return x if packed is None else packed.pad(x)


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
        forms: Forms = NO_FORMS,
    ) -> None:
        super().__init__()
        skills = tuple(skills)
        self.weight = SkillWeights(skills, outputs, inputs, std=std, forms=forms)
        self.bias = SkillWeights(skills, outputs, forms=forms) if has_bias else None

    def forward(self, x_BTI: Tensor, skills: Skills) -> Tensor:
        return F.linear(x_BTI, *merge_product(self.parts, skills, compute_dtype(x_BTI)))

    @property
    def parts(self) -> "ProductParts":
        """Weights and biases of the skills."""
        return self.weight, self.bias


#: Weights of a product, and its biases, if the model has some.
ProductParts = tuple[SkillWeights, SkillWeights | None]
#: The same, merged for the active skills.
Product = tuple[Tensor, Tensor | None]


def merge_product(parts: ProductParts, skills: Skills, dtype: torch.dtype) -> Product:
    """Return the weight and the bias that replace those of all active skills.

    Args:
        parts: weights and biases of the skills.
        skills: active skills, sorted.
        dtype: type of the results.
    """
    weight, bias = parts
    return weight.merged(skills, dtype), None if bias is None else bias.merged(skills, dtype)


def _merge_products(
    products: tuple[ProductParts, ...], skills: Skills, x_BTD: Tensor
) -> tuple[Product, ...]:
    dtype = compute_dtype(x_BTD)
    return tuple(merge_product(parts, skills, dtype) for parts in products)


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
        forms: Forms = NO_FORMS,
    ) -> None:
        super().__init__()
        skills = tuple(skills)
        # Rows of `up` and columns of `down` of all active skills lie side by side (see the module).
        self.up = SkillWeights(skills, hidden, dim, std=std, axis=0, forms=forms)
        self.down = SkillWeights(
            skills, dim, hidden, std=out_std, axis=1, scale_by_count=True, forms=forms
        )
        self.up_bias = SkillWeights(skills, hidden, axis=0, forms=forms) if has_bias else None
        self.down_bias = SkillWeights(skills, dim, forms=forms) if has_bias else None

    @property
    def products(self) -> tuple[ProductParts, ...]:
        """Weights of both products."""
        return (self.up, self.up_bias), (self.down, self.down_bias)

    def merge(self, x_BTD: Tensor, skills: Skills) -> tuple[Product, ...]:
        """Return the weights that :meth:`forward` reads.

        Args:
            x_BTD: tokens.
            skills: active skills, sorted.
        """
        if self._has_copies(x_BTD, skills):
            skills = skills[:1]
        return _merge_products(self.products, skills, x_BTD)

    def forward(self, x_BTD: Tensor, weights: tuple[Product, ...]) -> Tensor:
        up, down = weights
        return F.linear(F.gelu(F.linear(x_BTD, *up)), *down)

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
        return all(part is None or part.has_copies(skills) for part in chain(*self.products))

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
        forms: Forms = NO_FORMS,
    ) -> None:
        super().__init__()
        skills = tuple(skills)
        self.heads = heads
        # One product for queries, keys and values: a third of the kernel launches.
        self.qkv = SkillLinear(skills, dim, 3 * dim, std=std, has_bias=has_bias, forms=forms)
        self.out = SkillLinear(skills, dim, dim, std=out_std, has_bias=has_bias, forms=forms)

    @property
    def products(self) -> tuple[ProductParts, ...]:
        """Weights of both products."""
        return self.qkv.parts, self.out.parts

    def merge(self, x_BTD: Tensor, skills: Skills) -> tuple[Product, ...]:
        """Return the weights that :meth:`forward` reads.

        Args:
            x_BTD: tokens.
            skills: active skills, sorted.
        """
        return _merge_products(self.products, skills, x_BTD)

    def forward(
        self, x_BTD: Tensor, weights: tuple[Product, ...], padding: Padding = None
    ) -> Tensor:
        """Attend over all real tokens of each row, see :func:`multihead_attention`."""
        qkv, out = weights
        return F.linear(multihead_attention(F.linear(x_BTD, *qkv), self.heads, padding), *out)


class LayerWeights(NamedTuple):
    """What the computation of a layer reads, as tensors of the active skills together.

    Args:
        attention: see :meth:`SkillAttention.merge`.
        feedforward: see :meth:`SkillFeedForward.merge`; nothing for experts.
        norms: scale and shift of both norms.
    """

    attention: tuple[Product, ...]
    feedforward: tuple[Product, ...]
    norms: tuple[tuple[Tensor, Tensor], ...]

    def list_tensors(self) -> list[Tensor]:
        """Return the weights that the layer has."""
        return [each for each in self._flatten() if each is not None]

    def _flatten(self) -> Iterator[Tensor | None]:
        for products in self:
            yield from chain(*products)

    def describe(self) -> tuple[Any, ...]:
        """Return what the graph of a layer depends on."""
        return tuple(
            each if each is None else (type(each), each.shape, each.dtype, each.requires_grad)
            for each in self._flatten()
        )

    def detach(self) -> "LayerWeights":
        """Return the same values as plain tensors, without a gradient."""
        attention, feedforward = (
            tuple((w.detach(), None if b is None else b.detach()) for w, b in products)
            for products in (self.attention, self.feedforward)
        )
        norms = tuple((scale.detach(), shift.detach()) for scale, shift in self.norms)
        return LayerWeights(attention, feedforward, norms)
