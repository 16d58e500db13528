"""Retrieval: two towers map rows to one space of unit vectors, in which rows find each other.

Shapes: B batch, N rows, G rows of all ranks, D model width, E width of the retrieval space, Q
queries, C candidates, T tokens, V tokens of the vocabulary, S cells per side of a grid.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.metrics import MetricIntervals, TaskMetrics, to_array
from skillnet.modalities.pixels import scale_to_signed
from skillnet.modalities.tensors import PAD
from skillnet.modality import find_modality
from skillnet.objectives.base import PAIR
from skillnet.objectives.heads import (
    EmbeddingOf,
    EncodeTower,
    LossInputs,
    RankGather,
    RowAnswer,
    RowRunner,
    TaskEvaluation,
    TaskHead,
    TowerInputs,
    mean_pool,
    rank_names,
)
from skillnet.precision import to_wide_float
from skillnet.skills import Task

#: A query counts as successful up to this rank of its best correct candidate.
RECALL_RANK = 10


class TowerVectors(NamedTuple):
    """Unit vectors of rows.

    Args:
        vectors: tower -> (N, E).
        owners: (Q,) row of each query, ascending; None if each row has one query.
    """

    vectors: dict[str, NDArray[Any]]
    owners: NDArray[Any] | None = None


class RetrievalHead(TaskHead):
    """Projection of a pooled tower to unit vectors, (B, D) -> (B, E), with a learned temperature.

    The scale starts at 1/0.07 and is clamped to 100 (source: CLIP). With ``linear_path``, the
    vector is the normalized sum of the projection and of :class:`LinearPath`.
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
        vectors = {tower: self.embed(tower, towers[tower], encode, embedding) for tower in PAIR}
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
        return info_nce(
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
    def config_keys(cls, task: Task) -> tuple[str, ...]:
        return ("embedding_dim",)

    @classmethod
    def example_targets(
        cls, config: SkillNetConfig, task: Task, rows: int, tokens: int, hidden: int
    ) -> dict[str, Tensor]:
        return {"groups": torch.zeros(rows, dtype=torch.long)}

    @classmethod
    def infer(cls, runner: RowRunner, task: str, inputs: Mapping[str, Any]) -> TowerVectors:
        queries = inputs.get("query")
        return TowerVectors(
            {tower: runner.embed(task, tower, rows) for tower, rows in inputs.items()},
            None if queries is None else queries.owners,
        )

    @classmethod
    def evaluate(
        cls,
        task: Task,
        predictions: TowerVectors,
        targets: Mapping[str, NDArray[Any]],
        intervals: MetricIntervals,
    ) -> TaskEvaluation:
        query, candidate = (predictions.vectors[tower] for tower in PAIR)
        # Rows without a group must not count as correct answers for one another.
        groups = unique_group_ids(targets["groups"])
        ranks: NDArray[Any]
        owners = predictions.owners
        query_groups = groups if owners is None else groups[owners]
        if task.has_row_pairs:
            ranks, back = pair_ranks(query, candidate, groups), pair_ranks(candidate, query, groups)
        else:
            ranks = retrieval_ranks(query, candidate, query_groups, groups).astype(np.float64)
            back = retrieval_ranks(candidate, query, groups, query_groups).astype(np.float64)
        metrics = rank_metrics(ranks, "", intervals, owners)
        metrics |= rank_metrics(back, "reverse_", intervals)
        hits, queries = (x.astype(np.float64) for x in (ranks <= RECALL_RANK, ~np.isnan(ranks)))
        # Captions of one image are not independent: a row, not a query, is the unit of tests
        # (decision 25).
        if owners is not None:
            hits, queries, total = (np.bincount(owners, x) for x in (hits, queries, ranks))
            ranks = total / queries
        return TaskEvaluation(metrics, hits, queries, ranks)

    @classmethod
    def answer(
        cls,
        predictions: TowerVectors,
        names: Sequence[str],
        top: int,
        vectors: NDArray[Any] | None = None,
    ) -> list[RowAnswer]:
        (found,) = predictions.vectors.values()
        if vectors is None:
            return [RowAnswer("", float("nan"), (), row.tolist()) for row in found]
        # Both sides are unit vectors, so their product is the cosine similarity.
        return [
            rank_names(names, vectors @ row, top)._replace(embedding=row.tolist()) for row in found
        ]

    @property
    def scale(self) -> Tensor:
        """Factor of similarities, a scalar tensor in (0, 100]."""
        return self.log_scale[0].exp().clamp(max=100.0)


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


def rank_metrics(
    ranks: NDArray[Any],
    prefix: str,
    intervals: MetricIntervals,
    owners: NDArray[Any] | None = None,
) -> TaskMetrics:
    """Return recall at 1, 5 and 10 and the median of ranks.

    Args:
        ranks: (Q,) from 1; NaN for rows that are no queries.
        prefix: beginning of the metric names: "" finds candidates of queries, ``reverse_`` the
            opposite.
        intervals: bootstrap of the rows.
        owners: (Q,) row of each query; None if each row has one query.
    """
    if owners is not None:
        # Captions of one row are never independent.
        units = owners if intervals.units is None else intervals.units[owners]
        intervals = replace(intervals, units=units)
    is_query = ~np.isnan(ranks)
    if intervals.units is not None:
        intervals = replace(intervals, units=intervals.units[is_query])
    ranks = ranks[is_query]
    metrics = {f"{prefix}recall_at_{k}": intervals.mean(ranks <= k) for k in (1, 5, RECALL_RANK)}
    return metrics | {f"{prefix}median_rank": intervals.resample(ranks, median_rank)}


def unique_group_ids(groups: ArrayLike | Tensor) -> NDArray[np.int64]:
    """Groups with -1 ("no group") replaced by a negative number of each row's own, (N,)."""
    array = to_array(groups).astype(np.int64)
    return np.where(array < 0, -1 - np.arange(len(array)), array)


def pair_ranks(
    query_NE: ArrayLike, candidate_NE: ArrayLike, group_ids: ArrayLike, values: int = 2**24
) -> NDArray[np.float64]:
    """Compute the rank, from 1, of the best other row of each row's group, (N,).

    The rows of two embeddings are the same rows, so a row itself is no candidate. Ties count
    against the model. The rank is NaN for rows without another one of their group.

    Args:
        query_NE, candidate_NE: embeddings of the rows; similarity is their dot product.
        group_ids: (N,) see :func:`unique_group_ids`.
        values: similarities that are in memory at once.
    """
    query, candidate = torch.as_tensor(query_NE), torch.as_tensor(candidate_NE)
    ids = torch.as_tensor(to_array(group_ids))
    ranks = np.full(len(ids), np.nan)
    block = max(values // max(len(ids), 1), 1)
    for start in range(0, len(ids), block):
        rows = torch.arange(start, min(start + block, len(ids)))
        similarity_BN = query[rows] @ candidate.T
        same_BN = ids[rows][:, None] == ids[None]
        right_BN = same_BN.clone()
        right_BN[torch.arange(len(rows)), rows] = False
        best_B1 = similarity_BN.masked_fill(~right_BN, -torch.inf).amax(1, keepdim=True)
        ahead_B = ((similarity_BN >= best_B1) & ~same_BN).sum(1)
        found_B = right_BN.any(1)
        ranks[rows[found_B].numpy()] = 1 + ahead_B[found_B].numpy()
    return ranks


def retrieval_ranks(
    query_QE: Tensor | NDArray,
    candidate_CE: Tensor | NDArray,
    query_ids: ArrayLike | Tensor,
    candidate_ids: ArrayLike | Tensor,
    block: int = 2048,
) -> NDArray[np.int64]:
    """Compute the rank, from 1, of the best correct candidate of each query among wrong ones, (Q,).

    A candidate is correct if its id equals the id of the query. Other correct candidates do not
    lower the rank. Ties count against the model: a wrong candidate with the same similarity ranks
    first, so a model that maps everything to one point ranks last.

    Args:
        query_QE, candidate_CE: embeddings; similarity is their dot product.
        query_ids, candidate_ids: integers, (Q,) and (C,). See :func:`unique_group_ids`.
        block: at most block x block similarities are in memory at once.

    Raises:
        ValueError: a query without a correct candidate, values that are not finite, or sizes that
            do not fit.
    """
    query, candidate = torch.as_tensor(query_QE), torch.as_tensor(candidate_CE)
    left, right = torch.as_tensor(to_array(query_ids)), torch.as_tensor(to_array(candidate_ids))
    if len(left) != len(query) or len(right) != len(candidate):
        raise ValueError(
            f"{len(query)} queries and {len(candidate)} candidates do not fit {len(left)} and "
            f"{len(right)} ids"
        )
    # A NaN compares as false with everything, so it would get rank 1.
    if not torch.isfinite(query).all() or not torch.isfinite(candidate).all():
        raise ValueError("embeddings hold values that are not finite; ranks would be meaningless")
    alone = ~np.isin(left.numpy(), right.numpy())
    if alone.any():
        raise ValueError(f"{alone.sum()} queries have no right candidate, e.g. {left[alone][0]}")
    ranks = [
        _rank_block(q, candidate, ids, right, block)
        for q, ids in zip(query.split(block), left.split(block), strict=True)
    ]
    return torch.cat(ranks).numpy() if ranks else np.zeros(0, np.int64)


def _rank_block(
    query: Tensor, candidate: Tensor, left: Tensor, right: Tensor, block: int
) -> Tensor:
    """Rank a block of queries in two passes: the best correct candidate, then its winners."""
    best = torch.full((len(query), 1), -torch.inf, dtype=query.dtype)
    for part, ids in zip(candidate.split(block), right.split(block), strict=True):
        right_ones = (query @ part.T).masked_fill(left[:, None] != ids, -torch.inf)
        best = torch.maximum(best, right_ones.amax(1, keepdim=True))
    rank = torch.ones(len(query), dtype=torch.int64)
    for part, ids in zip(candidate.split(block), right.split(block), strict=True):
        rank += ((query @ part.T >= best) & (left[:, None] != ids)).sum(1)
    return rank


def median_rank(ranks: NDArray) -> float:
    """Return the median rank; an even number of queries can give half a rank."""
    return float(np.median(ranks))


#: Maximum number of cells per side of an image's grid. Coarse cells match drawings of two artists.
MAX_GRID = 12
#: Factor of learned term weights, whose exponential is used. With the common learning rate the
#: weights would stay near 1 in a few hundred steps.
TERM_SCALE = 10.0


class LinearPath(nn.Module):
    """Linear maps from texts, functions and images to unit vectors (B, E).

    An encoder that learns from few pairs forgets what its input was. Texts and functions that share
    rare words, or drawings with the same shapes, are then no nearer than others. A linear path
    beside the encoder keeps it (the wide part of Wide & Deep, Cheng et al. 2016; the features are
    ours). ``model.tasks.<task>.linear_path`` adds it to a task.

    Text and code: the sum of the token embeddings of the stem, each with the learned weight of its
    token. Both towers use the same weights and the same matrix. Texts with common tokens are
    therefore similar before training. Image: the mean colours of a grid of cells, relative to their
    mean.

    Args:
        config: sizes of the model.
        task: retrieval between towers of text, code or images.
    """

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__()
        kinds = {plan.stem for plan in task.towers.values()}
        width = config.embedding_dim
        if "token" in kinds:
            self.term_weight = nn.Embedding(config.vocab_size, 1)
            nn.init.zeros_(self.term_weight.weight)
            self.tokens = nn.Linear(config.dim, width, bias=False)
        if "patch" in kinds:
            self.side = find_grid_side(config.image_size)
            self.pixels = nn.Linear(3 * self.side**2, width, bias=False)
        # Learned as a logarithm, so that the path keeps its sign; one axis, see RetrievalHead.
        self.log_gain = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Mapping[str, Tensor], embedding: Callable[[], Tensor]) -> Tensor:
        """Return vectors (B, E) of length ``exp(log_gain)``.

        Args:
            inputs: ``tokens`` (B, T) or ``pixels`` (B, H, W, 3) of a tower.
            embedding: returns the token embedding (V, D) of the tower.
        """
        if "tokens" in inputs:
            y_BE = self.tokens(self._sum_tokens(inputs["tokens"], embedding()))
        else:
            y_BE = self.pixels(self._average_cells(inputs["pixels"]))
        return self.log_gain.exp() * F.normalize(to_wide_float(y_BE), dim=-1)

    def _sum_tokens(self, tokens_BT: Tensor, embedding_VD: Tensor) -> Tensor:
        weights_BT1 = (TERM_SCALE * self.term_weight(tokens_BT)).exp()
        weights_BT1 = weights_BT1 * (tokens_BT != PAD)[..., None]
        # Not a matrix product: autocast would round the sum to bf16.
        return (F.embedding(tokens_BT, embedding_VD) * weights_BT1).sum(1)

    def _average_cells(self, pixels_BHWC: Tensor) -> Tensor:
        B, size = pixels_BHWC.shape[:2]
        cell = size // self.side
        x = scale_to_signed(pixels_BHWC, self.pixels.weight.dtype)
        means_BN = x.reshape(B, self.side, cell, self.side, cell, 3).mean((2, 4)).flatten(1)
        # Shapes, not the brightness of the whole image, decide about similarity.
        return F.normalize(means_BN - means_BN.mean(1, keepdim=True), dim=-1)


def find_grid_side(size: int) -> int:
    """Return the number of cells per side: the largest divisor of ``size`` up to ``MAX_GRID``.

    Args:
        size: pixels per side of an image.
    """
    return next(side for side in range(MAX_GRID, 0, -1) if size % side == 0)


def count_linear_flops(config: SkillNetConfig, modality: str) -> int:
    """Return the operations of the path for one row of a tower.

    Args:
        config: sizes of the model.
        modality: name of the modality of the tower.
    """
    reads_tokens = find_modality(modality).reads_tokens
    inputs = config.dim if reads_tokens else 3 * find_grid_side(config.image_size) ** 2
    return 2 * inputs * config.embedding_dim
