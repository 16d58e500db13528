"""Classification with a margin, on the largest value of each dimension over the tokens."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from skillnet.objectives.base import NamedMetric, Objective, TargetColumn
from skillnet.objectives.heads import RowAnswer, TaskHead


class MarginHead(TaskHead):
    """Linear layer whose scores keep a margin."""

    def __init__(self, config, task):
        super().__init__(config, task)
        self.project = nn.Linear(config.dim, task.outputs)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        return self.project(pooled_BD)

    def run(self, towers, encode, embedding):
        """Encode the tower, pool its real tokens, and return raw outputs by name."""
        x_BTD, mask_BT = encode("input")
        if mask_BT is not None:
            x_BTD = x_BTD.masked_fill(~mask_BT[..., None], float("-inf"))
        return {"logits": self(x_BTD.amax(1))}

    @classmethod
    def compute_loss(cls, outputs, inputs):
        """Sum over this rank's rows, divided by the rows of all ranks."""
        logits, labels = outputs["logits"][inputs.real], inputs.targets["labels"][inputs.real]
        return F.multi_margin_loss(logits, labels, reduction="sum") / inputs.count

    @classmethod
    def predict(cls, outputs):
        return outputs["logits"].float()

    @classmethod
    def score_rows(cls, predictions, targets):
        """Numerator and denominator of each row; the metric is the ratio of their sums."""
        hits = predictions.argmax(1) == targets["labels"]
        return hits.astype(float), np.ones(len(hits))

    @classmethod
    def evaluate(cls, task, predictions, targets, intervals):
        """Add the mean margin to the primary metric, which the base class computes."""
        found = super().evaluate(task, predictions, targets, intervals)
        right = targets["labels"][:, None]
        scores = np.take_along_axis(predictions, right, 1)[:, 0]
        others = predictions.copy()
        np.put_along_axis(others, right, -np.inf, 1)
        return found.add(mean_margin=intervals.mean(scores - others.max(1), "free"))

    @classmethod
    def answer(cls, predictions, names, top, vectors=None):
        """Answer with the best name, and its lead over the second as score."""
        best, second = np.sort(predictions, 1)[:, :-3:-1].T
        return [
            RowAnswer(names[row.argmax()], float(lead))
            for row, lead in zip(predictions, best - second, strict=True)
        ]


def measure_baselines(rows):
    """Return system -> metrics: of the most frequent class, and of the nearest class centre."""
    train, features = (each.toarray() for each in rows.features)
    labels, classes = rows.targets[0]["labels"], np.eye(rows.task.outputs)
    centres = np.stack([train[labels == c].sum(0) for c in range(rows.task.outputs)])
    frequent = np.full(len(features), np.bincount(labels).argmax())
    return {
        "chance": rows.measure(classes[frequent]),
        "simple_baseline": rows.measure(features @ centres.T),
    }


MARGIN = Objective(
    "margin",
    head="margin_objective:MarginHead",
    metrics=(
        NamedMetric("margin_hits"),
        NamedMetric("mean_margin", bounds=(float("-inf"), float("inf"))),
    ),
    columns=(TargetColumn("labels", "label"),),
    output="logits",
    listed="labels",
    baseline="margin_objective:measure_baselines",
)
