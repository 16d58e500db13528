"""Task heads: outputs of a task from the tokens of the encoder.

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
    """Linear classifier on the pooled tokens, (B, D) -> logits (B, C)."""

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__()
        self.project = nn.Linear(config.dim, task.outputs)
        # Small weights: the first predictions are close to uniform.
        nn.init.trunc_normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        return self.project(pooled_BD)


class CTCHead(nn.Module):
    """Linear CTC head, (B, T, D) -> log probabilities (B, T, S + 1); symbol 0 is the blank."""

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__()
        self.project = nn.Linear(config.dim, task.outputs + 1)

    def forward(self, x_BTD: Tensor) -> Tensor:
        logits = self.project(x_BTD)
        # In bf16 the log of small probabilities loses the digits that CTC sums.
        return F.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, -1)


class RetrievalHead(nn.Module):
    """Projection of a pooled tower to unit vectors, (B, D) -> (B, E), with a learned temperature.

    The scale starts at 1/0.07 and is clamped to 100 (source: CLIP).
    """

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__()
        self.query = nn.Linear(config.dim, config.embedding_dim, bias=False)
        self.candidate = nn.Linear(config.dim, config.embedding_dim, bias=False)
        # Learned as a logarithm, so that every value gives a positive scale. Sharded training
        # divides weights along their first axis, so it has one.
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def forward(self, pooled_BD: Tensor, tower: str) -> Tensor:
        project = self.query if tower == "query" else self.candidate
        y_BE = project(pooled_BD)
        # Unit vectors in bf16 would lose the small angles that ranks depend on.
        return F.normalize(y_BE.float() if y_BE.dtype != torch.float64 else y_BE, dim=-1)

    @property
    def scale(self) -> Tensor:
        """Factor of similarities, a scalar tensor in (0, 100]."""
        return self.log_scale[0].exp().clamp(max=100.0)


#: Factor of the bias of masked tokens. The bias must learn token frequencies, several nats. With
#: the common learning rate it would learn too slowly, and the tied embeddings would encode the
#: frequencies in a common direction (observed by Gao et al. 2019).
BIAS_SCALE = 30.0


class MaskedHead(nn.Module):
    """Prediction of the original content at masked tokens (M, D).

    Text and code: logits (M, V) by BERT's head (Devlin et al. 2019), whose output matrix is the
    token embedding of the model. Image, video and sound: values (M, P) by one linear layer, as in
    SimMIM (Xie et al. 2022). With ``model.sound_units``, sound gives logits (M, K) of its units.
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
        # The caller passes the embedding, so the head does not own the stem's weights.
        assert embedding_VD is not None
        h_MD = self.norm(F.gelu(self.transform(x_MD)))
        return F.linear(h_MD, embedding_VD, BIAS_SCALE * self.bias)


HEADS: dict[str, type[nn.Module]] = {
    "classification": ClassificationHead,
    "ctc": CTCHead,
    "retrieval": RetrievalHead,
    "masked": MaskedHead,
}
