"""Losses on tensors. Each is a sum over the rows at hand divided by the *global* row count,
so that the losses (and gradients) of all ranks add up to those of one process.

Shapes: B rows of this rank, G rows of all ranks, C classes, T tokens, S symbols, E embedding,
M masked tokens of this rank's rows, V tokens of the vocabulary, P values of a token.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Gather(Protocol):
    """Collects the rows of all ranks, in rank order; gradients flow back to their rank."""

    def __call__(self, x: Tensor) -> Tensor:
        """(B, …) of this rank -> (G, …) of all ranks."""

    def offset(self, rows: int) -> int:
        """Where this rank's ``rows`` rows start among the gathered ones."""


def cross_entropy(
    logits_BC: Tensor, labels_B: Tensor, count: int, smoothing: float = 0.0
) -> Tensor:
    """Cross entropy with label smoothing, summed over B and divided by ``count``."""
    logits = _full(logits_BC)
    return F.cross_entropy(logits, labels_B, reduction="sum", label_smoothing=smoothing) / count


def ctc(
    log_probs_BTS: Tensor,
    lengths_B: Tensor,
    targets_BL: Tensor,
    target_lengths_B: Tensor,
    count: int,
) -> Tensor:
    """Connectionist temporal classification, blank 0; each row by its number of symbols.

    Rows whose target cannot be aligned (more symbols than tokens) contribute nothing.
    """
    losses_B = F.ctc_loss(
        log_probs_BTS.transpose(0, 1),
        targets_BL,
        lengths_B,
        target_lengths_B,
        reduction="none",
        zero_infinity=True,
    )
    return (losses_B / target_lengths_B.clamp(min=1)).sum() / count


def info_nce(
    query_BE: Tensor,
    candidate_BE: Tensor,
    scale: Tensor,
    groups_B: Tensor,
    count: int,
    gather: Gather | None = None,
) -> Tensor:
    """Symmetric InfoNCE over the global batch, with joint positives.

    Rows whose ``groups_B`` are equal and not negative are positives of one another; the target
    is uniform over a row's positives. ``gather`` collects rows of all ranks in rank order and
    carries gradients back; each rank adds the loss of its own rows in both directions.
    """
    all_query_GE = query_BE if gather is None else gather(query_BE)
    all_candidate_GE = candidate_BE if gather is None else gather(candidate_BE)
    with torch.no_grad():
        B = groups_B.shape[0]
        offset = 0 if gather is None else gather.offset(B)
        groups_G = groups_B if gather is None else gather(groups_B)
        # A row without a group is its own: its number stands in.
        numbers_G = torch.arange(groups_G.shape[0], device=groups_G.device)
        groups_G = torch.where(groups_G < 0, -1 - numbers_G, groups_G)
        positive_BG = groups_G[offset : offset + B, None] == groups_G[None]
        target_BG = positive_BG.to(scale.dtype) / positive_BG.sum(1, keepdim=True)
    loss = query_BE.new_zeros(())
    # Times the scale, bf16's rounding of similarities would be as large as what separates them.
    with torch.autocast(query_BE.device.type, enabled=False):
        for own, others in ((query_BE, all_candidate_GE), (candidate_BE, all_query_GE)):
            logits_BG = scale * own @ others.T
            loss = loss - (target_BG * F.log_softmax(logits_BG, 1)).sum()
    return loss / (2 * count)


def masked(predicted_M: Tensor, values_M: Tensor, masked_BT: Tensor, count: int) -> Tensor:
    """Masked modelling: :func:`masked_rows` summed over B and divided by ``count``."""
    return masked_rows(predicted_M, values_M, masked_BT).sum() / count


def masked_rows(predicted_M: Tensor, values_M: Tensor, masked_BT: Tensor) -> Tensor:
    """Loss (B,) of each row: the mean over its masked tokens, so that rows count alike.

    Args:
        predicted_M: at the masked tokens, in row-major order: logits (M, V), or values (M, P).
        values_M: what stood there: tokens (M,), by cross entropy (BERT, Devlin et al. 2019); or
            pixels of a patch, frames of a stack (M, P), by squared error (MAE, He et al. 2022).
        masked_BT: which tokens are masked, at least one a row.
    """
    predicted_M = _full(predicted_M)
    if values_M.is_floating_point():
        losses_M = (predicted_M - values_M).square().mean(1)
    else:
        losses_M = F.cross_entropy(predicted_M, values_M, reduction="none")
    counts_B = masked_BT.sum(1)
    rows_M = masked_BT.nonzero()[:, 0]
    return losses_M.new_zeros(len(counts_B)).index_add(0, rows_M, losses_M) / counts_B.clamp(min=1)


def _full(x: Tensor) -> Tensor:
    """bf16 and half become float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
