"""Embeddings are verified when they are read, and computed again if damaged; memory has limits."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from pipelines.data.shards.dataset import PreparedCorpus, open_corpus
from pipelines.data.shards.files import LocalShardStore
from pipelines.serving import bundle
from skillnet_platform.errors import UserError
from skillnet_serving.retrieval import corpus_search
from skillnet_serving.retrieval.corpus_search import CorpusSearch
from skillnet_serving.retrieval.vector_index import (
    JoinedScores,
    RecallMeter,
    VectorCode,
    decode_vectors,
    encode_vectors,
    iter_best,
    read_index,
    write_index,
)
from tests.helpers.served_place import ServedPlace


def unit_vectors(rows: int = 9, width: int = 4) -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_index_is_read_as_written(tmp_path: Path) -> None:
    vectors = unit_vectors()
    vectors[2] = 0
    write_index(tmp_path / "x.safetensors", "key", vectors)
    assert np.array_equal(read_index(tmp_path / "x.safetensors", "key", (9, 4)), vectors)


def test_altered_index_is_rejected(tmp_path: Path) -> None:
    path, vectors = tmp_path / "x.safetensors", unit_vectors()
    write_index(path, "key", vectors)
    whole = path.read_bytes()

    def rejected(message: str, key: str = "key", shape: tuple[int, int] = (9, 4)) -> None:
        with pytest.raises(UserError, match=message) as caught:
            read_index(path, key, shape)
        assert str(path) in str(caught.value)

    rejected("of another model or corpus", key="other")
    rejected("is damaged: it holds", shape=(8, 4))
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    rejected("was altered")
    path.write_bytes(whole[:-5])
    rejected("is no index")
    path.write_bytes(b"")
    rejected("is no index")
    save_file({"embeddings": vectors}, path)
    rejected("of another model or corpus")
    path.write_bytes(save({"other": vectors}, metadata={"key": "key"}))
    rejected("is no index")
    # An author of the file can write a hash that fits.
    for value, message in ((5.18, r"row 0 has the length 5\.18"), (np.nan, "has the length nan")):
        changed = vectors.copy()
        changed[0] = changed[0] * np.float32(value)
        write_index(path, "key", changed)
        rejected(message)


def test_damaged_index_is_built_again(place, run_root, capsys):
    def build() -> np.ndarray:
        search = CorpusSearch(place.predictor, place.source, place.data, "text_to_image", ["test"])
        return search.embed_rows()

    vectors = build()
    (path,) = (run_root / "cache" / "indexes").glob("*.safetensors")
    changed = load_file(path)["embeddings"]
    changed[0] *= 5.18
    save_file({"embeddings": changed}, path)
    capsys.readouterr()
    assert np.array_equal(build(), vectors)
    reported = " ".join(capsys.readouterr().err.split())
    assert "damaged cache" in reported
    assert reported.count("it is built again") == 1
    assert np.array_equal(build(), vectors)
    assert "damaged" not in capsys.readouterr().err


@pytest.mark.parametrize(("code", "cosine"), [("float32", 1), ("int8", 0.9999), ("binary", 0.6)])
def test_encoded_vectors_are_near_the_floats(code: VectorCode, cosine: float) -> None:
    # Three blocks of a search, the last of them shorter.
    vectors = unit_vectors(2500, 61)
    encoded = encode_vectors(vectors, code)
    decoded = decode_vectors(encoded, 61)
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=1), 1, atol=1e-6)
    assert (vectors * decoded).sum(axis=1).min() >= cosine - 1e-6
    assert encoded.nbytes == 2500 * {"float32": 244, "int8": 61, "binary": 8}[code]
    scores = JoinedScores(encoded, 61).score(vectors[7])
    np.testing.assert_allclose(scores, decoded @ vectors[7], atol=1e-6)
    if code == "int8":
        empty = encode_vectors(np.zeros((1, 61), np.float32), code)
        assert not decode_vectors(empty, 61).any()
        assert not JoinedScores(empty, 61).score(vectors[7]).any()


def test_the_recall_counts_the_ten_best_rows_of_both() -> None:
    vectors, queries = unit_vectors(40, 16), unit_vectors(3, 16)
    other = vectors.copy()
    # The best row of the first query becomes the last: 1 of 30 is missing.
    other[np.argmax(vectors @ queries[0])] = -queries[0]
    meter = RecallMeter(queries[:1])
    for start in range(0, 40, 7):
        meter.add_rows(vectors[start : start + 7], other[start : start + 7])
    assert meter.measure_recall() == pytest.approx(0.9)
    assert RecallMeter(queries[:0]).measure_recall() is None


@pytest.mark.parametrize("code", ["int8", "binary"])
def test_a_search_by_encoded_vectors_says_what_they_lose(
    place, run_root, monkeypatch, capsys, code
):
    def open_search(code: VectorCode) -> CorpusSearch:
        search = CorpusSearch(place.predictor, place.source, place.data, "text_to_image", code=code)
        search.open_index()
        return search

    exact = open_search("float32").embed_rows()
    monkeypatch.setattr(corpus_search, "CHUNK_ROWS", 3)
    search = open_search(code)
    encoded = search.embed_rows()
    width = exact.shape[1]
    wanted = decode_vectors(encode_vectors(exact, code), width)
    # Another batch of rows rounds the floats otherwise, so a sign of a number near zero may differ.
    np.testing.assert_allclose(
        np.mean(np.abs(decode_vectors(encoded, width) - wanted)), 0, atol=1e-3
    )
    assert 0.3 < search.index.recall <= 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"{code} vectors take" in said
    assert f"they find {search.index.recall:.1%} of the ten best rows of float32 vectors" in said
    monkeypatch.setattr(CorpusSearch, "_embed_table", None)  # the file has all of it
    again = open_search(code)
    assert again.index.recall == search.index.recall
    query = exact[0]
    assert again.rank_rows(query, 3) == search.rank_rows(query, 3)


# -- known captions --------------------------------------------------------------------------


@pytest.fixture
def corpus(place: ServedPlace) -> PreparedCorpus:
    return open_corpus(place.data / "drawings")


def firsts(corpus: PreparedCorpus) -> list[str]:
    rows = [row for split in corpus.splits.values() for row in split.column("captions").to_pylist()]
    return list(dict.fromkeys(row[0] for row in rows))


def test_all_captions_are_known_below_the_limit(corpus, monkeypatch):
    monkeypatch.setattr(bundle, "BATCH_CAPTIONS", 3)
    assert bundle.read_known_captions(corpus) == firsts(corpus)


def test_no_shard_is_opened_after_the_last_returned_caption(corpus, monkeypatch, capsys):
    expected = firsts(corpus)
    opened: list[str] = []
    before = LocalShardStore.open

    def recording_open(self: LocalShardStore, shard: dict[str, str]) -> object:
        opened.append(shard["file"])
        return before(self, shard)

    monkeypatch.setattr(LocalShardStore, "open", recording_open)
    assert bundle.read_known_captions(corpus, 2) == expected[:2]
    assert len(opened) == 1
    assert "choose among the first ones only" in capsys.readouterr().err


def test_a_search_above_the_memory_limit_names_a_split(place, corpus, run_root, monkeypatch):
    rows = sum(split.rows for split in corpus.splits.values())
    monkeypatch.setattr(corpus_search, "MAX_INDEX_BYTES", rows * 8 * 4 - 1)
    splits = list(corpus.splits)
    with pytest.raises(
        UserError, match=rf"vectors of {rows} rows take .*--splits (test|validation)"
    ):
        CorpusSearch(place.predictor, place.source, place.data, "text_to_image", splits)


@pytest.mark.parametrize("count", [0, 1, 12, 499, 500, 9_999])
@pytest.mark.parametrize("levels", [1, 3, 10_000])
def test_the_best_rows_are_those_of_a_stable_sort(count: int, levels: int) -> None:
    """Equal scores keep the order of their rows, however many of them are asked for."""
    scores = np.random.default_rng(0).integers(levels, size=500).astype(np.float32)
    expected = np.argsort(-scores, kind="stable").tolist()
    assert list(iter_best(scores, count)) == expected
    assert list(itertools.islice(iter_best(scores, count), 30)) == expected[:30]
    assert list(iter_best(scores[:0], count)) == []


def test_queries_that_arrive_together_get_their_own_scores_bit_by_bit(monkeypatch):
    vectors = unit_vectors(3_000, 24)
    vectors[1500] = vectors[7]
    queries = unit_vectors(40, 24)
    alone = [JoinedScores(vectors, 24).score(query) for query in queries]
    np.testing.assert_allclose(alone, queries @ vectors.T, atol=1e-6)
    assert all(scores[1500] == scores[7] for scores in alone)
    passes: list[int] = []
    joined = JoinedScores(vectors, 24)
    run_pass, is_first = joined._run_pass, threading.Event()

    def count_pass(waiting: Any) -> None:
        passes.append(len(waiting))
        # The first pass ends when the other queries wait.
        while len(passes) == 1 and len(joined._waiting) < len(queries) - 1:
            is_first.wait(0.001)
        run_pass(waiting)

    monkeypatch.setattr(joined, "_run_pass", count_pass)
    with ThreadPoolExecutor(len(queries)) as pool:
        found = list(pool.map(joined.score, queries))
    assert all(np.array_equal(a, b) for a, b in zip(alone, found, strict=True))
    assert [size for size in passes if size] == [1, len(queries) - 1]


def test_a_query_of_another_width_fails_without_blocking_the_next() -> None:
    joined = JoinedScores(unit_vectors(5, 4), 4)
    with pytest.raises(ValueError, match="broadcast"):
        joined.score(np.ones(3, np.float32))
    assert joined.score(np.ones(4, np.float32)).shape == (5,)
