"""What SkillNet's encoder is measured against, with the same norms, activation and depth.

Shapes: B batch, T tokens, D model width, F hidden width of one skill, K active skills.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skillnet.attention import multihead_attention
from skillnet.config import SkillNetConfig
from skillnet.encoder import Encoder, EncoderLayer
from skillnet.layers import SkillLinear, Skills, compute_dtype


class DenseEncoder(nn.Module):
    """A Transformer without skills, of torch.nn.functional's kernels; ``hidden`` in all.

    ``torch_attention`` takes torch's scaled_dot_product_attention. Without it attention is
    SkillNet's own, so that what is compared is skills and nothing else.
    """

    def __init__(self, config: SkillNetConfig, hidden: int, torch_attention: bool = False) -> None:
        super().__init__()
        D, self.heads, self.torch_attention = config.dim, config.num_heads, torch_attention
        shapes = {"qkv": (3 * D, D), "out": (D, D), "up": (hidden, D), "down": (D, hidden)}
        self.layers = nn.ModuleList()
        for _ in range(config.num_layers):
            weights = {k: nn.Parameter(torch.randn(s) * s[1] ** -0.5) for k, s in shapes.items()}
            norms = {
                f"{k}_{i}": nn.Parameter(torch.full((D,), float(k == "scale")))
                for k in ("scale", "shift")
                for i in (1, 2)
            }
            self.layers.append(nn.ParameterDict(weights | norms))
        self.norm = nn.LayerNorm(D)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        for layer in self.layers:
            p: Any = layer  # a ParameterDict, which nn.ModuleList does not tell
            qkv = F.linear(F.layer_norm(x_BTD, (D,), p["scale_1"], p["shift_1"]), p["qkv"])
            if self.torch_attention:
                q, k, v = qkv.view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
                y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D)
            else:
                y = multihead_attention(qkv, self.heads)
            x_BTD = x_BTD + F.linear(y, p["out"])
            h = F.linear(F.layer_norm(x_BTD, (D,), p["scale_2"], p["shift_2"]), p["up"])
            x_BTD = x_BTD + F.linear(F.gelu(h), p["down"])
        return self.norm(x_BTD)


class LoopEncoder(Encoder):
    """SkillNet's weights, one skill after the other: K products where the fused layers do one."""

    def forward(self, x_BTD: Tensor, skills: Skills, mask_BT: Tensor | None = None) -> Tensor:
        dtype = compute_dtype(x_BTD)
        for layer in self.layers:
            assert isinstance(layer, EncoderLayer)
            attention, forward = layer.attention, layer.feedforward
            qkv = _each(attention.qkv, layer.attention_norm(x_BTD).to(dtype), skills)
            x_BTD = x_BTD + _each(attention.out, multihead_attention(qkv, attention.heads), skills)
            z = layer.feedforward_norm(x_BTD).to(dtype)
            outputs = [
                F.linear(F.gelu(F.linear(z, forward.up.weights[s])), forward.down.weights[s])
                for s in skills
            ]
            x_BTD = x_BTD + _mean(outputs)
        return self.norm(x_BTD)


def _each(layer: SkillLinear, x: Tensor, skills: Skills) -> Tensor:
    return _mean([F.linear(x, layer.weight.weights[s]) for s in skills])


def _mean(outputs: list[Tensor]) -> Tensor:
    total = outputs[0]
    for output in outputs[1:]:
        total = total + output
    return total / len(outputs) if len(outputs) > 1 else total
