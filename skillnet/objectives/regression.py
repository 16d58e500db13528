"""Regression: one number per row.

Shapes: B batch, N rows, D model width.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skillnet.config import SkillNetConfig
from skillnet.metrics import MetricIntervals, cut_to_bounds
from skillnet.objectives.heads import (
    LinearHead,
    LossInputs,
    TaskEvaluation,
)
from skillnet.precision import to_wide_float
from skillnet.skills import Task


class RegressionHead(LinearHead):
    """A number per row, (B, D) -> standardized value (B, 1).

    The target ``numbers`` (B,) is standardized by mean and deviation of the training rows, which
    the vocabulary of the model stores (:class:`skillnet.vocabulary.ModelVocabulary`).
    """

    @classmethod
    def compute_loss(cls, outputs: Mapping[str, Tensor], inputs: LossInputs) -> Tensor:
        predicted_B, right_B = outputs["number"][:, 0], inputs.targets["numbers"]
        real = inputs.real
        predicted = to_wide_float(predicted_B[real])
        return (predicted - right_B[real].to(predicted.dtype)).square().sum() / inputs.count

    @classmethod
    def count_outputs(cls, config: SkillNetConfig, task: Task, tokens: int) -> int:
        return 1

    @classmethod
    def example_targets(
        cls, config: SkillNetConfig, task: Task, rows: int, tokens: int, hidden: int
    ) -> dict[str, Tensor]:
        return {"numbers": torch.zeros(rows)}

    @classmethod
    def predict(cls, outputs: Mapping[str, Tensor]) -> Tensor:
        return outputs["number"].float()

    @classmethod
    def score_rows(cls, predictions: Any, targets: Mapping[str, Any]) -> tuple[Any, Any]:
        right_N = np.asarray(targets["numbers"], np.float64)
        predicted_N = np.asarray(predictions, np.float64)[:, 0]
        spread_N = np.square(right_N - right_N.mean())
        # R² is one minus the ratio of the squared errors to those of the mean.
        return spread_N - np.square(right_N - predicted_N), spread_N

    @classmethod
    def evaluate(
        cls, task: Task, predictions: Any, targets: Mapping[str, Any], intervals: MetricIntervals
    ) -> TaskEvaluation:
        found = super().evaluate(task, predictions, targets, intervals)
        errors_N = np.abs(predictions[:, 0] - targets["numbers"])
        error = cut_to_bounds(intervals.mean(errors_N, "free"), (0.0, math.inf))
        return found.add(mean_absolute_error=error)
