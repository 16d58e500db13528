"""Metrics compared with their definitions and with scikit-learn."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch.utils._python_dispatch import TorchDispatchMode

from skillnet import metrics
from skillnet.metrics import bootstrap_interval
from skillnet.objectives import classification, ctc, retrieval
from skillnet.objectives.retrieval import retrieval_ranks

symbols = st.lists(st.integers(1, 4), max_size=8)


# -- classification ----------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_classification_equals_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    said, right = zip(*pairs, strict=True)
    theirs = f1_score(right, said, average="macro")
    assert classification.macro_f1_of_rows(np.array(pairs)) == pytest.approx(theirs, abs=1e-12)


# -- sequences ----------------------------------


def levenshtein(a: list[int], b: list[int]) -> int:
    table = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(row[-1] + 1, table[j] + 1, table[j - 1] + (x != y)))
        table = row
    return table[-1]


@given(st.lists(st.tuples(symbols, symbols), max_size=9), st.integers(1, 10))
def test_edit_distances_equal_the_textbooks(pairs, block: int) -> None:
    said, right = [p[0] for p in pairs], [p[1] for p in pairs]
    distances = ctc.edit_distances(said, right, block)
    assert distances.tolist() == [levenshtein(a, b) for a, b in pairs]


@pytest.mark.parametrize(
    ("said", "right", "rate"),
    [
        # Symbols weigh, not rows.
        ([[1], [1, 2, 3, 4, 5, 6, 7, 8, 9]], [[2], [1, 2, 3, 4, 5, 6, 7, 8, 9]], 0.1),
        ([[1, 2, 3]], [[4]], 3.0),
    ],
)
def test_the_error_rate_divides_sums(said, right, rate: float) -> None:
    lengths = np.array([len(row) for row in right])
    padded = np.array([row + [0] * (max(lengths) - len(row)) for row in right])
    targets = {"symbols": padded, "symbols_lengths": lengths}
    counts = ctc.CTCHead.score_rows(ctc.RowTranscripts(said, np.ones(len(said))), targets)
    assert metrics.ratio_of_sums(np.stack(counts, 1)) == pytest.approx(rate)


def test_greedy_symbols_merge_repeats_and_drop_blanks() -> None:
    path = torch.tensor([[1, 1, 0, 1, 2, 2, 3], [0, 0, 0, 3, 3, 3, 3]])
    scores = torch.nn.functional.one_hot(path, 4).float().log_softmax(-1)
    assert ctc.greedy_symbols(scores, torch.tensor([6, 3])) == [[1, 1, 2], []]


# -- retrieval ----------------------------------


def naive_ranks(query, candidate, left, right) -> list[int]:
    similarity = query @ candidate.T
    ranks = []
    for i, row in enumerate(similarity):
        best = max(s for s, other in zip(row, right, strict=True) if other == left[i])
        worse = sum(s >= best for s, other in zip(row, right, strict=True) if other != left[i])
        ranks.append(1 + worse)
    return ranks


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**32 - 1), st.integers(1, 7))
@settings(deadline=None)
def test_ranks_equal_the_definition(rows: int, groups: int, seed: int, block: int) -> None:
    generator = np.random.default_rng(seed)
    # Small integers: many ties, and products without rounding.
    query = generator.integers(-2, 3, (rows, 3)).astype(np.float64)
    candidate = generator.integers(-2, 3, (rows + 2, 3)).astype(np.float64)
    left = generator.integers(0, groups, rows)
    right = np.concatenate([left, [0, 99]])
    ranks = retrieval_ranks(query, candidate, left, right, block)
    assert ranks.tolist() == naive_ranks(query, candidate, left, right)


def test_other_right_candidates_do_not_push_the_best_one_down() -> None:
    query = torch.tensor([[1.0, 0.0]])
    candidate = torch.tensor([[0.9, 0], [0.8, 0], [0.95, 0], [0.7, 0]])
    assert retrieval_ranks(query, candidate, [7], [7, 7, 1, 2]).tolist() == [2]


def test_a_model_that_maps_everything_to_one_point_ranks_last() -> None:
    same = torch.ones(50, 4)
    assert set(retrieval_ranks(same, same, range(50), range(50), block=8)) == {50}


def test_rows_without_a_group_are_their_own() -> None:
    assert retrieval.unique_group_ids([3, -1, 3, -1]).tolist() == [3, -2, 3, -4]


def test_ranks_refuse_what_would_mean_nothing() -> None:
    one = torch.eye(3)
    with pytest.raises(ValueError, match="not finite"):
        retrieval_ranks(one * torch.nan, one, range(3), range(3))
    with pytest.raises(ValueError, match=r"2 queries have no right candidate, e\.g\. 4"):
        retrieval_ranks(one, one, [0, 4, 5], range(3))
    with pytest.raises(ValueError, match="do not fit"):
        retrieval_ranks(one, one, [0, 1], range(3))


def test_ranks_need_memory_for_a_block_only() -> None:
    rows = 1100
    query = np.random.default_rng(0).standard_normal((rows, 4)).astype(np.float32)
    seen: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Watch():
        retrieval_ranks(query, query, range(rows), range(rows), block=128)
    assert max(seen) <= max(128 * 128, query.size)


def test_median_rank() -> None:
    ranks = np.array([1, 2, 5, 10, 11])
    assert retrieval.median_rank(ranks) == 5
    assert retrieval.median_rank(ranks[:4]) == 3.5


# -- intervals ----------------------------------


def test_interval_is_a_function_of_the_seed() -> None:
    hits = np.arange(100) % 3 == 0
    assert bootstrap_interval(hits, seed=1) == bootstrap_interval(hits, seed=1)
    assert bootstrap_interval(hits, seed=1) != bootstrap_interval(hits, seed=2)


def test_interval_of_a_mean_is_that_of_theory() -> None:
    hits = np.arange(1000) % 4 == 0
    value, low, high = bootstrap_interval(hits, samples=2000)
    assert value == 0.25
    error = 1.96 * np.sqrt(0.25 * 0.75 / 1000)
    assert low == pytest.approx(0.25 - error, abs=0.004)
    assert high == pytest.approx(0.25 + error, abs=0.004)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        rows = np.stack([generator.poisson(2, 80), np.full(80, 10)], 1)  # 20 % errors
        _, low, high = bootstrap_interval(rows, metrics.ratio_of_sums, seed=trial, samples=200)
        covered += low <= 0.2 <= high
    assert 0.88 <= covered / 200 <= 1


def test_intervals_of_all_statistics_hold_their_value() -> None:
    generator = np.random.default_rng(0)
    pairs = generator.integers(0, 3, (200, 2))
    ranks = generator.integers(1, 100, 200)
    for rows, statistic in (
        (pairs, classification.macro_f1_of_rows),
        (pairs + 1, metrics.ratio_of_sums),
        (ranks, retrieval.median_rank),
        (torch.tensor(ranks <= 10), np.mean),
    ):
        value, low, high = bootstrap_interval(rows, statistic)
        assert low <= value <= high
        assert low < high


def test_clusters_of_like_rows_widen_the_interval() -> None:
    hits = np.repeat(np.arange(40) % 2, 25)
    alone = bootstrap_interval(hits)
    together = bootstrap_interval(hits, clusters=np.repeat([f"speaker {i}" for i in range(40)], 25))
    assert together.value == alone.value
    assert together.high - together.low > 3 * (alone.high - alone.low)


def test_clusters_of_one_row_each_change_nothing_but_the_draw() -> None:
    hits = np.arange(300) % 2
    alone = bootstrap_interval(hits)
    each = bootstrap_interval(hits, clusters=np.arange(300))
    assert each.high - each.low == pytest.approx(alone.high - alone.low, rel=0.2)


def test_intervals_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="3 rows do not fit clusters"):
        bootstrap_interval([1, 2, 3], clusters=[1, 2])


def test_interval_of_many_rows_takes_little_memory() -> None:
    hits = np.ones(100_000)
    tracemalloc.start()
    bootstrap_interval(hits, samples=20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * hits.nbytes
