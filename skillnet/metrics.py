"""Metrics on arrays: classification, sequences, retrieval, and bootstrap intervals.

Every metric has two steps. The first gives values per row (hits, distances, ranks). The second
is a statistic of rows (mean, ratio of sums, macro-F1, median). :func:`bootstrap_interval` takes
any such statistic. Rates are fractions in [0, 1], not percentages.

Shapes: N rows, Q queries, C candidates, E embedding width, B batch, T tokens, S symbols.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Statistic = Callable[[NDArray], float]


class ConfidenceInterval(NamedTuple):
    """Value of a metric and the bounds of its bootstrap interval, in the unit of the metric."""

    value: float
    low: float
    high: float


# -- classification ------------------------------------------------------------------------


def macro_f1_of_rows(pairs_N2: NDArray) -> float:
    """Compute macro-F1 of rows (predicted class, true class), a statistic for the bootstrap."""
    predicted, right = pairs_N2[:, 0], pairs_N2[:, 1]
    size = int(pairs_N2.max()) + 1
    hits = np.bincount(right[predicted == right], minlength=size)
    # Classes that occur neither as prediction nor as truth have no F1 and are left out.
    seen = np.bincount(predicted, minlength=size) + np.bincount(right, minlength=size)
    return float(np.mean(2 * hits[seen > 0] / seen[seen > 0]))


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


# -- sequences -----------------------------------------------------------------------------


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
        row[: len(sequence)] = _array(sequence)
    return padded, lengths


def error_counts(
    hypotheses: Sequence[Sequence[int]], references: Sequence[Sequence[int]]
) -> NDArray[np.int64]:
    """Return (distance, reference length) of each pair, (N, 2): rows for :func:`ratio_of_sums`.

    Args:
        hypotheses: N sequences of symbols.
        references: N sequences of symbols.
    """
    lengths = np.array([len(reference) for reference in references], np.int64)
    return np.stack([edit_distances(hypotheses, references), lengths], 1)


def greedy_symbols(log_probs_BTS: Tensor, lengths_B: Tensor) -> list[list[int]]:
    """Decode CTC outputs by their best path: repeats are merged and blanks removed.

    Args:
        log_probs_BTS: log probabilities; symbol 0 is the blank.
        lengths_B: tokens of each row.
    """
    paths = zip(log_probs_BTS.argmax(-1).tolist(), lengths_B.tolist(), strict=True)
    merged = ([symbol for symbol, _ in groupby(path[:length])] for path, length in paths)
    return [[symbol for symbol in path if symbol] for path in merged]


# -- retrieval -----------------------------------------------------------------------------


def unique_group_ids(groups: ArrayLike | Tensor) -> NDArray[np.int64]:
    """Groups with -1 ("no group") replaced by a negative number of each row's own, (N,)."""
    array = _array(groups).astype(np.int64)
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
    ids = torch.as_tensor(_array(group_ids))
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
    left, right = torch.as_tensor(_array(query_ids)), torch.as_tensor(_array(candidate_ids))
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


# -- intervals -----------------------------------------------------------------------------


def ratio_of_sums(rows_N2: NDArray) -> float:
    """Divide the sum of column 0 by that of column 1 (a micro average); NaN for an empty sum."""
    above, below = rows_N2.sum(0)
    return float(above / below) if below else float("nan")


def bootstrap_interval(
    values: ArrayLike | Tensor,
    statistic: Statistic = np.mean,
    seed: int = 0,
    samples: int = 1000,
    level: float = 0.95,
    clusters: ArrayLike | Tensor | None = None,
) -> ConfidenceInterval:
    """Compute a statistic of rows and its percentile bootstrap interval (source: Efron 1979).

    Args:
        values: one row per example, (N,) or (N, k).
        statistic: maps rows to a number: ``np.mean`` of hits, :func:`median_rank`,
            :func:`ratio_of_sums` of :func:`error_counts`, :func:`macro_f1_of_rows`.
        seed: start of the random numbers of the resampling; the same seed gives the same interval.
        samples: number of resamples.
        level: share of resamples between the bounds.
        clusters: (N,) labels. Rows of one cluster (a speaker, a package) are drawn together, which
            widens the interval if they are similar.

    Raises:
        ValueError: no rows, or clusters of another length.
    """
    rows = _array(values)
    if not len(rows):
        raise ValueError("an interval needs at least one row")
    generator = np.random.default_rng(seed)
    draw = _drawer(len(rows), clusters)
    figures = [statistic(rows[draw(generator)]) for _ in range(samples)]
    tail = (1 - level) / 2
    # A resample without any reference symbol gives NaN and is ignored.
    low, high = np.nanquantile(figures, [tail, 1 - tail])
    return ConfidenceInterval(float(statistic(rows)), float(low), float(high))


def _drawer(
    count: int, clusters: ArrayLike | Tensor | None
) -> Callable[[np.random.Generator], NDArray[np.int64]]:
    if clusters is None:
        return lambda generator: generator.integers(0, count, count)
    labels = _array(clusters)
    if labels.shape != (count,):
        raise ValueError(f"{count} rows do not fit clusters of the shape {labels.shape}")
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    members = np.split(order, np.cumsum(sizes)[:-1])

    def draw(generator: np.random.Generator) -> NDArray[np.int64]:
        picks = generator.integers(0, len(members), len(members))  # clusters, with replacement
        return np.concatenate([members[pick] for pick in picks])

    return draw


def _array(x: ArrayLike | Tensor) -> NDArray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
