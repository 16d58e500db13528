"""Random numbers keyed by seed, names and step: generators, and those of the rows of a batch."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

#: float32 numbers that Philox makes for one value of its counter: 256 bits.
NUMBERS_PER_COUNT = 8


def keyed_rng(*key: int | str) -> np.random.Generator:
    """Return a Philox generator keyed by integers and names; equal keys give equal numbers.

    Philox is a counter-based generator (Salmon et al., SC 2011).

    Args:
        key: such as (seed, "order", task, epoch).
    """
    return np.random.Generator(_keyed_philox(key))


def draw_uniform(key: Sequence[int | str], start: int, count: int) -> np.ndarray:
    """Return a part of a keyed sequence, (count,) float32 in [0, 1), without drawing its beginning.

    The numbers equal ``keyed_rng(*key).random(start + count, dtype=np.float32)[start:]``.

    Args:
        key: parts that :func:`keyed_rng` hashes to a seed.
        start: position of the first number.
        count: how many numbers to draw.
    """
    philox = _keyed_philox(key)
    philox.advance(start // NUMBERS_PER_COUNT)
    skipped = start % NUMBERS_PER_COUNT
    return np.random.Generator(philox).random(skipped + count, dtype=np.float32)[skipped:]


def _keyed_philox(key: Sequence[int | str]) -> np.random.Philox:
    words = [part & 0xFFFFFFFF if isinstance(part, int) else _name_word(part) for part in key]
    return np.random.Philox(np.random.SeedSequence(words))


@lru_cache(maxsize=256)
def _name_word(name: str) -> int:
    from zlib import crc32

    return crc32(name.encode())


class BatchRandom:
    """Random numbers of one global batch; a rank sees those of its rows.

    Args:
        key: seed, purpose and step, which determine the numbers.
        count: rows of the global batch.
        part: this rank's rows among them.
    """

    def __init__(self, key: Sequence[int | str], count: int, part: slice) -> None:
        self._key, self._count, self._part = tuple(key), count, part

    def branch(self, name: str) -> "BatchRandom":
        """Return independent random numbers of the same rows, for a second change of them."""
        return BatchRandom((*self._key, name), self._count, self._part)

    def uniform(self, name: str, *shape: int) -> np.ndarray:
        """Return (B, *shape) float32 in [0, 1). ``shape`` must not depend on the rank's rows."""
        start, stop, _ = self._part.indices(self._count)
        each = math.prod(shape)
        # The numbers of other ranks' rows are skipped, so that the cost is that of these rows.
        numbers = draw_uniform((*self._key, name), start * each, (stop - start) * each)
        return numbers.reshape(stop - start, *shape)
