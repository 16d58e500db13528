"""Order of the rows of a task that is too large to be shuffled as a unit: windows of shards.

    epoch   shards in random order      3 0 | 4 1 | 2        windows of a fixed number of bytes
            rows of a window, shuffled  ~~~~~ ~~~~~ ~~~

The order is a pure function of (seed, batch index), as that of
:class:`pipelines.training.loading.samplers.ShuffleSampler`. A batch needs only the row numbers of
the windows that it touches, and the shards that come next are known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.training.loading.samplers import bucket_by_length
from skillnet.keyed_random import keyed_rng

#: Windows whose shuffled rows stay in memory.
MAX_SHUFFLED_WINDOWS = 3


class WindowedShuffleSampler:
    """Endless order of one task's rows: all rows once per epoch, window after window.

    Args:
        rows: (shards,) rows of each shard.
        sizes: (shards,) bytes of each shard.
        batch: rows of a global batch.
        limit: bytes of the shards of a window; a window has one shard at least.
        key: seed and names that determine the order.
        lengths: returns the lengths of some rows; the rows of one shard stand together. None
            turns bucketing off.
        window: batches within which rows are sorted by length.
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
    ) -> None:
        self._rows, self._sizes = np.asarray(rows, np.int64), np.asarray(sizes, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._rows)])
        self._total = int(self._starts[-1])
        self._batch, self._limit, self._key = batch, limit, tuple(key)
        self._lengths, self._window = lengths, window
        self._layouts: dict[int, _EpochLayout] = {}
        self._shuffled_windows: dict[tuple[int, int], np.ndarray] = {}

    def batch(self, batch_index: int, part: slice = slice(None)) -> np.ndarray:
        """Return the row numbers of one batch of the task, or of a part of it."""
        parts = [
            self._shuffled(epoch, window)[begin:end]
            for epoch, window, begin, end in self._touched(batch_index)
        ]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts))[part]

    def shards(self, batch_index: int) -> list[int]:
        """Return the shards of the windows that a batch reads, in the order of their use."""
        used: dict[int, None] = {}
        for epoch, window, _, _ in self._touched(batch_index):
            used |= dict.fromkeys(self._layout(epoch).windows[window])
        return list(used)

    def next_shards(self, batch_index: int) -> list[int]:
        """Return the shards of the window after those that a batch reads."""
        epoch, window, _, _ = self._touched(batch_index)[-1]
        windows = self._layout(epoch).windows
        # The last window of an epoch is followed by the first of the next epoch.
        if window + 1 < len(windows):
            return windows[window + 1]
        return self._layout(epoch + 1).windows[0]

    def max_open_bytes(self) -> int:
        """Return the bytes of shards that may be in use at once: two windows, or all shards."""
        return int(min(2 * max(self._limit, int(self._sizes.max())), int(self._sizes.sum())))

    def _touched(self, batch_index: int) -> list[tuple[int, int, int, int]]:
        """(epoch, window, first row in it, end) of the windows that a batch takes rows from."""
        epoch, offset = divmod(batch_index * self._batch, self._total)
        missing, touched = self._batch, []
        while missing:
            starts = self._layout(epoch).starts
            window = int(np.searchsorted(starts, offset, side="right")) - 1
            begin = offset - int(starts[window])
            end = min(int(starts[window + 1] - starts[window]), begin + missing)
            touched.append((epoch, window, begin, end))
            missing -= end - begin
            offset += end - begin
            if offset == self._total:
                epoch, offset = epoch + 1, 0
        return touched

    def _layout(self, epoch: int) -> "_EpochLayout":
        if epoch not in self._layouts:
            for old in [known for known in self._layouts if known < epoch - 1]:
                del self._layouts[old]
            windows: list[list[int]] = [[]]
            filled = 0
            for shard in keyed_rng(*self._key, "shards", epoch).permutation(len(self._rows)):
                if windows[-1] and filled + self._sizes[shard] > self._limit:
                    windows.append([])
                    filled = 0
                windows[-1].append(int(shard))
                filled += int(self._sizes[shard])
            rows = [int(self._rows[window].sum()) for window in windows]
            self._layouts[epoch] = _EpochLayout(windows, np.concatenate([[0], np.cumsum(rows)]))
        return self._layouts[epoch]

    def _shuffled(self, epoch: int, window: int) -> np.ndarray:
        """Rows of a window in their order."""
        key = (epoch, window)
        if key not in self._shuffled_windows:
            layout = self._layout(epoch)
            rows = np.concatenate(
                [
                    np.arange(self._starts[shard], self._starts[shard + 1])
                    for shard in layout.windows[window]
                ]
            )
            random = keyed_rng(*self._key, "window", epoch, window)
            permutation = random.permutation(len(rows))
            order = rows[permutation]
            lengths = self._lengths(rows) if self._lengths else None
            if lengths is not None:
                before = epoch * self._total + int(layout.starts[window])
                order = bucket_by_length(
                    order, lengths[permutation], before, self._batch, self._window, random
                )
            self._shuffled_windows[key] = order
            # A batch may touch two windows, rarely more; older windows are not needed again.
            while len(self._shuffled_windows) > MAX_SHUFFLED_WINDOWS:
                del self._shuffled_windows[next(iter(self._shuffled_windows))]
        return self._shuffled_windows[key]


@dataclass(frozen=True)
class _EpochLayout:
    """Windows of one epoch.

    Args:
        windows: shards of each window.
        starts: (windows + 1,) rows before each window.
    """

    windows: list[list[int]]
    starts: np.ndarray
