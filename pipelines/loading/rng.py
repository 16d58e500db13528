"""Random generators keyed by seed, names and step."""

from functools import lru_cache

import numpy as np


def keyed_rng(*key: int | str) -> np.random.Generator:
    """Return a Philox generator keyed by integers and names; equal keys give equal numbers.

    Philox is a counter-based generator (Salmon et al., SC 2011).

    Args:
        key: such as (seed, "order", task, epoch).
    """
    words = [part & 0xFFFFFFFF if isinstance(part, int) else _name_word(part) for part in key]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


@lru_cache(maxsize=256)
def _name_word(name: str) -> int:
    from zlib import crc32

    return crc32(name.encode())
