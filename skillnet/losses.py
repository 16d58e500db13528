"""Losses on tensors. Each is a sum over the local rows divided by the *global* number of rows.

The losses (and gradients) of all ranks therefore add up to those of one process.

Shapes: B rows of this rank, G rows of all ranks, C classes, T tokens, S symbols, L symbols of a
target, E embedding, M masked tokens of this rank's rows, V tokens of the vocabulary, P values of
a token.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from skillnet.precision import to_wide_float


class RankGather(Protocol):
    """All-gather of rows over ranks, in rank order, with gradients back to the owning rank."""

    def __call__(self, x: Tensor) -> Tensor:
        """Gather the rows of all ranks, (B, …) -> (G, …)."""

    def offset(self, rows: int) -> int:
        """Return the position of this rank's first row among the gathered ones."""


def cross_entropy(
    logits_BC: Tensor, labels_B: Tensor, count: int, smoothing: float = 0.0
) -> Tensor:
    """Compute cross entropy with label smoothing, summed over B and divided by ``count``.

    Args:
        logits_BC: class logits.
        labels_B: class numbers.
        count: rows of the global batch.
        smoothing: label smoothing in [0, 1).
    """
    logits = to_wide_float(logits_BC)
    return F.cross_entropy(logits, labels_B, reduction="sum", label_smoothing=smoothing) / count


def binary_cross_entropy(logits_BC: Tensor, truth_BC: Tensor, count: int) -> Tensor:
    """Compute the mean binary cross entropy of C decisions, summed over B, divided by ``count``.

    Args:
        logits_BC: logit of each class.
        truth_BC: 1 for the classes of a row, else 0.
        count: rows of the global batch.
    """
    logits = to_wide_float(logits_BC)
    truth = truth_BC.to(logits.dtype)
    losses_BC = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return losses_BC.mean(1).sum() / count


def squared_error(predicted_B: Tensor, right_B: Tensor, count: int) -> Tensor:
    """Compute the squared error, summed over B and divided by ``count``.

    Args:
        predicted_B: predictions.
        right_B: correct values.
        count: rows of the global batch.
    """
    predicted = to_wide_float(predicted_B)
    return (predicted - right_B.to(predicted.dtype)).square().sum() / count


def ctc_loss(
    log_probs_BTS: Tensor,
    lengths_B: Tensor,
    targets_BL: Tensor,
    target_lengths_B: Tensor,
    count: int,
) -> Tensor:
    """Compute the CTC loss (Graves et al. 2006), normalized by target length.

    Args:
        log_probs_BTS: log probabilities; symbol 0 is the blank.
        lengths_B: tokens of each row.
        targets_BL: symbols, padded.
        target_lengths_B: symbols of each row.
        count: rows of the global batch.

    Returns:
        Sum over B divided by ``count``. Rows that cannot be aligned (more symbols than tokens)
        contribute 0.
    """
    losses_B = F.ctc_loss(
        log_probs_BTS.transpose(0, 1),
        targets_BL,
        lengths_B,
        target_lengths_B,
        reduction="none",
        zero_infinity=True,  # a row that cannot be aligned has an infinite loss
    )
    # Per symbol, so that long transcripts do not dominate the step.
    return (losses_B / target_lengths_B.clamp(min=1)).sum() / count


def find_unalignable_rows(
    lengths_B: Tensor, targets_BL: Tensor, target_lengths_B: Tensor
) -> Tensor:
    """Return which rows have no CTC alignment, (B,) bool.

    An alignment needs a token per symbol, and a blank between equal neighbours.

    Args:
        lengths_B: tokens of each row.
        targets_BL: symbols, padded.
        target_lengths_B: symbols of each row.
    """
    places_L = torch.arange(1, targets_BL.shape[1], device=targets_BL.device)
    repeated_BL = targets_BL[:, 1:] == targets_BL[:, :-1]
    repeats_B = (repeated_BL & (places_L < target_lengths_B[:, None])).sum(1)
    return target_lengths_B + repeats_B > lengths_B


def info_nce(
    query_BE: Tensor,
    candidate_BE: Tensor,
    scale: Tensor,
    groups_B: Tensor,
    count: int,
    gather: RankGather | None = None,
) -> Tensor:
    """Compute symmetric InfoNCE over the global batch, with joint positives.

    Rows with the same group are positives of one another. The target is uniform over the positives
    of a row. Each rank adds the loss of its own rows in both directions.

    Args:
        query_BE: unit vectors.
        candidate_BE: unit vectors.
        scale: factor of the similarities, a scalar.
        groups_B: group of each row; negative numbers mean a group of one row.
        count: rows of the global batch.
        gather: collects the rows of all ranks; None for one process.

    Returns:
        Sum over B and both directions, divided by ``2 * count``.
    """
    all_query_GE = query_BE if gather is None else gather(query_BE)
    all_candidate_GE = candidate_BE if gather is None else gather(candidate_BE)
    with torch.no_grad():
        B = groups_B.shape[0]
        offset = 0 if gather is None else gather.offset(B)
        groups_G = groups_B if gather is None else gather(groups_B)
        # A row without a group is its own group, named by its index.
        numbers_G = torch.arange(groups_G.shape[0], device=groups_G.device)
        groups_G = torch.where(groups_G < 0, -1 - numbers_G, groups_G)
        positive_BG = groups_G[offset : offset + B, None] == groups_G[None]
        # Several captions of one image are all correct, so each gets an equal share.
        target_BG = positive_BG.to(scale.dtype) / positive_BG.sum(1, keepdim=True)
    loss = query_BE.new_zeros(())
    # Multiplied by the scale, bf16 rounding would be as large as the differences of similarities.
    with torch.autocast(query_BE.device.type, enabled=False):
        for own, others in ((query_BE, all_candidate_GE), (candidate_BE, all_query_GE)):
            logits_BG = scale * own @ others.T
            loss = loss - (target_BG * F.log_softmax(logits_BG, 1)).sum()
    return loss / (2 * count)


def masked_loss(predicted_M: Tensor, values_M: Tensor, masked_BT: Tensor, count: int) -> Tensor:
    """Compute the masked modelling loss: :func:`masked_loss_per_row`, summed over B / ``count``.

    Args:
        predicted_M: see :func:`masked_loss_per_row`.
        values_M: see :func:`masked_loss_per_row`.
        masked_BT: see :func:`masked_loss_per_row`.
        count: rows of the global batch.
    """
    return masked_loss_per_row(predicted_M, values_M, masked_BT).sum() / count


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
