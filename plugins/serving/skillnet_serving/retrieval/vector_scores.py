"""Scores of vectors for queries, and the rows with the best ones."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np


def iter_best(scores: np.ndarray, count: int) -> Iterator[int]:
    """Yield the positions of scores, the largest first; equal ones in their order.

    Only the largest are sorted, four times as many whenever the caller wants more of them.

    Args:
        scores: (N,).
        count: number of positions that the caller probably needs.
    """
    done = 0
    while done < len(scores):
        count = max(count, 1)
        if count < len(scores):
            least = np.partition(scores, -count)[-count]
            found = np.flatnonzero(scores >= least)
        else:
            found = np.arange(len(scores))
        # Results are reproducible, because the sort is stable.
        order = found[np.argsort(-scores[found], kind="stable")]
        yield from order[done:].tolist()
        done, count = len(order), 4 * len(order)


class JoinedScores:
    """Products of vectors with queries; queries that arrive together share a pass over the memory.

    A product with a million vectors waits for the memory, not for the processor. A block of vectors
    stays in the cache for all waiting queries. Each product of a block and a query is the same with
    any number of queries, so the scores do not depend on other requests.

    Args:
        vectors: (N, E) float32.
    """

    #: Vectors of a block: 1 MiB at 256 numbers.
    BLOCK_ROWS = 1024

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors = vectors
        self._pass, self._list = threading.Lock(), threading.Lock()
        self._waiting: list[tuple[np.ndarray, Future[np.ndarray]]] = []

    def score(self, query: np.ndarray) -> np.ndarray:
        """Return the product with each vector, (N,); several threads may call it.

        Args:
            query: (E,).
        """
        answer: Future[np.ndarray] = Future()
        with self._list:
            self._waiting.append((query, answer))
        with self._pass:
            # The thread that had its turn before may have answered this query, too.
            with self._list:
                joined, self._waiting = self._waiting, []
            self._run_pass(joined)
        return answer.result()

    def _run_pass(self, joined: list[tuple[np.ndarray, "Future[np.ndarray]"]]) -> None:
        try:
            kind = self._vectors.dtype
            found = [np.empty(len(self._vectors), kind) for _ in joined]
            queries = [query.astype(kind) for query, _ in joined]
            for start in range(0, len(self._vectors) if joined else 0, self.BLOCK_ROWS):
                block = self._vectors[start : start + self.BLOCK_ROWS]
                for query, scores in zip(queries, found, strict=True):
                    # A third faster than ``np.dot``, and equal vectors get equal scores.
                    np.einsum("ij,j->i", block, query, out=scores[start : start + len(block)])
        except Exception as error:
            for _, answer in joined:
                answer.set_exception(error)
            return
        for (_, answer), scores in zip(joined, found, strict=True):
            answer.set_result(scores)
