"""Masked modelling: predict the hidden parts of a row's own input.

Shapes: B batch, T tokens, D model width, M masked tokens, V tokens of the vocabulary, P values of
a token.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.modality import find_modality
from skillnet.objectives.heads import (
    EmbeddingOf,
    EncodeTower,
    LossInputs,
    TaskHead,
    TowerInputs,
)
from skillnet.precision import to_wide_float
from skillnet.skills import Task

#: Factor of the bias of masked tokens. The bias must learn token frequencies, several nats. With
#: the common learning rate it would learn too slowly, and the tied embeddings would encode the
#: frequencies in a common direction (observed by Gao et al. 2019).
BIAS_SCALE = 30.0


class MaskedHead(TaskHead):
    """Prediction of the original content at masked tokens (M, D).

    Text and code: logits (M, V) by BERT's head (Devlin et al. 2019), whose output matrix is the
    token embedding of the model. Image, video and sound: values (M, P) by one linear layer, as in
    SimMIM (Xie et al. 2022). With ``model.sound_units``, sound gives logits (M, K) of its units.
    """

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__(config, task)
        modality = find_modality(task.towers[task.row_tower].modality)
        self.tied = modality.reads_tokens
        if self.tied:
            self.transform = nn.Linear(config.dim, config.dim)
            self.norm = nn.LayerNorm(config.dim)
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        else:
            self.project = nn.Linear(config.dim, modality.tensor_half.count_outputs(config))

    def forward(self, x_MD: Tensor, embedding_VD: Tensor | None = None) -> Tensor:
        if not self.tied:
            return self.project(x_MD)
        # The caller passes the embedding, so the head does not own the stem's weights.
        assert embedding_VD is not None
        h_MD = self.norm(F.gelu(self.transform(x_MD)))
        return F.linear(h_MD, embedding_VD, BIAS_SCALE * self.bias)

    def run(
        self, towers: Mapping[str, TowerInputs], encode: EncodeTower, embedding: EmbeddingOf
    ) -> dict[str, Tensor]:
        ((tower, inputs),) = towers.items()
        x_BTD, mask_BT = encode(tower)
        places_M = inputs.get("places")
        x_MD = x_BTD.flatten(0, 1)
        if places_M is not None:
            x_MD = x_MD.index_select(0, places_M)
        elif mask_BT is not None:
            x_MD = x_BTD[mask_BT]
        # Text and code predict tokens with their embedding matrix (weight tying, as in BERT).
        return {"predicted": self(x_MD, embedding(tower) if self.tied else None)}

    @classmethod
    def compute_loss(cls, outputs: Mapping[str, Tensor], inputs: LossInputs) -> Tensor:
        targets = inputs.targets
        values = outputs["predicted"], targets["values"], targets["masked"]
        loss = masked_loss_per_row(*values).sum() / inputs.count
        return loss * 0 if inputs.is_padding else loss

    @classmethod
    def score_hidden(
        cls, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        predicted, values, masked_BT = outputs["predicted"], targets["values"], targets["masked"]
        # The loss is kept per row, because the bootstrap resamples rows.
        losses_B = masked_loss_per_row(predicted, values, masked_BT)
        # Only discrete targets (token ids, sound units) have an accuracy; others are regressed.
        if values.is_floating_point():
            return losses_B, None
        hits_M = (predicted.argmax(1) == values).double()
        hits_B = hits_M.new_zeros(len(masked_BT)).index_add_(0, masked_BT.nonzero()[:, 0], hits_M)
        return losses_B, hits_B / masked_BT.sum(1)

    @classmethod
    def config_keys(cls, task: Task) -> tuple[str, ...]:
        return ("sound_units",) if task.towers[task.row_tower].modality == "sound" else ()

    @classmethod
    def example_targets(
        cls, config: SkillNetConfig, task: Task, rows: int, tokens: int, hidden: int
    ) -> dict[str, Tensor]:
        half, count = find_modality(task.towers[task.row_tower].modality).tensor_half, rows * hidden
        values = (
            torch.ones(count, dtype=torch.long)
            if half.count_classes(config)
            else torch.zeros(count, half.count_values(config))
        )
        return {"masked": torch.zeros(rows, tokens, dtype=torch.bool), "values": values}

    @classmethod
    def count_outputs(cls, config: SkillNetConfig, task: Task, tokens: int) -> int:
        # Every token is counted, although only the masked ones are predicted.
        modality = find_modality(task.towers[task.row_tower].modality)
        outputs: int = modality.tensor_half.count_outputs(config)
        return tokens * (outputs + config.dim * modality.reads_tokens)


def masked_loss_per_row(predicted_M: Tensor, values_M: Tensor, masked_BT: Tensor) -> Tensor:
    """Compute the mean loss over the masked tokens of each row, (B,); all rows weigh the same.

    Args:
        predicted_M: predictions at the masked tokens, in row-major order: logits (M, V), or
            values (M, P).
        values_M: original content: tokens (M,), by cross entropy (BERT, Devlin et al. 2019), or
            pixels of a patch or frames of a stack (M, P), by squared error (MAE, He et al. 2022).
        masked_BT: True at masked tokens, at least one per row.
    """
    predicted_M = to_wide_float(predicted_M)
    if values_M.is_floating_point():
        losses_M = (predicted_M - values_M).square().mean(1)
    else:
        losses_M = F.cross_entropy(predicted_M, values_M, reduction="none")
    counts_B = masked_BT.sum(1)
    # Row of each masked token. Unlike nonzero(), this does not make the host wait for a GPU.
    numbers_M = torch.arange(len(losses_M), device=counts_B.device)
    rows_M = torch.searchsorted(counts_B.cumsum(0), numbers_M, right=True)
    return losses_M.new_zeros(len(counts_B)).index_add(0, rows_M, losses_M) / counts_B.clamp(min=1)
