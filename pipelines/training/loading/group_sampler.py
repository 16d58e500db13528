"""Order of the rows of a task whose shards are divided among nodes: canonical groups of shards.

A global batch has an equal number of rows from each group. A rank takes consecutive rows of the
batch, so it reads the shards of its groups only::

    batch   group 0 | group 1 | group 2 | group 3
    ranks   ------ 0 -------- | ------ 1 --------

The groups do not depend on the number of ranks. The order is therefore the same for any number of
them, and each shard is read by one rank if that number divides the number of groups. The idea of
canonical nodes is that of MosaicML's streaming datasets.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from pipelines.training.loading.window_sampler import WindowedShuffleSampler
from skillnet.keyed_random import keyed_rng


class GroupedShuffleSampler:
    """Endless order of one task's rows, in equal parts from each group of shards.

    Each group has its own epochs, in which each of its rows occurs once. Groups differ in size by
    at most about one shard, so all rows occur about equally often.

    Args:
        rows: (shards,) rows of each shard.
        sizes: (shards,) bytes of each shard.
        batch: rows of a global batch, a multiple of ``groups``.
        groups: number of groups, at most the number of shards.
        limit: bytes of the shards that are shuffled as a unit, over all groups.
        key: seed and names that determine the order.
        lengths: returns the lengths of some rows; see
            :class:`pipelines.training.loading.window_sampler.WindowedShuffleSampler`.
    """

    def __init__(
        self,
        rows: Sequence[int],
        sizes: Sequence[int],
        batch: int,
        groups: int,
        limit: float,
        key: Sequence[int | str],
        lengths: Callable[[np.ndarray], np.ndarray | None] | None = None,
    ) -> None:
        starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self._share = batch // groups
        self.groups = divide_shards(rows, groups, key)
        self._rows = [
            np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in group])
            for group in self.groups
        ]
        self._samplers = [
            WindowedShuffleSampler(
                [rows[shard] for shard in group],
                [sizes[shard] for shard in group],
                self._share,
                limit / groups,
                (*key, "group", number),
                lengths and partial(_lengths_of, lengths, self._rows[number]),
            )
            for number, group in enumerate(self.groups)
        ]

    def batch(self, batch_index: int, part: slice = slice(None)) -> np.ndarray:
        """Return the row numbers of one batch, or of a part of it.

        Args:
            batch_index: position of the batch in the run, from 0.
            part: positions in the batch; the order of other groups is not computed.
        """
        numbers = self._groups_of(part)
        rows = np.concatenate(
            [self._rows[number][self._samplers[number].batch(batch_index)] for number in numbers]
        )
        start, stop, _ = part.indices(self._share * len(self.groups))
        before = numbers.start * self._share
        return rows[start - before : stop - before]

    def shards(self, batch_index: int, part: slice = slice(None)) -> list[int]:
        """Return the shards of the windows that a part of a batch reads."""
        return [
            self.groups[number][shard]
            for number in self._groups_of(part)
            for shard in self._samplers[number].shards(batch_index)
        ]

    def next_shards(self, batch_index: int, part: slice = slice(None)) -> list[int]:
        """Return the shards of the windows after those that a part of a batch reads."""
        return [
            self.groups[number][shard]
            for number in self._groups_of(part)
            for shard in self._samplers[number].next_shards(batch_index)
        ]

    def max_open_bytes(self) -> int:
        """Return the bytes of shards that may be in use at once on a node that reads all groups."""
        return sum(sampler.max_open_bytes() for sampler in self._samplers)

    def _groups_of(self, part: slice) -> range:
        start, stop, _ = part.indices(self._share * len(self.groups))
        return range(start // self._share, -(-stop // self._share))


def divide_shards(rows: Sequence[int], groups: int, key: Sequence[int | str]) -> list[list[int]]:
    """Divide shards into groups with about equal numbers of rows.

    Args:
        rows: (shards,) rows of each shard.
        groups: number of groups.
        key: seed and names; equal keys give equal groups.

    Returns:
        The sorted shards of each group.
    """
    order = keyed_rng(*key, "groups").permutation(len(rows))
    found: list[list[int]] = [[] for _ in range(groups)]
    filled = [0] * groups
    # The largest shard goes to the smallest group; the shuffled order decides between equals.
    for shard in sorted(order.tolist(), key=lambda shard: -rows[shard]):
        smallest = min(range(groups), key=lambda group: (filled[group], len(found[group])))
        found[smallest].append(shard)
        filled[smallest] += rows[shard]
    return [sorted(group) for group in found]


def _lengths_of(
    lengths: Callable[[np.ndarray], np.ndarray | None], numbers: np.ndarray, rows: np.ndarray
) -> np.ndarray | None:
    return lengths(numbers[rows])
