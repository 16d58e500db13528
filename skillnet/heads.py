"""Heads: what a task computes from the encoder's tokens.

Shapes: B batch, T tokens, D model width, C classes, S symbols, E width of the retrieval space.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.skills import Task


class ClassificationHead(nn.Module):
    """Pooled (B, D) -> logits (B, C)."""

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__()
        self.project = nn.Linear(config.dim, task.outputs)
        nn.init.trunc_normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        return self.project(pooled_BD)


class CTCHead(nn.Module):
    """Tokens (B, T, D) -> log probabilities (B, T, S + 1); symbol 0 is the blank."""

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__()
        self.project = nn.Linear(config.dim, task.outputs + 1)

    def forward(self, x_BTD: Tensor) -> Tensor:
        logits = self.project(x_BTD)
        # In bf16 the log of small probabilities loses the digits that CTC adds up.
        return F.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, -1)


class RetrievalHead(nn.Module):
    """Pooled (B, D) of a tower -> unit vectors (B, E). Holds the learned temperature.

    The scale starts at 1/0.07 and never exceeds 100 (source: CLIP).
    """

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__()
        self.query = nn.Linear(config.dim, config.embedding_dim, bias=False)
        self.candidate = nn.Linear(config.dim, config.embedding_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, pooled_BD: Tensor, tower: str) -> Tensor:
        project = self.query if tower == "query" else self.candidate
        y_BE = project(pooled_BD)
        return F.normalize(y_BE.float() if y_BE.dtype != torch.float64 else y_BE, dim=-1)

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by, a scalar tensor in (0, 100]."""
        return self.log_scale.exp().clamp(max=100.0)


HEADS: dict[str, type[nn.Module]] = {
    "classification": ClassificationHead,
    "ctc": CTCHead,
    "retrieval": RetrievalHead,
}
