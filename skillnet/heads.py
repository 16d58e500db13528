"""Heads: what a task computes from the encoder's tokens.

Shapes: B batch, T tokens, D model width, C classes, S symbols, E width of the retrieval space,
M masked tokens, V tokens of the vocabulary, P values of a token.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.skills import Task
from skillnet.stems import masked_outputs


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


#: What the bias of masked tokens counts by. It has to learn how frequent each token is, several
#: nats; at one learning rate a step it would come too late, and the embeddings, shared with the
#: input, would learn it by a direction common to all (Gao et al. 2019 saw them do so).
BIAS_SCALE = 30.0


class MaskedHead(nn.Module):
    """Masked tokens (M, D) -> what stood there.

    Text and code: logits (M, V), by BERT's head (Devlin et al. 2019), whose output matrix is the
    model's token embedding. Pictures, clips and sound: values (M, P) by one linear layer, as
    SimMIM's (Xie et al. 2022); or of sound, logits (M, K) of its units.
    """

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__()
        plan = task.towers["input"]
        self.tied = plan.stem == "token"
        if self.tied:
            self.transform = nn.Linear(config.dim, config.dim)
            self.norm = nn.LayerNorm(config.dim)
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        else:
            self.project = nn.Linear(config.dim, masked_outputs(config, plan.modality))

    def forward(self, x_MD: Tensor, embedding_VD: Tensor | None = None) -> Tensor:
        if not self.tied:
            return self.project(x_MD)
        assert embedding_VD is not None
        h_MD = self.norm(F.gelu(self.transform(x_MD)))
        return F.linear(h_MD, embedding_VD, BIAS_SCALE * self.bias)


HEADS: dict[str, type[nn.Module]] = {
    "classification": ClassificationHead,
    "ctc": CTCHead,
    "retrieval": RetrievalHead,
    "masked": MaskedHead,
}
