"""CTC (Graves et al. 2006): a sequence of symbols in the order of a row's tokens.

Shapes: B batch, N rows, T tokens, D model width, S symbols, L symbols of a target.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.metrics import MetricIntervals
from skillnet.objectives.heads import (
    EmbeddingOf,
    EncodeTower,
    LossInputs,
    RowAnswer,
    RowRunner,
    TaskEvaluation,
    TaskHead,
    TowerInputs,
)
from skillnet.precision import to_wide_float
from skillnet.skills import Task


class RowTranscripts(NamedTuple):
    """Symbols of N rows, and the geometric mean of the probabilities of each path, (N,)."""

    symbols: Sequence[Sequence[int]]
    confidence: NDArray[Any]


class CTCHead(TaskHead):
    """Linear CTC head, (B, T, D) -> log probabilities (B, T, S + 1); symbol 0 is the blank."""

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__(config, task)
        self.project = nn.Linear(config.dim, task.outputs + 1)

    def forward(self, x_BTD: Tensor) -> Tensor:
        # In bf16 the log of small probabilities loses the digits that CTC sums.
        return F.log_softmax(to_wide_float(self.project(x_BTD)), -1)

    def run(
        self, towers: Mapping[str, TowerInputs], encode: EncodeTower, embedding: EmbeddingOf
    ) -> dict[str, Tensor]:
        (tower,) = towers
        x_BTD, mask_BT = encode(tower)
        # CTC needs the number of real tokens per row.
        if mask_BT is not None:
            lengths_B = mask_BT.sum(1)
        else:
            lengths_B = torch.full((x_BTD.shape[0],), x_BTD.shape[1], device=x_BTD.device)
        return {"log_probs": self(x_BTD), "lengths": lengths_B}

    @classmethod
    def compute_loss(cls, outputs: Mapping[str, Tensor], inputs: LossInputs) -> Tensor:
        loss = ctc_loss(
            outputs["log_probs"],
            outputs["lengths"],
            inputs.targets["symbols"],
            inputs.targets["symbols_lengths"],
            inputs.count,
        )
        # CTC takes no batch of zero rows.
        return loss * 0 if inputs.is_padding else loss

    @classmethod
    def count_untaught(
        cls, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> Tensor | None:
        return find_unalignable_rows(
            outputs["lengths"], targets["symbols"], targets["symbols_lengths"]
        ).sum()

    @classmethod
    def count_outputs(cls, config: SkillNetConfig, task: Task, tokens: int) -> int:
        return tokens * (task.outputs + 1)

    @classmethod
    def example_targets(
        cls, config: SkillNetConfig, task: Task, rows: int, tokens: int, hidden: int
    ) -> dict[str, Tensor]:
        return {
            "symbols": torch.ones(rows, tokens // 2 or 1, dtype=torch.long),
            "symbols_lengths": torch.ones(rows, dtype=torch.long),
        }

    @classmethod
    def decode(cls, log_probs_BTS: Tensor, lengths_B: Tensor) -> RowTranscripts:
        """Return the symbols of the best paths, and their confidence.

        Args:
            log_probs_BTS: output of :meth:`run`.
            lengths_B: tokens of each row.
        """
        best_BT = log_probs_BTS.amax(-1)
        confidence = np.zeros(len(best_BT), np.float32)
        for row, length in enumerate(lengths_B.tolist()):
            # The mean of log-probabilities does not penalise long transcripts as their sum would.
            # Frames after the end are padding and do not count.
            confidence[row] = best_BT[row, : max(length, 1)].mean().exp()
        return RowTranscripts(greedy_symbols(log_probs_BTS, lengths_B), confidence)

    @classmethod
    def infer(cls, runner: RowRunner, task: str, inputs: Mapping[str, Any]) -> RowTranscripts:
        (rows,) = inputs.values()
        return RowTranscripts(*runner.transcribe(task, rows))

    @classmethod
    def score_rows(
        cls, predictions: RowTranscripts, targets: Mapping[str, NDArray[Any]]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        # A ratio of sums: a mean of rates would give short transcripts too much weight.
        lengths_N = targets["symbols_lengths"]
        right = [row[:length] for row, length in zip(targets["symbols"], lengths_N, strict=True)]
        return edit_distances(predictions.symbols, right), lengths_N

    @classmethod
    def evaluate(
        cls, task: Task, predictions: Any, targets: Mapping[str, Any], intervals: MetricIntervals
    ) -> TaskEvaluation:
        found = super().evaluate(task, predictions, targets, intervals)
        return found.add(exact_rate=intervals.mean(found.numerator == 0))

    @classmethod
    def answer(
        cls,
        predictions: RowTranscripts,
        names: Sequence[str],
        top: int,
        vectors: NDArray[Any] | None = None,
    ) -> list[RowAnswer]:
        # Single characters are joined; longer symbol names are separated by spaces.
        space = "" if all(len(name) == 1 for name in names[1:]) else " "
        # Symbol 0 is the blank of CTC, which decoding has removed.
        texts = [space.join(names[symbol - 1] for symbol in row) for row in predictions.symbols]
        scores = [float(score) for score in predictions.confidence]
        return [
            RowAnswer(text, score, [(text, score)])
            for text, score in zip(texts, scores, strict=True)
        ]


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


def greedy_symbols(log_probs_BTS: Tensor, lengths_B: Tensor) -> list[list[int]]:
    """Decode CTC outputs by their best path: repeats are merged and blanks removed.

    Args:
        log_probs_BTS: log probabilities; symbol 0 is the blank.
        lengths_B: tokens of each row.
    """
    paths = zip(log_probs_BTS.argmax(-1).tolist(), lengths_B.tolist(), strict=True)
    merged = ([symbol for symbol, _ in groupby(path[:length])] for path, length in paths)
    return [[symbol for symbol in path if symbol] for path in merged]


def edit_distances(
    hypotheses: Sequence[Sequence[int]], references: Sequence[Sequence[int]], block: int = 4096
) -> NDArray[np.int64]:
    """Compute the Levenshtein distance of each pair, in symbols, (N,).

    Args:
        hypotheses: N sequences of symbols.
        references: N sequences of symbols.
        block: pairs that are computed at once.

    Raises:
        ValueError: different numbers of hypotheses and references.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses do not pair {len(references)} references")
    starts = range(0, len(references), block)
    parts = [_edit_block(hypotheses[i : i + block], references[i : i + block]) for i in starts]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _edit_block(hypotheses: Sequence[Sequence[int]], references: Sequence[Sequence[int]]):
    said, said_lengths = _padded(hypotheses)
    right, right_lengths = _padded(references)
    columns = np.arange(right.shape[1] + 1)
    # One row of the dynamic program of every pair; column j compares with the first j symbols.
    tables = np.tile(columns, (len(said), 1))
    for i in range(said.shape[1]):
        new = np.empty_like(tables)
        new[:, 0] = i + 1
        wrong = right != said[:, i : i + 1]
        np.minimum(tables[:, :-1] + wrong, tables[:, 1:] + 1, out=new[:, 1:])
        # A run of insertions costs its length, so a running minimum replaces the inner loop.
        new = np.minimum.accumulate(new - columns, axis=1) + columns
        tables = np.where((i < said_lengths)[:, None], new, tables)
    return tables[np.arange(len(said)), right_lengths]


def _padded(sequences: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    padded = np.full((len(sequences), int(lengths.max(initial=0))), -1, np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = np.asarray(sequence)
    return padded, lengths
