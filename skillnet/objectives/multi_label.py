"""Several labels per row, each decided independently of the others.

Shapes: B batch, N rows, D model width, C classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from skillnet.config import SkillNetConfig
from skillnet.metrics import MetricIntervals
from skillnet.objectives.heads import LinearHead, LossInputs, RowAnswer, TaskEvaluation, rank_names
from skillnet.precision import to_wide_float
from skillnet.skills import Task

#: A class is predicted from this probability on.
DECISION_THRESHOLD = 0.5


class MultiLabelHead(LinearHead):
    """A decision per class, independent of the other classes, (B, D) -> logits (B, C).

    The target ``label_sets`` (B, C) is 1 for the classes of a row.
    """

    @classmethod
    def compute_loss(cls, outputs: Mapping[str, Tensor], inputs: LossInputs) -> Tensor:
        logits_BC = to_wide_float(outputs["logits"][inputs.real])
        truth_BC = inputs.targets["label_sets"][inputs.real].to(logits_BC.dtype)
        losses_BC = F.binary_cross_entropy_with_logits(logits_BC, truth_BC, reduction="none")
        return losses_BC.mean(1).sum() / inputs.count

    @classmethod
    def example_targets(
        cls, config: SkillNetConfig, task: Task, rows: int, tokens: int, hidden: int
    ) -> dict[str, Tensor]:
        return {"label_sets": torch.zeros(rows, task.outputs)}

    @classmethod
    def predict(cls, outputs: Mapping[str, Tensor]) -> Tensor:
        return outputs["logits"].float().sigmoid()

    @classmethod
    def score_rows(cls, predictions: Any, targets: Mapping[str, Any]) -> tuple[Any, Any]:
        truth_NC = np.asarray(targets["label_sets"]) > 0
        # A row without labels has no ranking to measure.
        has_labels_N = truth_NC.any(1).astype(np.float64)
        return average_precision_of_rows(predictions, truth_NC), has_labels_N

    @classmethod
    def evaluate(
        cls, task: Task, predictions: Any, targets: Mapping[str, Any], intervals: MetricIntervals
    ) -> TaskEvaluation:
        found = super().evaluate(task, predictions, targets, intervals)
        chosen_NC, truth_NC = predictions >= DECISION_THRESHOLD, targets["label_sets"] > 0
        hits_N = 2 * (chosen_NC & truth_NC).sum(1)
        named_N = chosen_NC.sum(1) + truth_NC.sum(1)
        return found.add(micro_f1=intervals.ratio(hits_N, named_N, "share"))

    @classmethod
    def answer(
        cls, predictions: Any, names: Sequence[str], top: int, vectors: NDArray[Any] | None = None
    ) -> list[RowAnswer]:
        answers = []
        for row in predictions:
            chosen = [name for name, p in zip(names, row, strict=True) if p >= DECISION_THRESHOLD]
            best = rank_names(names, row, top)
            answers.append(best._replace(answer=", ".join(chosen) or "none"))
        return answers


def average_precision_of_rows(scores_NC: ArrayLike, truth_NC: ArrayLike) -> NDArray[np.float64]:
    """Compute the average precision of each row's ranking of classes, (N,); 0 without a label.

    For each label of a row: the share of labels among the classes with at least its score. Their
    mean over rows is the label ranking average precision (Schapire & Singer 2000).

    Args:
        scores_NC: score of each class.
        truth_NC: booleans, true for the labels of a row.
    """
    scores, truth = np.asarray(scores_NC), np.asarray(truth_NC, bool)
    values = np.zeros(len(scores))
    for row in np.flatnonzero(truth.any(1)):
        # Equal scores share the last of their ranks, as in scikit-learn.
        ordered, of_labels = np.sort(scores[row]), np.sort(scores[row][truth[row]])
        rank = len(ordered) - np.searchsorted(ordered, of_labels)
        hits = len(of_labels) - np.searchsorted(of_labels, of_labels)
        values[row] = (hits / rank).mean()
    return values
