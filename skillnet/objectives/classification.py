"""Classification: one class per row.

Shapes: B batch, N rows, D model width, C classes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from skillnet.metrics import MetricIntervals
from skillnet.objectives.heads import LinearHead, LossInputs, TaskEvaluation
from skillnet.precision import to_wide_float
from skillnet.skills import Task


class ClassificationHead(LinearHead):
    """Linear classifier on the pooled tokens, (B, D) -> logits (B, C)."""

    @classmethod
    def compute_loss(cls, outputs: Mapping[str, Tensor], inputs: LossInputs) -> Tensor:
        logits_BC, labels_B = outputs["logits"], inputs.targets["labels"]
        real = inputs.real
        weights_B = inputs.targets.get("weights")
        weights_B = None if weights_B is None else weights_B[real]
        return cross_entropy(
            logits_BC[real], labels_B[real], inputs.count, inputs.smoothing, weights_B
        )

    @classmethod
    def predict(cls, outputs: Mapping[str, Tensor]) -> Tensor:
        # Probabilities are normalised in float32: bf16 has about three significant digits.
        return torch.softmax(outputs["logits"].float(), -1)

    @classmethod
    def score_rows(
        cls, predictions: NDArray[Any], targets: Mapping[str, NDArray[Any]]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        hits_N = predictions.argmax(1) == targets["labels"]
        return hits_N.astype(np.float64), np.ones(len(hits_N))

    @classmethod
    def evaluate(
        cls, task: Task, predictions: Any, targets: Mapping[str, Any], intervals: MetricIntervals
    ) -> TaskEvaluation:
        found = super().evaluate(task, predictions, targets, intervals)
        # Macro-F1 is no mean over rows: the bootstrap must resample predictions with their labels.
        pairs_N2 = np.stack([predictions.argmax(1), targets["labels"]], 1).astype(np.int64)
        return found.add(macro_f1=intervals.resample(pairs_N2, macro_f1_of_rows))


def cross_entropy(
    logits_BC: Tensor,
    labels_B: Tensor,
    count: int,
    smoothing: float = 0.0,
    weights_B: Tensor | None = None,
) -> Tensor:
    """Compute cross entropy with label smoothing, summed over B and divided by ``count``.

    Args:
        logits_BC: class logits.
        labels_B: class numbers.
        count: rows of the global batch.
        smoothing: label smoothing in [0, 1).
        weights_B: factor of each row; None for 1.
    """
    logits = to_wide_float(logits_BC)
    if weights_B is not None:
        losses_B = F.cross_entropy(logits, labels_B, reduction="none", label_smoothing=smoothing)
        return (losses_B * weights_B).sum() / count
    return F.cross_entropy(logits, labels_B, reduction="sum", label_smoothing=smoothing) / count


def macro_f1_of_rows(pairs_N2: NDArray) -> float:
    """Compute macro-F1 of rows (predicted class, true class), a statistic for the bootstrap."""
    predicted, right = pairs_N2[:, 0], pairs_N2[:, 1]
    size = int(pairs_N2.max()) + 1
    hits = np.bincount(right[predicted == right], minlength=size)
    # Classes that occur neither as prediction nor as truth have no F1 and are left out.
    seen = np.bincount(predicted, minlength=size) + np.bincount(right, minlength=size)
    return float(np.mean(2 * hits[seen > 0] / seen[seen > 0]))
