"""Base class of heads: everything about an objective that computes.

A head turns the tokens of a task's towers into outputs. Its class also makes targets of rows,
computes the loss, predicts, scores and answers. :class:`skillnet.multitask_model.TaskModel` runs
it, and the data loader, the training loop, evaluations and predictors ask its class.

Shapes: B batch, N rows, T tokens, D model width, C classes, E width of the retrieval space, V
tokens of the vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.metrics import ConfidenceInterval, MetricIntervals, TaskMetrics, cut_to_bounds
from skillnet.objectives.base import find_objective
from skillnet.skills import Task

TowerInputs = Mapping[str, Tensor]
#: Maps the name of a tower to its tokens (B, T, D) and their mask (B, T), None if all are real.
EncodeTower = Callable[[str], tuple[Tensor, Tensor | None]]
#: Maps the name of a tower to the embedding (V, D) of its tokens.
EmbeddingOf = Callable[[str], Tensor]


class RankGather(Protocol):
    """All-gather of rows over ranks, in rank order, with gradients back to the owning rank."""

    def __call__(self, x: Tensor) -> Tensor:
        """Gather the rows of all ranks, (B, …) -> (G, …)."""

    def offset(self, rows: int) -> int:
        """Return the position of this rank's first row among the gathered ones."""


@dataclass(frozen=True)
class LossInputs:
    """Targets of this rank's rows, and the global batch that they are a part of.

    Args:
        targets: name of a target -> tensor, first axis B.
        count: rows of the global batch.
        is_padding: whether this rank has no rows, and computes a row that must not count.
        gather: collects rows of all ranks; None with one rank.
        smoothing: label smoothing in [0, 1).
    """

    targets: Mapping[str, Tensor]
    count: int
    is_padding: bool = False
    gather: RankGather | None = None
    smoothing: float = 0.0

    @property
    def real(self) -> slice:
        """Selects the rows that count."""
        return slice(0, 0) if self.is_padding else slice(None)


class TaskEvaluation(NamedTuple):
    """Metrics of a split, and the outcome of each row.

    Args:
        metrics: the primary metric first.
        numerator: (N,) see :meth:`TaskHead.score_rows`.
        denominator: (N,)
        rank: (N,) mean rank of the answers of a row, from 1; None without a ranking.
    """

    metrics: TaskMetrics
    numerator: NDArray[Any]
    denominator: NDArray[Any]
    rank: NDArray[Any] | None = None

    def add(self, **metrics: ConfidenceInterval) -> "TaskEvaluation":
        """Return the evaluation with further metrics."""
        return self._replace(metrics=self.metrics | metrics)


class RowAnswer(NamedTuple):
    """What a person gets for one input.

    Args:
        answer: best class, labels, transcript, number, or nearest known caption; "" if the vector
            is the result.
        score: value of the answer, such as its probability; NaN without one.
        alternatives: best answers with their scores, including the first.
        embedding: unit vector of the input, if the task has one.
    """

    answer: str
    score: float
    alternatives: Sequence[tuple[str, float]] = ()
    embedding: Sequence[float] = ()


class RowRunner(Protocol):
    """Inference of a model on many rows; all methods keep the order of the rows."""

    def predict_rows(self, task: str, inputs: Any) -> NDArray[Any]:
        """Return :meth:`TaskHead.predict` of the rows of the tower ``input``, (N, outputs)."""

    def transcribe(self, task: str, inputs: Any) -> tuple[list[list[int]], NDArray[Any]]:
        """Return the symbols of each row, and a confidence (N,)."""

    def embed(self, task: str, tower: str, inputs: Any) -> NDArray[Any]:
        """Return the unit vectors of a tower, (N, E)."""


class TaskHead(nn.Module):
    """Base class of heads. A subclass defines the outputs of a task and their loss.

    ``compute_loss``, ``predict`` and ``score_rows`` are enough for an objective with one tower and
    one array of outputs per row.

    Args:
        config: sizes of the model.
        task: objective and towers of the head; gives the number of outputs.
    """

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__()
        #: Name of the only output that :meth:`run` returns by default.
        self.output = find_objective(task.objective).output or "logits"

    def run(
        self, towers: Mapping[str, TowerInputs], encode: EncodeTower, embedding: EmbeddingOf
    ) -> dict[str, Tensor]:
        """Run the task on one batch per tower. By default: the output of the only tower, pooled.

        Args:
            towers: tower -> input tensors.
            encode: encodes the input of a tower.
            embedding: returns the token embedding (V, D) of a tower.
        """
        (tower,) = towers
        return {self.output: self(mean_pool(*encode(tower)))}

    def embed(
        self, tower: str, inputs: TowerInputs, encode: EncodeTower, embedding: EmbeddingOf
    ) -> Tensor:
        """Return the unit vectors (B, E) of a tower.

        Args:
            tower: ``query`` or ``candidate``.
            inputs: input tensors of the tower.
            encode: see :meth:`run`.
            embedding: see :meth:`run`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no retrieval space")

    @classmethod
    def compute_loss(cls, outputs: Mapping[str, Tensor], inputs: LossInputs) -> Tensor:
        """Return the loss of this rank's rows: a sum over rows, divided by the global number.

        Args:
            outputs: result of :meth:`run`.
            inputs: targets and global batch.
        """
        raise NotImplementedError

    @classmethod
    def count_untaught(
        cls, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> Tensor | None:
        """Return the number of rows whose loss is zero by definition; None if there are none.

        Args:
            outputs: result of :meth:`run`.
            targets: name of a target -> tensor, first axis B.
        """
        return None

    @classmethod
    def config_keys(cls, task: Task) -> tuple[str, ...]:
        """Return the settings of the model, beside ``dim``, that the shape of the head follows."""
        return ()

    @classmethod
    def count_outputs(cls, config: SkillNetConfig, task: Task, tokens: int) -> int:
        """Return how many outputs a linear layer of width D computes for one row.

        Args:
            config: sizes of the model.
            task: objective and towers of the head.
            tokens: number of tokens of the row.
        """
        return task.outputs

    @classmethod
    def count_flops(cls, config: SkillNetConfig, task: Task, tower: str, tokens: int) -> int:
        """Return the operations of the head for one row of a tower.

        Args:
            config: sizes of the model.
            task: objective and towers of the head.
            tower: name of the tower.
            tokens: number of tokens of the row.
        """
        return 2 * config.dim * cls.count_outputs(config, task, tokens)

    @classmethod
    def example_targets(
        cls, config: SkillNetConfig, task: Task, rows: int, tokens: int, hidden: int
    ) -> dict[str, Tensor]:
        """Return valid targets without a meaning, to measure the memory of a step.

        Args:
            config: sizes of the model.
            task: objective and towers of the head.
            rows: number of rows.
            tokens: number of tokens of each row.
            hidden: masked tokens of each row, for an objective that hides inputs.
        """
        return {"labels": torch.zeros(rows, dtype=torch.long)}

    @classmethod
    def predict(cls, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return predictions (B, outputs) from the outputs of :meth:`run`.

        Args:
            outputs: result of :meth:`run`.
        """
        raise NotImplementedError(f"{cls.__name__} has no predictions per row")

    @classmethod
    def infer(cls, runner: RowRunner, task: str, inputs: Mapping[str, Any]) -> Any:
        """Return the predictions of N rows. By default: :meth:`predict` of the only tower.

        Args:
            runner: forward passes of the model.
            task: name of the task.
            inputs: tower -> its N rows; also one tower of two.
        """
        (rows,) = inputs.values()
        return runner.predict_rows(task, rows)

    @classmethod
    def evaluate(
        cls, task: Task, predictions: Any, targets: Mapping[str, Any], intervals: MetricIntervals
    ) -> TaskEvaluation:
        """Return the metrics of predictions, and the outcome of each row.

        Args:
            task: objective and towers of the head.
            predictions: result of :meth:`infer`, numbers in their own unit.
            targets: expected values of all rows, as numpy arrays.
            intervals: how metrics get their intervals.
        """
        metric = find_objective(task.objective).primary
        numerator, denominator = cls.score_rows(predictions, targets)
        ratio = intervals.ratio(numerator, denominator, metric.scale)
        metrics = {metric.name: cut_to_bounds(ratio, metric.bounds)}
        return TaskEvaluation(metrics, numerator, denominator)

    @classmethod
    def score_rows(cls, predictions: Any, targets: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return numerator and denominator of each row, (N,) each.

        The primary metric is the sum of the numerators by that of the denominators. Denominators
        depend on the targets only, so that two models are compared row by row.

        Args:
            predictions: result of :meth:`infer`.
            targets: name of a target -> (N, …) numpy array.
        """
        raise NotImplementedError(f"{cls.__name__} has no score per row")

    @classmethod
    def score_hidden(
        cls, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return loss and accuracy of each row whose input is hidden in part, (B,) each.

        The accuracy is None if the hidden values are no tokens.

        Args:
            outputs: result of :meth:`run`.
            targets: made by the masks of the data loader.
        """
        raise NotImplementedError(f"{cls.__name__} has no hidden values")

    @classmethod
    def answer(
        cls,
        predictions: Any,
        names: Sequence[str],
        top: int,
        vectors: NDArray[Any] | None = None,
    ) -> list[RowAnswer]:
        """Return what a person gets for each row. By default: the best names, or else the number.

        Args:
            predictions: result of :meth:`infer` for one tower.
            names: labels of the outputs, or known captions.
            top: number of alternatives.
            vectors: (N, E) of the known captions; None without any.
        """
        if names:
            return [rank_names(names, row, top) for row in predictions]
        return [RowAnswer(f"{value:.6g}", float(value)) for value in predictions[:, 0]]


class LinearHead(TaskHead):
    """Linear layer on the pooled tokens, (B, D) -> (B, outputs)."""

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__(config, task)
        self.project = nn.Linear(config.dim, self.count_outputs(config, task, 1))
        # Small weights: the first predictions are close to uniform, or to the mean of the rows.
        nn.init.trunc_normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        return self.project(pooled_BD)


def rank_names(names: Sequence[str], scores: NDArray[Any], top: int) -> RowAnswer:
    """Return the best name, its score, and the best ``top`` names with theirs.

    Args:
        names: labels of the outputs, or known captions.
        scores: values of the names; higher is better.
        top: number of alternatives.
    """
    # A stable order makes the answer reproducible if scores are equal.
    order = np.argsort(-scores, kind="stable")[:top]
    ranked = [(names[int(index)], float(scores[index])) for index in order]
    return RowAnswer(*ranked[0], ranked)


def mean_pool(x_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Average the real tokens, (B, T, D) -> (B, D). A row without real tokens gives zeros.

    Args:
        x_BTD: encoded tokens.
        mask_BT: True at real tokens; None if all are real.
    """
    if mask_BT is None:
        return x_BTD.mean(1)
    weights_BT1 = mask_BT[..., None].to(x_BTD.dtype)
    # Not a matrix product: autocast would round the pooled vector to bf16.
    return (x_BTD * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)


def build_head(config: SkillNetConfig, task: Task) -> TaskHead:
    """Build the randomly initialized head of a task.

    Args:
        config: sizes of the model.
        task: its objective names the class of the head.
    """
    head: TaskHead = head_class(task)(config, task)
    return head


def head_class(task: Task) -> type[TaskHead]:
    """Return the class of a task's head.

    Args:
        task: its objective names the class.
    """
    found: type[TaskHead] = find_objective(task.objective).load_head()
    return found
