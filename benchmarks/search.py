"""Ranking of the rows of an index for a query, beside a bare product, NumPy and faiss.

All contenders search the same unit vectors for the same query, in one process and one thread. Each
returns the twelve best rows; the product alone returns scores. faiss is left out if it is not
installed. Eight queries at once share a pass over the memory. Vectors of 8 bits and of signs, as
``--vectors`` stores them, are decoded in each search; ``quantization`` measures what they lose.
"""

import importlib
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.measure import Result, in_turns, ratio, spread
from skillnet_serving.retrieval.corpus_search import _rank_hits
from skillnet_serving.retrieval.vector_index import JoinedScores, VectorCode, encode_vectors

#: Vectors of an index, and numbers of a vector.
SIZES, WIDTH = (1_000, 20_000, 100_000, 1_000_000), 256
TOP, QUERIES = 12, 8
SMALL_CODES: tuple[VectorCode, ...] = ("int8", "binary")
CLOCK = "cpu"


def run(rounds: int, threads: int) -> list[Result]:
    """Milliseconds of a query, and ratios to the contenders."""
    results = []
    for size in SIZES:
        results += _compare(size, rounds if size < 1_000_000 else min(rounds, 10))
    return results


def _compare(size: int, rounds: int) -> list[Result]:
    from time import process_time

    random = np.random.default_rng(0)
    vectors = random.standard_normal((size, WIDTH), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    noise = 0.1 * random.standard_normal((QUERIES, WIDTH), dtype=np.float32)
    queries = vectors[size // 2] + noise
    corpus: Any = SimpleNamespace(splits={"test": _split(size)})
    scores = JoinedScores(vectors, vectors.shape[1])

    def search(scores: JoinedScores = scores) -> list[Any]:
        return _rank_hits(corpus, ["test"], scores.score(queries[0]), TOP, "")

    def join() -> None:
        scores._run_pass([(query, Future()) for query in queries])

    def partition() -> Any:
        found = vectors @ queries[0]
        best = np.argpartition(-found, TOP)[:TOP]
        return best[np.argsort(-found[best], kind="stable")]

    def sort() -> Any:
        return np.argsort(-(vectors @ queries[0]), kind="stable")[:TOP]

    sides: dict[str, Any] = {
        "search": search,
        "product alone": lambda: vectors @ queries[0],
        "numpy argpartition": partition,
        "numpy argsort": sort,
        "8 queries, joined": join,
        "8 queries, one by one": lambda: [vectors @ query for query in queries],
    }
    for code in SMALL_CODES:
        encoded = JoinedScores(encode_vectors(vectors, code), WIDTH)
        sides[f"search, {code}"] = partial(search, encoded)
    try:
        faiss = importlib.import_module("faiss")
    except ImportError:
        pass
    else:
        faiss.omp_set_num_threads(1)
        flat = faiss.IndexFlatIP(WIDTH)
        flat.add(vectors)
        sides["faiss flat"] = lambda: flat.search(queries[:1], TOP)
    assert [hit.row for hit in search()] == partition().tolist()
    seconds = in_turns(sides, rounds, process_time, warmup=1)
    setting = f"{size} vectors of {WIDTH}"
    results = [
        Result(name, "", "ms", *spread([1e3 * s for s in took]), "", rounds, setting)
        for name, took in seconds.items()
    ]
    for other in ("product alone", "numpy argpartition", "numpy argsort", "faiss flat"):
        if other in seconds:
            found = ratio(seconds["search"], seconds[other])
            # Below, a query is the hits that it returns.
            target = "<= 1.1" if other == "numpy argpartition" and size >= 20_000 else ""
            results.append(Result("search", other, "ratio", *found, target, rounds, setting))
    for code in SMALL_CODES:
        found = ratio(seconds[f"search, {code}"], seconds["search"])
        results.append(Result(f"search, {code}", "search", "ratio", *found, "", rounds, setting))
    found = ratio(seconds["8 queries, joined"], seconds["8 queries, one by one"])
    results.append(Result("8 queries", "one by one", "ratio", *found, "", rounds, setting))
    return results


def _split(size: int) -> Any:
    keys = [f"row {number}" for number in range(size)]
    table = pa.table({"key": keys, "captions": [[key] for key in keys]})
    return SimpleNamespace(rows=size, table=lambda: table)
