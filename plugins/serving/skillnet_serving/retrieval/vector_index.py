"""Vectors of a searched corpus: as numbers of 32, 8 or 1 bits, in memory and in their file.

    float32 (N, E) ── encode_vectors ──> int8 (N, E), or the signs as bits (N, E / 8)

A query is always float32: it is multiplied with the numbers of a block, and the scores are scaled.
So int8 changes few ranks, and the signs alone more. :class:`RecallMeter` measures the loss.

:class:`JoinedScores` is the main entry point, for :mod:`skillnet_serving.retrieval.corpus_search`.
"""

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pipelines.serving.bundle import check_unit_vectors
from skillnet.rust_panics import panics_as_errors
from skillnet_platform import console
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.storage import atomic_write

VectorCode = Literal["float32", "int8", "binary"]
#: Code -> type of its numbers; eight signs are a byte.
TYPES: dict[VectorCode, type[np.generic]] = {
    "float32": np.float32,
    "int8": np.int8,
    "binary": np.uint8,
}
#: The recall is that of the ten best rows.
RECALLED_ROWS = 10


def count_columns(code: VectorCode, width: int) -> int:
    """Return the numbers of an encoded vector.

    Args:
        code: float32, int8 or binary.
        width: numbers of the vector.
    """
    return -(-width // 8) if code == "binary" else width


def encode_vectors(vectors: np.ndarray, code: VectorCode) -> np.ndarray:
    """Return vectors in a code, (N, C).

    Args:
        vectors: unit vectors (N, E) float32.
        code: float32 changes nothing; int8 keeps 8 bits of each number, and binary its sign.
    """
    if code == "binary":
        return np.packbits(vectors > 0, axis=1)
    if code == "int8":
        largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0)
        # The length is lost, and is always 1.
        return np.rint(vectors * (127 / np.where(largest, largest, 1))).astype(np.int8)
    return vectors


def decode_vectors(encoded: np.ndarray, width: int) -> np.ndarray:
    """Return unit vectors (N, E) of :func:`encode_vectors`; floats as they are.

    Args:
        encoded: (N, C) of any code, which its type tells.
        width: numbers of a vector, E.
    """
    if encoded.dtype == np.uint8:
        signs = np.unpackbits(encoded, axis=1, count=width).astype(np.float32)
        return (signs * 2 - 1) / np.float32(np.sqrt(width))
    if encoded.dtype == np.int8:
        vectors = encoded.astype(np.float32)
        lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
        return vectors / np.where(lengths, lengths, 1)[:, None]
    return encoded


class RecallMeter:
    """Share of the ten best rows of float32 vectors that encoded ones find.

    Args:
        queries: unit vectors (Q, E) float32.
    """

    def __init__(self, queries: np.ndarray) -> None:
        self._queries, self._rows = queries, 0
        empty = np.empty((len(queries), 0), np.float32)
        #: Scores and rows of the best, (Q, 10), by exact and by decoded vectors.
        self._best = [(empty, empty.astype(np.int64)) for _ in range(2)]

    def add_rows(self, exact: np.ndarray, decoded: np.ndarray) -> None:
        """Rank further rows.

        Args:
            exact: (N, E) float32.
            decoded: the same rows, see :func:`decode_vectors`.
        """
        rows = np.arange(self._rows, self._rows + len(exact))
        self._rows += len(exact)
        for number, vectors in enumerate((exact, decoded)):
            scores, found = self._best[number]
            scores = np.hstack([scores, self._queries @ vectors.T])
            found = np.hstack([found, np.broadcast_to(rows, (len(scores), len(rows)))])
            order = np.argsort(-scores, axis=1, kind="stable")[:, :RECALLED_ROWS]
            self._best[number] = (
                np.take_along_axis(scores, order, 1),
                np.take_along_axis(found, order, 1),
            )

    def measure_recall(self) -> float | None:
        """Return the recall in [0, 1]; None without queries or rows."""
        (_, exact), (_, decoded) = self._best
        if not exact.size:
            return None
        return float((exact[:, :, None] == decoded[:, None, :]).any(axis=2).mean())


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
        vectors: (N, C) of :func:`encode_vectors`.
        width: numbers of a vector, E.
    """

    #: Vectors of a block: 1 MiB at 256 numbers.
    BLOCK_ROWS = 1024

    def __init__(self, vectors: np.ndarray, width: int) -> None:
        self._vectors, self._width = vectors, width
        #: Of vectors of int8, whose scores are divided by them, (N,).
        self._lengths = self._measure_lengths() if vectors.dtype == np.int8 else None
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
            kind = np.result_type(self._vectors.dtype, np.float32)
            found = [np.empty(len(self._vectors), kind) for _ in joined]
            queries = [query.astype(kind) for query, _ in joined]
            for start, block in self._iter_blocks() if joined else ():
                for query, scores in zip(queries, found, strict=True):
                    # A third faster than ``np.dot``, and equal vectors get equal scores.
                    np.einsum("ij,j->i", block, query, out=scores[start : start + len(block)])
            for query, scores in zip(queries, found, strict=True):
                self._scale_scores(query, scores)
        except Exception as error:
            for _, answer in joined:
                answer.set_exception(error)
            return
        for (_, answer), scores in zip(joined, found, strict=True):
            answer.set_result(scores)

    def _iter_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the first row of each block and its numbers: floats, whole numbers, or bits."""
        is_float = self._vectors.dtype.kind == "f"
        # A new array for each block would take as long as the product.
        shape = (0 if is_float else self.BLOCK_ROWS, self._width)
        numbers = np.empty(shape, np.float32)
        for start in range(0, len(self._vectors), self.BLOCK_ROWS):
            rows = self._vectors[start : start + self.BLOCK_ROWS]
            if not is_float:
                if rows.dtype == np.uint8:
                    rows = np.unpackbits(rows, axis=1, count=self._width)
                np.copyto(numbers[: len(rows)], rows)
                rows = numbers[: len(rows)]
            yield start, rows

    def _scale_scores(self, query: np.ndarray, scores: np.ndarray) -> None:
        """Turn products with numbers of a block into those with unit vectors, in place."""
        if self._lengths is not None:
            scores /= self._lengths
        elif self._vectors.dtype == np.uint8:
            # A bit of 0 stands for -1.
            scores *= 2
            scores -= query.sum()
            scores /= np.sqrt(self._width)

    def _measure_lengths(self) -> np.ndarray:
        lengths = np.empty(len(self._vectors), np.float32)
        for start, block in self._iter_blocks():
            lengths[start : start + len(block)] = np.sqrt(np.einsum("ij,ij->i", block, block))
        return np.where(lengths, lengths, np.float32(1))


def read_cached(
    path: Path, key: str, shape: tuple[int, int], code: VectorCode = "float32"
) -> np.ndarray | None:
    """Return the vectors of a file; None if it is missing or damaged, and then removed.

    Args:
        path: file to read.
        key: digest of all that decides the embeddings.
        shape: expected number and width.
        code: code of the vectors.
    """
    if not path.is_file():
        return None
    try:
        return read_index(path, key, shape, code)
    # A cache holds nothing of its own, so a damaged file is built again.
    except (ValueError, OSError) as error:
        console.print_warning(f"damaged cache: {first_line(error)}; it is built again")
        path.unlink(missing_ok=True)
        return None


def write_index(path: Path, key: str, vectors: np.ndarray, recall: float | None = None) -> None:
    """Write embeddings with their hash.

    Args:
        path: file to write.
        key: digest of all that decides the embeddings.
        vectors: (N, C) of :func:`encode_vectors`.
        recall: result of :meth:`RecallMeter.measure_recall`.
    """
    about = {"key": key, "sha256": _hash_vectors(vectors)}
    if recall is not None:
        about["recall"] = str(recall)
    # Two searches may build one index; no reader must see half a file.
    with atomic_write(path) as stream:
        stream.write(save({"embeddings": vectors}, metadata=about))


def read_recall(path: Path) -> float | None:
    """Return the recall in a file that :func:`read_index` accepts; None if it was not measured.

    Args:
        path: file to read.
    """
    with safe_open(path, "numpy") as tensors:
        recall = (tensors.metadata() or {}).get("recall")
    return None if recall is None else float(recall)


def read_index(
    path: Path, key: str, shape: tuple[int, int], code: VectorCode = "float32"
) -> np.ndarray:
    """Read embeddings, and check their hash, key, shape and lengths.

    Args:
        path: file to read.
        key: digest of all that decides the embeddings.
        shape: expected number and width.
        code: code of the vectors.

    Returns:
        The encoded vectors, (N, C).

    Raises:
        UserError: the file is damaged, or of another model or corpus.
    """
    try:
        with panics_as_errors("no safetensors file"), safe_open(path, "numpy") as tensors:
            about = tensors.metadata() or {}
            vectors = np.asarray(tensors.get_tensor("embeddings"))
    except (SafetensorError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no index ({error})") from None
    if about.get("key") != key:
        raise UserError(f"{path} is the index of another model or corpus")
    if about.get("sha256") != _hash_vectors(vectors):
        raise UserError(f"{path} was altered: it does not fit its hash")
    if code == "float32":
        check_unit_vectors(path, vectors, shape)
        return vectors
    expected = (shape[0], count_columns(code, shape[1]))
    if vectors.shape != expected or vectors.dtype != TYPES[code]:
        raise UserError(
            f"{path} is damaged: it holds {vectors.shape} numbers of type {vectors.dtype}, "
            f"expected {expected} of type {TYPES[code].__name__}"
        )
    return vectors


def _hash_vectors(vectors: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(vectors).data).hexdigest()
