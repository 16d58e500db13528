"""Attention for the short sequences of CPU training, as one operation with its own backward pass.

Shapes: B batch, T tokens, H heads, d width of a head, D = H d.

torch's fused CPU attention needs 5 to 10 times as long in its backward pass as plain products
(measured at T 12 to 96). Plain products under autograd spend as much time on copies as on
products. This operation copies the projections once into the layout of batched products, and
their gradient once back.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from skillnet.gpu_kernels import uses_gpu_kernels

#: Longest sequence (tokens) whose T x T probabilities are kept for the backward pass.
PLAIN_TOKENS = 256

#: Lengths (tokens) at which the CPU's softmax is faster in float32 (up to twice, measured).
FLOAT32_SOFTMAX = range(16, 64)


def padding_bias(mask_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive attention bias (B, 1, 1, T): 0 at real tokens, -10,000 at padding.

    exp(-10,000) is 0 in every floating-point type, so padding gets no weight. Unlike -inf, the bias
    gives no NaN for a row that is all padding.

    Args:
        mask_BT: True at real tokens.
        dtype: type of the result.
    """
    return (~mask_BT)[:, None, None, :].to(dtype) * -1e4


def multihead_attention(qkv_BT3D: Tensor, heads: int, bias_B11T: Tensor | None = None) -> Tensor:
    """Compute multi-head scaled dot-product attention, (B, T, 3 D) -> (B, T, D).

    Args:
        qkv_BT3D: queries, keys and values side by side, each with its heads side by side.
        heads: number of heads H.
        bias_B11T: added to the scores of every query; see :func:`padding_bias`.
    """
    B, T, width = qkv_BT3D.shape
    qkv_BT3Hd = qkv_BT3D.view(B, T, 3, heads, width // (3 * heads))
    if bias_B11T is not None:
        bias_B11T = bias_B11T.to(qkv_BT3D.dtype)
    # Longer sequences would need T x T memory per head, so they use torch's fused kernel.
    is_plain = qkv_BT3D.device.type == "cpu" and not uses_gpu_kernels(qkv_BT3D)
    # The choice by length would need a graph for each range of lengths.
    is_plain = is_plain and not torch.compiler.is_compiling()
    if is_plain and T <= PLAIN_TOKENS:
        return _PlainAttention.apply(qkv_BT3Hd, bias_B11T)
    # Cut before the axes are exchanged, so that the gradient is joined in its own layout.
    q_BHTd, k_BHTd, v_BHTd = (x_BTHd.transpose(1, 2) for x_BTHd in qkv_BT3Hd.unbind(2))
    y_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, attn_mask=bias_B11T)
    return y_BHTd.transpose(1, 2).reshape(B, T, width // 3)


class _PlainAttention(torch.autograd.Function):
    """softmax(q k' / sqrt(d) + bias) v of all heads, in batched products of B H matrices."""

    @staticmethod
    def forward(ctx: Any, qkv_BT3Hd: Tensor, bias_B11T: Tensor | None) -> Tensor:
        B, T, _, H, d = qkv_BT3Hd.shape
        # Always a new tensor, because the queries are scaled in place.
        laid_out = qkv_BT3Hd.permute(2, 0, 3, 1, 4).clone(memory_format=torch.contiguous_format)
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
        ctx.shape = (B, T, H, d)
        return torch.bmm(p, v).view(B, H, T, d).transpose(1, 2).reshape(B, T, H * d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        q, k, v, p = ctx.saved_tensors
        B, T, H, d = ctx.shape
        g = grads[0].view(B, T, H, d).transpose(1, 2).reshape(B * H, T, d)
        # All three gradients share one tensor, so the layout is converted back only once.
        grad = g.new_empty(3, B * H, T, d)
        torch.bmm(p.transpose(1, 2), g, out=grad[2])
        scores = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
        torch.bmm(scores, k, out=grad[0]).mul_(d**-0.5)
        torch.bmm(scores.transpose(1, 2), q, out=grad[1])
        return grad.view(3, B, H, T, d).permute(1, 3, 0, 2, 4).contiguous(), None
