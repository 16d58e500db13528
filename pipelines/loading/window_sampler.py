"""The order of rows of a task too large to be shuffled whole, or that starts early: windows of
shards.

    epoch   shards in random order      3 0 | 4 1 | 2        windows of so many bytes
            rows of a window, shuffled  ~~~~~ ~~~~~ ~~~

A pure function of (seed, occurrence) like :class:`mixture.RowOrder`, for which one only needs the
row numbers of the windows that a batch touches, and from which one knows the shards that come next.

With ``early`` the first window of all grows: it begins with the rows of one shard, and the next
comes in when half of the rows that came are taken, as in a shuffle buffer that is filled while it
is read. So the first batch needs one shard, and the others have time to arrive.

    taken of a window of 3 0 4          3 | 3 0 | 3 0 4      parts: where their rows may lie
                                        ~   ~~~   ~~~~~~~~~~~~~~~
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.loading.rng import keyed_rng
from pipelines.loading.samplers import bucketed

#: Windows whose rows are kept shuffled.
KEPT = 3


class WindowOrder:
    """Endless order of one task's rows: each epoch all rows once, window after window.

    Args:
        rows: (shards,) rows of each shard.
        sizes: (shards,) bytes of each shard.
        batch: rows of a global batch.
        limit: bytes of the shards of a window; a window has one shard at least.
        key: seed and names that the order hangs on.
        lengths: gives the lengths of some rows, of which those of one shard stand together; none
            does without bucketing.
        window: batches within which rows are sorted by length.
        early: the first window grows shard by shard.
    """

    def __init__(
        self,
        rows: Sequence[int],
        sizes: Sequence[int],
        batch: int,
        limit: float,
        key: Sequence[int | str],
        lengths: Callable[[np.ndarray], np.ndarray | None] | None = None,
        window: int = 16,
        early: bool = False,
    ) -> None:
        self._rows, self._sizes = np.asarray(rows, np.int64), np.asarray(sizes, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._rows)])
        self._total = int(self._starts[-1])
        self._batch, self._limit, self._key = batch, limit, tuple(key)
        self._lengths, self._window, self._early = lengths, window, early
        self._layouts: dict[int, _Layout] = {}
        self._made: dict[tuple[int, int], np.ndarray] = {}

    def batch(self, occurrence: int) -> np.ndarray:
        """(batch,) row numbers of the task's occurrence-th batch."""
        parts = [
            self._shuffled(epoch, number)[begin:end]
            for epoch, number, begin, end in self._touched(occurrence)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def shards(self, occurrence: int) -> list[int]:
        """Shards of the windows that a batch takes rows from, in the order of their use."""
        found: dict[int, None] = {}
        for epoch, number, _, _ in self._touched(occurrence):
            found |= dict.fromkeys(self._layout(epoch).windows[number])
        return list(found)

    def ahead(self, occurrence: int) -> list[int]:
        """Shards that come after those of a batch: the next window's; in a window that grows, two
        of its own at least, and as many as there are."""
        epoch, number, _, _ = self._touched(occurrence)[-1]
        layout = self._layout(epoch)
        windows, here = layout.windows, number + 1
        if here < len(layout.growing):
            # Not all at once: those that are needed first would share the wire with the others.
            return windows[len(layout.growing) - 1][here : here + max(2, here)]
        return (
            windows[number + 1] if number + 1 < len(windows) else self._layout(epoch + 1).windows[0]
        )

    def largest(self) -> int:
        """Bytes of the shards that may be in use at once: those of two windows, or of all."""
        return int(min(2 * max(self._limit, int(self._sizes.max())), int(self._sizes.sum())))

    def _touched(self, occurrence: int) -> list[tuple[int, int, int, int]]:
        """(epoch, window, first row in it, end) of the windows that a batch takes rows from.

        Each part of a window that grows counts as one.
        """
        epoch, offset = divmod(occurrence * self._batch, self._total)
        missing, found = self._batch, []
        while missing:
            starts = self._layout(epoch).starts
            number = int(np.searchsorted(starts, offset, side="right")) - 1
            begin = offset - int(starts[number])
            end = min(int(starts[number + 1] - starts[number]), begin + missing)
            found.append((epoch, number, begin, end))
            missing -= end - begin
            offset += end - begin
            if offset == self._total:
                epoch, offset = epoch + 1, 0
        return found

    def _layout(self, epoch: int) -> "_Layout":
        if epoch not in self._layouts:
            for old in [known for known in self._layouts if known < epoch - 1]:
                del self._layouts[old]
            windows: list[list[int]] = [[]]
            held = 0
            for shard in keyed_rng(*self._key, "shards", epoch).permutation(len(self._rows)):
                if windows[-1] and held + self._sizes[shard] > self._limit:
                    windows.append([])
                    held = 0
                windows[-1].append(int(shard))
                held += int(self._sizes[shard])
            growing: list[np.ndarray] = []
            if self._early and epoch == 0:
                growing = self._grow(windows[0])
                windows[:1] = [windows[0][: number + 1] for number in range(len(growing))]
            rows = [len(part) for part in growing]
            rows += [int(self._rows[window].sum()) for window in windows[len(growing) :]]
            starts = np.concatenate([[0], np.cumsum(rows)])
            self._layouts[epoch] = _Layout(windows, starts, growing)
        return self._layouts[epoch]

    def _grow(self, shards: Sequence[int]) -> list[np.ndarray]:
        """Rows of the parts of a window that grows by these shards, one after the other."""
        random = keyed_rng(*self._key, "growing")
        waiting = [self._starts[s] + random.permutation(self._rows[s]) for s in shards]
        came, taken, parts = 0, 0, []
        for number, shard in enumerate(shards, 1):
            came += int(self._rows[shard])
            count = (came if number == len(shards) else came // 2) - taken
            taken += count
            # How many of each shard a draw of so many from all that wait would hit.
            here = [len(rows) for rows in waiting[:number]]
            hit = random.multivariate_hypergeometric(here, count)
            parts.append(np.concatenate([r[:n] for r, n in zip(waiting, hit, strict=False)]))
            waiting[:number] = [r[n:] for r, n in zip(waiting, hit, strict=False)]
        return parts

    def _shuffled(self, epoch: int, number: int) -> np.ndarray:
        """Rows of a window, or of a part of one that grows, in their order."""
        key = (epoch, number)
        if key not in self._made:
            layout = self._layout(epoch)
            if number < len(layout.growing):
                rows = layout.growing[number]
            else:
                shards = layout.windows[number]
                rows = np.concatenate(
                    [np.arange(self._starts[s], self._starts[s + 1]) for s in shards]
                )
            random = keyed_rng(*self._key, "window", epoch, number)
            place = random.permutation(len(rows))
            order = rows[place]
            lengths = self._lengths(rows) if self._lengths else None
            if lengths is not None:
                before = epoch * self._total + int(layout.starts[number])
                order = bucketed(order, lengths[place], before, self._batch, self._window, random)
            self._made[key] = order
            # A batch may stand on two windows, seldom on more; older ones are behind.
            while len(self._made) > KEPT:
                del self._made[next(iter(self._made))]
        return self._made[key]


@dataclass(frozen=True)
class _Layout:
    """An epoch.

    Args:
        windows: shards of each window, and of each part of one that grows.
        starts: (windows + 1,) rows before each.
        growing: rows of each part of a first window that grows.
    """

    windows: list[list[int]]
    starts: np.ndarray
    growing: list[np.ndarray]
