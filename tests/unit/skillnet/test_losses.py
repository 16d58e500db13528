"""Losses compared with their definitions, and sums over ranks with one process."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from skillnet.objectives.classification import cross_entropy
from skillnet.objectives.ctc import ctc_loss
from skillnet.objectives.masked import masked_loss_per_row
from skillnet.objectives.retrieval import info_nce


def unit(rows: int, width: int = 5, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g, dtype=torch.float64)
    return F.normalize(x, dim=1).requires_grad_()


# -- classification and speech ------------------------------------------------------------------


def test_cross_entropy_is_the_mean_over_the_global_count() -> None:
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 4
    whole = F.cross_entropy(logits, labels, label_smoothing=0.1)
    parts = [cross_entropy(logits[i : i + 2], labels[i : i + 2], 6, 0.1) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), whole)
    assert cross_entropy(logits[:0], labels[:0], 6) == 0


def test_cross_entropy_of_bf16_is_computed_in_float32() -> None:
    logits = torch.randn(4, 8).bfloat16()
    loss = cross_entropy(logits, torch.arange(4), 4)
    assert loss.dtype == torch.float32
    assert loss == F.cross_entropy(logits.float(), torch.arange(4))


def ctc_inputs(rows: int = 4) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    scores = torch.randn(rows, 6, 4, dtype=torch.float64, requires_grad=True)
    return (
        scores,
        torch.tensor([6, 5, 6, 3])[:rows],
        torch.tensor([[1, 2, 0], [3, 3, 1], [1, 0, 0], [2, 1, 0]])[:rows],
        torch.tensor([2, 3, 1, 2])[:rows],
    )


def test_ctc_divides_each_row_by_its_symbols_and_sums_over_ranks() -> None:
    scores, lengths, targets, sizes = ctc_inputs()
    log_probs = scores.log_softmax(-1)
    each = [
        F.ctc_loss(log_probs[i, :n, None].squeeze(1), targets[i, :k], n, k, reduction="none") / k
        for i, (n, k) in enumerate(zip(lengths, sizes, strict=True))
    ]
    whole = ctc_loss(log_probs, lengths, targets, sizes, 4)
    torch.testing.assert_close(whole, torch.stack(each).mean())
    parts = [
        ctc_loss(log_probs[i : i + 2], lengths[i : i + 2], targets[i : i + 2], sizes[i : i + 2], 4)
        for i in (0, 2)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_ctc_leaves_out_what_cannot_be_aligned() -> None:
    scores, lengths, targets, sizes = ctc_inputs()
    lengths = torch.tensor([6, 3, 6, 3])  # row 1 needs four tokens: two equal symbols in a row
    loss = ctc_loss(scores.log_softmax(-1), lengths, targets, sizes, 4)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.equal(scores.grad[1], torch.zeros_like(scores.grad[1]))
    assert scores.grad[0].abs().sum() > 0
    assert torch.isfinite(scores.grad).all()


def test_ctc_of_silence_is_finite() -> None:
    scores, lengths, targets, _ = ctc_inputs()
    loss = ctc_loss(scores.log_softmax(-1), lengths, targets, torch.zeros(4, dtype=torch.int64), 4)
    assert torch.isfinite(loss)


# -- retrieval ------------------------------------------------------------------------------------


def naive_info_nce(query: Tensor, candidate: Tensor, scale: Tensor, groups: list[int]) -> Tensor:
    total = query.new_zeros(())
    rows = len(groups)
    for a, b in ((query, candidate), (candidate, query)):
        for i in range(rows):
            log_p = (scale * b @ a[i]).log_softmax(0)
            same = [j for j in range(rows) if j == i or groups[i] == groups[j] >= 0]
            total = total - sum(log_p[j] for j in same) / len(same)
    return total / (2 * rows)


GROUPS = [[-1] * 6, [3, 3, -1, 5, -1, 3], [0, 1, 2, 3, 4, 5], [7] * 6]


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_info_nce_equals_its_definition(groups: list[int]) -> None:
    query, candidate = unit(6), unit(6, seed=1)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    ours = info_nce(query, candidate, scale, torch.tensor(groups), 6)
    theirs = naive_info_nce(query, candidate, scale, groups)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    inputs = (query, candidate, scale)
    for a, b in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_info_nce_under_autocast_keeps_its_precision() -> None:
    query, candidate, groups = unit(6).float(), unit(6, seed=1).float(), torch.arange(6)
    scale = torch.tensor(100.0)
    exact = info_nce(query, candidate, scale, groups, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert info_nce(query, candidate, scale, groups, 6) == exact


# -- masked modelling ---------------------------------------------------------------------------


def masked_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Masks (B, T) with one to three tokens a row, predictions and values (M, P) for them."""
    torch.manual_seed(0)
    places = [[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 1]]
    hidden = torch.tensor(places, dtype=torch.bool)
    M = int(hidden.sum())
    return hidden, torch.randn(M, 5, dtype=torch.float64), torch.randn(M, 5, dtype=torch.float64)


def naive(hidden: Tensor, losses_M: list[Tensor]) -> Tensor:
    """Loss of each row: the mean over its masked places, met one by one."""
    remaining, rows = list(losses_M), []
    for row in hidden:
        found = [remaining.pop(0) for place in row if place]
        rows.append(sum(found[1:], found[0]) / len(found))
    return torch.stack(rows)


def test_masked_values_weigh_rows_alike() -> None:
    hidden, predicted, values = masked_inputs()
    losses = [((p - v) ** 2).sum() / 5 for p, v in zip(predicted, values, strict=True)]
    expected = naive(hidden, losses)
    torch.testing.assert_close(masked_loss_per_row(predicted, values, hidden), expected)


def test_masked_tokens_weigh_rows_alike() -> None:
    hidden, logits, _ = masked_inputs()
    tokens = torch.arange(len(logits)) % 5
    losses = [x.logsumexp(0) - x[t] for x, t in zip(logits, tokens, strict=True)]
    torch.testing.assert_close(masked_loss_per_row(logits, tokens, hidden), naive(hidden, losses))
    assert masked_loss_per_row(logits.bfloat16(), tokens, hidden).dtype == torch.float32
