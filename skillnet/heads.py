"""Task heads: outputs of a task from the tokens of its towers, their loss and the predictions.

A head belongs to an objective of :mod:`skillnet.objectives`. :class:`skillnet.multitask_model`
runs it, the training loop asks it for the loss, and evaluations ask it for predictions.

Shapes: B batch, T tokens, D model width, C classes, S symbols, E width of the retrieval space,
M masked tokens, V tokens of the vocabulary, P values of a token.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skillnet import losses
from skillnet.config import SkillNetConfig
from skillnet.linear_path import LinearPath, count_linear_flops
from skillnet.objectives import find_objective
from skillnet.precision import to_wide_float
from skillnet.skills import Task
from skillnet.stems import masked_outputs

TowerInputs = Mapping[str, Tensor]
#: Maps the name of a tower to its tokens (B, T, D) and their mask (B, T), None if all are real.
EncodeTower = Callable[[str], tuple[Tensor, Tensor | None]]
#: Maps the name of a tower to the embedding (V, D) of its tokens.
EmbeddingOf = Callable[[str], Tensor]


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
    gather: losses.RankGather | None = None
    smoothing: float = 0.0

    @property
    def real(self) -> slice:
        """Selects the rows that count."""
        return slice(0, 0) if self.is_padding else slice(None)


class TaskHead(nn.Module):
    """Base class of heads. A subclass defines the outputs of a task and their loss.

    ``predict`` and ``score_rows`` are enough for the evaluation of a third party's objective. CTC,
    retrieval and masked modelling have evaluations of their own.

    Args:
        config: sizes of the model.
        task: task that the head belongs to; gives the number of outputs.
    """

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__()

    def run(
        self, towers: Mapping[str, TowerInputs], encode: EncodeTower, embedding: EmbeddingOf
    ) -> dict[str, Tensor]:
        """Run the task on one batch per tower. By default: ``logits`` of the pooled ``input``.

        Args:
            towers: tower -> input tensors.
            encode: encodes the input of a tower.
            embedding: returns the token embedding (V, D) of a tower.
        """
        return {"logits": self(mean_pool(*encode("input")))}

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
    def count_outputs(cls, config: SkillNetConfig, task: Task, tokens: int) -> int:
        """Return how many outputs a linear layer of width D computes for one row.

        Args:
            config: sizes of the model.
            task: task that the head belongs to.
            tokens: number of tokens of the row.
        """
        return task.outputs

    @classmethod
    def count_flops(cls, config: SkillNetConfig, task: Task, tower: str, tokens: int) -> int:
        """Return the operations of the head for one row of a tower.

        Args:
            config: sizes of the model.
            task: task that the head belongs to.
            tower: name of the tower.
            tokens: number of tokens of the row.
        """
        return 2 * config.dim * cls.count_outputs(config, task, tokens)

    @classmethod
    def example_targets(cls, task: Task, rows: int) -> dict[str, Tensor]:
        """Return valid targets without a meaning, to measure the memory of a step.

        Args:
            task: task that the head belongs to.
            rows: number of rows.
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
    def score_rows(cls, predictions: Any, targets: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return numerator and denominator of each row, (N,) each.

        The primary metric is the sum of the numerators by that of the denominators. Denominators
        depend on the targets only, so that two models are compared row by row.

        Args:
            predictions: (N, …) of :meth:`predict`, as numpy array.
            targets: name of a target -> (N, …) numpy array, or list of N lists.
        """
        raise NotImplementedError(f"{cls.__name__} has no score per row")


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


class ClassificationHead(TaskHead):
    """Linear classifier on the pooled tokens, (B, D) -> logits (B, C)."""

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__(config, task)
        self.project = nn.Linear(config.dim, task.outputs)
        # Small weights: the first predictions are close to uniform.
        nn.init.trunc_normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        return self.project(pooled_BD)

    @classmethod
    def compute_loss(cls, outputs: Mapping[str, Tensor], inputs: LossInputs) -> Tensor:
        logits_BC, labels_B = outputs["logits"], inputs.targets["labels"]
        real = inputs.real
        return losses.cross_entropy(logits_BC[real], labels_B[real], inputs.count, inputs.smoothing)

    @classmethod
    def predict(cls, outputs: Mapping[str, Tensor]) -> Tensor:
        # Probabilities are normalised in float32: bf16 has about three significant digits.
        return torch.softmax(outputs["logits"].float(), -1)


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
        x_BTD, mask_BT = encode("input")
        # CTC needs the number of real tokens per row.
        if mask_BT is not None:
            lengths_B = mask_BT.sum(1)
        else:
            lengths_B = torch.full((x_BTD.shape[0],), x_BTD.shape[1], device=x_BTD.device)
        return {"log_probs": self(x_BTD), "lengths": lengths_B}

    @classmethod
    def compute_loss(cls, outputs: Mapping[str, Tensor], inputs: LossInputs) -> Tensor:
        loss = losses.ctc_loss(
            outputs["log_probs"],
            outputs["lengths"],
            inputs.targets["symbols"],
            inputs.targets["symbol_lengths"],
            inputs.count,
        )
        # CTC takes no batch of zero rows.
        return loss * 0 if inputs.is_padding else loss

    @classmethod
    def count_outputs(cls, config: SkillNetConfig, task: Task, tokens: int) -> int:
        return tokens * (task.outputs + 1)


class RetrievalHead(TaskHead):
    """Projection of a pooled tower to unit vectors, (B, D) -> (B, E), with a learned temperature.

    The scale starts at 1/0.07 and is clamped to 100 (source: CLIP). With ``linear_path``, the
    vector is the normalized sum of the projection and of :class:`skillnet.linear_path.LinearPath`.
    """

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__(config, task)
        self.query = nn.Linear(config.dim, config.embedding_dim, bias=False)
        self.candidate = nn.Linear(config.dim, config.embedding_dim, bias=False)
        # Learned as a logarithm, so that every value gives a positive scale. Sharded training
        # divides weights along their first axis, so it has one.
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))
        self.linear_path = LinearPath(config, task) if task.linear_path else None
        if self.linear_path is not None and len(task.stems) == 1:
            # Equal inputs then have equal vectors before training, in both parts of the sum.
            with torch.no_grad():
                self.candidate.weight.copy_(self.query.weight)

    def forward(self, pooled_BD: Tensor, tower: str) -> Tensor:
        project = self.query if tower == "query" else self.candidate
        return F.normalize(to_wide_float(project(pooled_BD)), dim=-1)

    def run(
        self, towers: Mapping[str, TowerInputs], encode: EncodeTower, embedding: EmbeddingOf
    ) -> dict[str, Tensor]:
        vectors = {
            tower: self.embed(tower, towers[tower], encode, embedding)
            for tower in ("query", "candidate")
        }
        return {**vectors, "scale": self.scale}

    def embed(
        self, tower: str, inputs: TowerInputs, encode: EncodeTower, embedding: EmbeddingOf
    ) -> Tensor:
        y_BE: Tensor = self(mean_pool(*encode(tower)), tower)
        if self.linear_path is None:
            return y_BE
        return F.normalize(y_BE + self.linear_path(inputs, lambda: embedding(tower)), dim=-1)

    @classmethod
    def compute_loss(cls, outputs: Mapping[str, Tensor], inputs: LossInputs) -> Tensor:
        real = inputs.real
        return losses.info_nce(
            outputs["query"][real],
            outputs["candidate"][real],
            outputs["scale"],
            inputs.targets["groups"][real],
            inputs.count,
            inputs.gather,
        )

    @classmethod
    def count_outputs(cls, config: SkillNetConfig, task: Task, tokens: int) -> int:
        return config.embedding_dim

    @classmethod
    def count_flops(cls, config: SkillNetConfig, task: Task, tower: str, tokens: int) -> int:
        flops = super().count_flops(config, task, tower, tokens)
        if task.linear_path:
            flops += count_linear_flops(config, task.towers[tower].modality)
        return flops

    @classmethod
    def example_targets(cls, task: Task, rows: int) -> dict[str, Tensor]:
        return {"groups": torch.zeros(rows, dtype=torch.long)}

    @property
    def scale(self) -> Tensor:
        """Factor of similarities, a scalar tensor in (0, 100]."""
        return self.log_scale[0].exp().clamp(max=100.0)


#: Factor of the bias of masked tokens. The bias must learn token frequencies, several nats. With
#: the common learning rate it would learn too slowly, and the tied embeddings would encode the
#: frequencies in a common direction (observed by Gao et al. 2019).
BIAS_SCALE = 30.0


class MaskedHead(TaskHead):
    """Prediction of the original content at masked tokens (M, D).

    Text and code: logits (M, V) by BERT's head (Devlin et al. 2019), whose output matrix is the
    token embedding of the model. Image, video and sound: values (M, P) by one linear layer, as in
    SimMIM (Xie et al. 2022). With ``model.sound_units``, sound gives logits (M, K) of its units.
    """

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__(config, task)
        plan = task.towers["input"]
        self.tied = plan.stem == "token"
        if self.tied:
            self.transform = nn.Linear(config.dim, config.dim)
            self.norm = nn.LayerNorm(config.dim)
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        else:
            self.project = nn.Linear(config.dim, masked_outputs(config, plan.modality))

    def forward(self, x_MD: Tensor, embedding_VD: Tensor | None = None) -> Tensor:
        if not self.tied:
            return self.project(x_MD)
        # The caller passes the embedding, so the head does not own the stem's weights.
        assert embedding_VD is not None
        h_MD = self.norm(F.gelu(self.transform(x_MD)))
        return F.linear(h_MD, embedding_VD, BIAS_SCALE * self.bias)

    def run(
        self, towers: Mapping[str, TowerInputs], encode: EncodeTower, embedding: EmbeddingOf
    ) -> dict[str, Tensor]:
        x_BTD, mask_BT = encode("input")
        places_M = towers["input"].get("places")
        x_MD = x_BTD.flatten(0, 1)
        if places_M is not None:
            x_MD = x_MD.index_select(0, places_M)
        elif mask_BT is not None:
            x_MD = x_BTD[mask_BT]
        # Text and code predict tokens with their embedding matrix (weight tying, as in BERT).
        return {"predicted": self(x_MD, embedding("input") if self.tied else None)}

    @classmethod
    def compute_loss(cls, outputs: Mapping[str, Tensor], inputs: LossInputs) -> Tensor:
        targets = inputs.targets
        loss = losses.masked_loss(
            outputs["predicted"], targets["values"], targets["masked"], inputs.count
        )
        return loss * 0 if inputs.is_padding else loss

    @classmethod
    def count_outputs(cls, config: SkillNetConfig, task: Task, tokens: int) -> int:
        # Every token is counted, although only the masked ones are predicted.
        plan = task.towers["input"]
        if plan.stem == "token":
            return tokens * (config.dim + config.vocab_size)
        return tokens * masked_outputs(config, plan.modality)


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
