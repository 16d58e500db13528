"""Transformer encoder: pre-norm layers whose attention and feed-forward parts may have skills.

Shapes: B batch, T tokens, D model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skillnet.attention import padding_bias
from skillnet.config import SkillNetConfig
from skillnet.layers import SkillAttention, SkillFeedForward, Skills, compute_dtype
from skillnet.rounded_weights import share_merges

#: Name of the only "skill" of a layer without skill modules. All tasks use its weights.
SHARED: Skills = ("shared",)


#: Arguments and result of a layer, and of a residual branch.
LayerCall = Callable[[Tensor, Skills, Tensor | None], Tensor]


class EncoderLayer(nn.Module):
    """Pre-norm Transformer layer.

    Args:
        config: sizes, and the layers and modules that have skills.
        index: position of the layer, from 0. Every ``skill_every``-th layer has skills.
    """

    def __init__(self, config: SkillNetConfig, index: int) -> None:
        super().__init__()
        carries = (index + 1) % config.skill_every == 0
        self.attention_skills = carries and config.skill_modules in ("both", "attention")
        self.feedforward_skills = carries and config.skill_modules in ("both", "feedforward")
        std = config.dim**-0.5
        # Residual branches start smaller with depth (GPT-2), so the sum keeps its variance.
        out_std = (2 * config.num_layers) ** -0.5
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = SkillAttention(
            config.skills if self.attention_skills else SHARED,
            config.dim,
            config.num_heads,
            std=std,
            out_std=std * out_std,
        )
        self.feedforward_norm = nn.LayerNorm(config.dim)
        self.feedforward = SkillFeedForward(
            config.skills if self.feedforward_skills else SHARED,
            config.dim,
            config.ffn_dim,
            std=std,
            out_std=config.ffn_dim**-0.5 * out_std,
        )
        self.drop_path = config.drop_path
        #: Wraps a call of the layer, to gather the weights of the given skills around it.
        self.gather_weights: Callable[[LayerCall, Skills], LayerCall] | None = None

    def forward(self, x_BTD: Tensor, skills: Skills, bias_B11T: Tensor | None) -> Tensor:
        if self.gather_weights is None:
            return self._run(x_BTD, skills, bias_B11T)
        has_shared = not (self.attention_skills and self.feedforward_skills)
        has_own = self.attention_skills or self.feedforward_skills
        active = (SHARED if has_shared else ()) + (skills if has_own else ())
        # The weights exist only inside the call, so a step cannot share merged ones.
        with share_merges(()):
            return self.gather_weights(self._run, active)(x_BTD, skills, bias_B11T)

    def _run(self, x_BTD: Tensor, skills: Skills, bias_B11T: Tensor | None) -> Tensor:
        x_BTD = self._add(self._attend, x_BTD, skills, bias_B11T)
        return self._add(self._feed, x_BTD, skills, bias_B11T)

    def _attend(self, x_BTD: Tensor, skills: Skills, bias_B11T: Tensor | None) -> Tensor:
        active = skills if self.attention_skills else SHARED
        return self.attention(self.attention_norm(x_BTD), active, bias_B11T)

    def _feed(self, x_BTD: Tensor, skills: Skills, bias_B11T: Tensor | None) -> Tensor:
        active = skills if self.feedforward_skills else SHARED
        return self.feedforward(self.feedforward_norm(x_BTD), active)

    def _add(
        self, branch: LayerCall, x_BTD: Tensor, skills: Skills, bias_B11T: Tensor | None
    ) -> Tensor:
        """Add a residual branch. In training, only a random subset of the rows gets the branch.

        This is stochastic depth (Huang et al. 2016) in the form of DINOv2. Dropped rows are drawn
        first, so their branch costs nothing. Kept rows are weighted by B / kept.
        """
        B = x_BTD.shape[0]
        # At least one row keeps the branch, so its weights get a gradient in every step.
        kept = max(round(B * (1 - self.drop_path)), 1) if self.training else B
        if kept == B:
            return x_BTD + branch(x_BTD, skills, bias_B11T)
        rows = torch.randperm(B, device=x_BTD.device)[:kept]
        if bias_B11T is not None:
            bias_B11T = bias_B11T.index_select(0, rows)
        y_BTD = branch(x_BTD.index_select(0, rows), skills, bias_B11T)
        return x_BTD.index_add(0, rows, y_BTD.to(x_BTD.dtype), alpha=B / kept)


class Encoder(nn.Module):
    """Stack of encoder layers and a final norm. (B, T, D) -> (B, T, D)."""

    def __init__(self, config: SkillNetConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(config, index) for index in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.dim)
        #: Keep only the input of each layer for the backward pass, which computes the rest again.
        self.recompute_layers = False

    def forward(self, x_BTD: Tensor, skills: Skills, mask_BT: Tensor | None = None) -> Tensor:
        """Encode tokens (B, T, D) with the active skills.

        Args:
            x_BTD: tokens of a stem.
            skills: active skills, sorted.
            mask_BT: True at real tokens; None if all are real.
        """
        # The bias is built once for all layers.
        bias_B11T = None if mask_BT is None else padding_bias(mask_BT, compute_dtype(x_BTD))
        for layer in self.layers:
            if self.recompute_layers and torch.is_grad_enabled():
                # The random rows of stochastic depth are drawn again from the same state.
                x_BTD = checkpoint(layer, x_BTD, skills, bias_B11T, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, skills, bias_B11T)
        return self.norm(x_BTD)
