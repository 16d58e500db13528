"""Heads of rows with several labels, and of rows with a number.

Shapes: B batch, N rows, D model width, C classes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skillnet import losses
from skillnet.config import SkillNetConfig
from skillnet.heads import (
    ClassificationHead,
    EmbeddingOf,
    EncodeTower,
    LossInputs,
    TaskHead,
    TowerInputs,
    mean_pool,
)
from skillnet.metrics import average_precision_of_rows
from skillnet.skills import Task


class MultiLabelHead(ClassificationHead):
    """A decision per class, independent of the other classes, (B, D) -> logits (B, C).

    The target ``label_sets`` (B, C) is 1 for the classes of a row.
    """

    @classmethod
    def compute_loss(cls, outputs: Mapping[str, Tensor], inputs: LossInputs) -> Tensor:
        logits_BC, truth_BC = outputs["logits"], inputs.targets["label_sets"]
        real = inputs.real
        return losses.binary_cross_entropy(logits_BC[real], truth_BC[real], inputs.count)

    @classmethod
    def example_targets(cls, task: Task, rows: int) -> dict[str, Tensor]:
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


class RegressionHead(TaskHead):
    """A number per row, (B, D) -> standardized value (B, 1).

    The target ``numbers`` (B,) is standardized by mean and deviation of the training rows, which
    the vocabulary of the model stores (:class:`skillnet.vocabulary.ModelVocabulary`).
    """

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__(config, task)
        self.project = nn.Linear(config.dim, 1)
        # Zero is the mean of the training rows: the first predictions are close to it.
        nn.init.trunc_normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        return self.project(pooled_BD)

    def run(
        self, towers: Mapping[str, TowerInputs], encode: EncodeTower, embedding: EmbeddingOf
    ) -> dict[str, Tensor]:
        return {"number": self(mean_pool(*encode("input")))}

    @classmethod
    def compute_loss(cls, outputs: Mapping[str, Tensor], inputs: LossInputs) -> Tensor:
        predicted_B, right_B = outputs["number"][:, 0], inputs.targets["numbers"]
        real = inputs.real
        return losses.squared_error(predicted_B[real], right_B[real], inputs.count)

    @classmethod
    def count_outputs(cls, config: SkillNetConfig, task: Task, tokens: int) -> int:
        return 1

    @classmethod
    def example_targets(cls, task: Task, rows: int) -> dict[str, Tensor]:
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
