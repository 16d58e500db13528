"""The Transformer: pre-norm layers whose attention and feed-forward parts may carry skills.

Shapes: B batch, T tokens, D model width.
"""

from torch import Tensor, nn

from skillnet.attention import padding_bias
from skillnet.config import SkillNetConfig
from skillnet.layers import SkillAttention, SkillFeedForward, Skills, compute_dtype

#: The one "skill" of a layer without skill modules; its weights belong to all tasks.
SHARED: Skills = ("shared",)


class EncoderLayer(nn.Module):
    """One pre-norm layer. ``index`` counts from 0; every n-th layer carries skills."""

    def __init__(self, config: SkillNetConfig, index: int) -> None:
        super().__init__()
        carries = (index + 1) % config.skill_every == 0
        self.attention_skills = carries and config.skill_modules in ("both", "attention")
        self.feedforward_skills = carries and config.skill_modules in ("both", "feedforward")
        std = config.dim**-0.5
        out_std = (2 * config.depth) ** -0.5
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = SkillAttention(
            config.skills if self.attention_skills else SHARED,
            config.dim,
            config.heads,
            std=std,
            out_std=std * out_std,
        )
        self.feedforward_norm = nn.LayerNorm(config.dim)
        self.feedforward = SkillFeedForward(
            config.skills if self.feedforward_skills else SHARED,
            config.dim,
            config.hidden,
            std=std,
            out_std=config.hidden**-0.5 * out_std,
        )
        self.drop_path = config.drop_path

    def forward(self, x_BTD: Tensor, skills: Skills, bias_B11T: Tensor | None) -> Tensor:
        a_BTD = self.attention(
            self.attention_norm(x_BTD), skills if self.attention_skills else SHARED, bias_B11T
        )
        x_BTD = x_BTD + self._drop(a_BTD)
        f_BTD = self.feedforward(
            self.feedforward_norm(x_BTD), skills if self.feedforward_skills else SHARED
        )
        return x_BTD + self._drop(f_BTD)

    def _drop(self, branch_BTD: Tensor) -> Tensor:
        """Stochastic depth: leaves a row's branch out with probability ``drop_path``.

        One draw a row, where dropout draws one a number: on CPUs that took a tenth of a step.
        """
        if not self.training or not self.drop_path:
            return branch_BTD
        keep = 1 - self.drop_path
        kept_B11 = branch_BTD.new_empty(branch_BTD.shape[0], 1, 1).bernoulli_(keep)
        return branch_BTD * (kept_B11 / keep)


class Encoder(nn.Module):
    """A stack of layers and a final norm. (B, T, D) -> (B, T, D)."""

    def __init__(self, config: SkillNetConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, index) for index in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x_BTD: Tensor, skills: Skills, mask_BT: Tensor | None = None) -> Tensor:
        """``mask_BT`` is True at real tokens; None means that every token is real."""
        bias_B11T = None if mask_BT is None else padding_bias(mask_BT, compute_dtype(x_BTD))
        for layer in self.layers:
            x_BTD = layer(x_BTD, skills, bias_B11T)
        return self.norm(x_BTD)
