"""Samplers of the task and the rows of each global step: pure functions of (seed, step).

They do not depend on the number of workers or on earlier steps, so resuming needs only the step.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from skillnet.keyed_random import keyed_rng

if TYPE_CHECKING:
    from pipelines.training.loading.task_columns import ShardTable

#: Returns the (B,) lengths of (B,) rows; None for rows of one length.
RowLengths = Callable[[np.ndarray], np.ndarray | None]
#: Steps in a block: the counts of the tasks follow their weights, and their order is shuffled.
BLOCK = 20


def compute_task_weights(
    weights: Mapping[str, float | None], rows: Mapping[str, int], temperature: float
) -> dict[str, float]:
    """Return the fraction of the steps per task, summing to 1.

    Tasks with a weight keep it relative to each other. Tasks without get
    ``rows ** (1 / temperature)``, scaled to the mean of the given weights.

    Args:
        weights: task -> weight, or None.
        rows: task -> number of rows.
        temperature: 1 is proportional to the rows; larger values are more even.
    """
    free = [name for name, weight in weights.items() if weight is None]
    sizes = {name: float(rows[name]) ** (1.0 / temperature) for name in free}
    given = [weight for weight in weights.values() if weight is not None]
    scale = sum(given) / len(given) if given else 1.0
    mean_size = sum(sizes.values()) / len(sizes) if sizes else 1.0
    raw = {
        name: weight if weight is not None else scale * sizes[name] / mean_size
        for name, weight in weights.items()
    }
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items()}


class TaskSampler:
    """Sampler of the task of each batch.

    Before the shuffling inside blocks of ``BLOCK`` steps, the count of a task is within one of its
    fraction after every step, so short runs get the configured fractions too.

    A step has a batch for each lane: batch ``step * lanes + lane``. A lane has few tasks for the
    whole run, so that the ranks of a lane need only their weights. The fractions of all tasks stand
    one after the other, and are cut into lanes of equal length (the rule of McNaughton 1959)::

        a    ██████             lane 0: a
        b          ████████     lane 0: b, lane 1: b
        c                  ██   lane 1: c
             lane 0 ┃ lane 1

    Args:
        weights: fraction per task, summing to 1.
        seed: start of the random numbers of the shuffling.
        lanes: batches of a step.
    """

    def __init__(self, weights: Mapping[str, float], seed: int, lanes: int = 1) -> None:
        # Sorted, so that the order of the tasks in a file has no effect.
        self.names: tuple[str, ...] = tuple(sorted(weights))
        self._shares = _cut_lanes(np.array([weights[name] for name in self.names]), lanes)
        self._seed = seed
        self._tasks = np.zeros(0, dtype=np.int64)
        self._batch_indices = np.zeros(0, dtype=np.int64)

    @property
    def lanes(self) -> list[set[str]]:
        """Tasks of each lane."""
        return [{self.names[task] for task in np.flatnonzero(each)} for each in self._shares]

    def task_at(self, number: int) -> tuple[str, int]:
        """Return the task of a batch, and the number of earlier batches of this task."""
        if number >= len(self._tasks):
            steps = number // len(self._shares) + 1
            self._extend(max(steps, 2 * len(self._tasks) // len(self._shares), 64 * BLOCK))
        return self.names[self._tasks[number]], int(self._batch_indices[number])

    def count_steps(self, steps: int) -> dict[str, int]:
        """Return the number of batches of each task among the first ``steps`` steps."""
        numbers = steps * len(self._shares)
        if numbers:
            self.task_at(numbers - 1)
        counts = np.bincount(self._tasks[:numbers], minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def _extend(self, steps: int) -> None:
        blocks = -(-steps // BLOCK)
        table = np.empty((blocks * BLOCK, len(self._shares)), dtype=np.int64)
        for lane, shares in enumerate(self._shares):
            counts = np.zeros(len(self.names))
            for step in range(len(table)):
                # The task that is furthest behind its fraction comes next.
                task = int(np.argmax((step + 1) * shares - counts))
                counts[task] += 1
                table[step, lane] = task
            for block in range(blocks):
                part = table[block * BLOCK : (block + 1) * BLOCK, lane]
                # Shuffling hides the regular pattern from the optimizer; the key is the block.
                keyed_rng(self._seed, "schedule", block, *([lane] if lane else [])).shuffle(part)
        tasks = table.ravel()
        batch_indices = np.empty_like(tasks)
        for task in range(len(self.names)):
            is_task = tasks == task
            batch_indices[is_task] = np.arange(int(is_task.sum()))
        self._tasks, self._batch_indices = tasks, batch_indices


def _cut_lanes(shares: np.ndarray, lanes: int) -> list[np.ndarray]:
    """Return the fraction of each task in each lane, summing to 1 in a lane."""
    if lanes == 1:
        return [shares]
    ends, cuts = np.cumsum(shares), np.linspace(0, 1, lanes + 1)
    cut = [
        np.minimum(ends, stop) - np.maximum(ends - shares, start)
        for start, stop in itertools.pairwise(cuts)
    ]
    # Rounding must not bring a task into a lane.
    kept = [np.where(part > 1e-9, part, 0) for part in cut]
    return [part / part.sum() for part in kept]


def bucket_by_length(
    order: np.ndarray,
    lengths: np.ndarray,
    before: int,
    batch: int,
    window: int,
    random: np.random.Generator,
) -> np.ndarray:
    """Reorder shuffled rows so that each batch has rows of similar length.

    Args:
        order: (rows,) shuffled row numbers.
        lengths: (rows,) lengths of these rows.
        before: number of rows before them, which determines where batches begin.
        batch: rows of a batch.
        window: batches within which rows are sorted.
        random: generator that shuffled the rows; it then shuffles the batches.

    Returns:
        (rows,) row numbers.
    """
    # The first rows complete the batch that the rows before began.
    head = -before % batch
    parts = [order[:head]]
    for start in range(head, len(order), window * batch):
        span = slice(start, start + window * batch)
        rows = order[span][np.argsort(lengths[span], kind="stable")]
        full = len(rows) // batch
        rest = len(rows) - full * batch
        # The partial batch must come last; a random cut avoids that it always has the longest rows.
        cut = int(random.integers(full + 1)) * batch
        tail, rows = rows[cut : cut + rest], np.delete(rows, slice(cut, cut + rest))
        parts.append(rows.reshape(full, batch)[random.permutation(full)].ravel())
        parts.append(tail)
    return np.concatenate(parts)


class ShuffleSampler:
    """Endless order of one task's rows: a new permutation each epoch, cut into batches.

    A batch may cross the border of two epochs, so every row occurs once per epoch. Among
    ``bucket`` batches rows are sorted by length, so that a batch has rows of similar length; these
    batches are shuffled. Subclasses divide an epoch into windows, and shuffle each of them.

    Args:
        rows: rows of the split.
        batch: rows of a global batch.
        key: seed and names that determine the order.
        lengths: returns the lengths of some rows, or None, which turns bucketing off. It is called
            at the first batch, so that training starts before a remote corpus is read.
        bucket: batches within which rows are sorted by length.
    """

    #: Shuffled windows in memory: a batch may touch two, rarely more.
    kept_windows = 2

    def __init__(
        self,
        rows: int,
        batch: int,
        key: Sequence[int | str],
        lengths: RowLengths | None = None,
        bucket: int = 16,
    ) -> None:
        self._total, self._batch, self._key = rows, batch, tuple(key)
        self._lengths, self._bucket = lengths, bucket
        self._shuffled_windows: dict[tuple[int, int], np.ndarray] = {}

    def batch(self, batch_index: int, part: slice = slice(None)) -> np.ndarray:
        """Return the row numbers of one batch of the task, or of a part of it."""
        parts = [
            self._shuffled(epoch, window)[begin:end]
            for epoch, window, begin, end in self._touched(batch_index)
        ]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts))[part]

    def open_shards(self, table: "ShardTable", batch_index: int, part: slice = slice(None)) -> None:
        """Open the shards of a batch, or of a part of it, and fetch those that follow.

        Args:
            table: shards of the rows.
            batch_index: number of the batch of the task.
            part: rows of the batch that this rank reads.
        """
        # Loading the batch opens its own shards.
        if table.is_remote:
            epoch, window, begin, _ = self._touched(batch_index)[0]
            table.prefetch(self._shuffled(epoch, window)[begin:])

    def max_open_bytes(self) -> float:
        """Return the bytes of shards that may be in use at once."""
        return math.inf

    def _starts(self, epoch: int) -> np.ndarray:
        """(windows + 1,) rows before each window of an epoch."""
        return np.array([0, self._total])

    def _list_rows(self, epoch: int, window: int) -> tuple[np.ndarray, tuple[int | str, ...]]:
        """Return the rows of a window, and the key of their order."""
        return np.arange(self._total), (*self._key, epoch)

    def _touched(self, batch_index: int) -> list[tuple[int, int, int, int]]:
        """(epoch, window, first row in it, end) of the windows that a batch takes rows from."""
        epoch, offset = divmod(batch_index * self._batch, self._total)
        missing, touched = self._batch, []
        while missing:
            starts = self._starts(epoch)
            window = int(np.searchsorted(starts, offset, side="right")) - 1
            begin = offset - int(starts[window])
            end = min(int(starts[window + 1] - starts[window]), begin + missing)
            touched.append((epoch, window, begin, end))
            missing -= end - begin
            offset += end - begin
            if offset == self._total:
                epoch, offset = epoch + 1, 0
        return touched

    def _shuffled(self, epoch: int, window: int) -> np.ndarray:
        """Rows of a window in their order."""
        place = (epoch, window)
        if place not in self._shuffled_windows:
            rows, key = self._list_rows(epoch, window)
            random = keyed_rng(*key)
            permutation = random.permutation(len(rows))
            order = rows[permutation]
            lengths = self._lengths(rows) if self._lengths else None
            if lengths is not None:
                before = epoch * self._total + int(self._starts(epoch)[window])
                order = bucket_by_length(
                    order, lengths[permutation], before, self._batch, self._bucket, random
                )
            self._shuffled_windows[place] = order
            while len(self._shuffled_windows) > self.kept_windows:
                del self._shuffled_windows[next(iter(self._shuffled_windows))]
        return self._shuffled_windows[place]


class WindowedShuffleSampler(ShuffleSampler):
    """Endless order of one task's rows: all rows once per epoch, window after window.

    Args:
        rows: (shards,) rows of each shard.
        sizes: (shards,) bytes of each shard.
        batch: rows of a global batch.
        limit: bytes of the shards of a window; a window has one shard at least.
        key: seed and names that determine the order.
        lengths: returns the lengths of some rows; the rows of one shard stand together. None
            turns bucketing off.
        bucket: batches within which rows are sorted by length.
    """

    kept_windows = 3

    def __init__(
        self,
        rows: Sequence[int] | np.ndarray,
        sizes: Sequence[int] | np.ndarray,
        batch: int,
        limit: float,
        key: Sequence[int | str],
        lengths: RowLengths | None = None,
        bucket: int = 16,
    ) -> None:
        super().__init__(int(np.sum(rows)), batch, key, lengths, bucket)
        self._rows, self._sizes = np.asarray(rows, np.int64), np.asarray(sizes, np.int64)
        self._first_rows = np.concatenate([[0], np.cumsum(self._rows)])
        self._limit = limit
        #: Epoch -> its order of shards, the shards before each window, and the rows.
        self._layouts: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def open_shards(self, table: "ShardTable", batch_index: int, part: slice = slice(None)) -> None:
        """Open the shards of a batch, and fetch those that follow."""
        table.open(self.shards(batch_index), self.next_shards(batch_index))

    def shards(self, batch_index: int) -> list[int]:
        """Return the shards of the windows that a batch reads, in the order of their use."""
        used: dict[int, None] = {}
        for epoch, window, _, _ in self._touched(batch_index):
            used |= dict.fromkeys(self._window(epoch, window).tolist())
        return list(used)

    def next_shards(self, batch_index: int) -> list[int]:
        """Return the shards of the window after those that a batch reads."""
        epoch, window, _, _ = self._touched(batch_index)[-1]
        # The last window of an epoch is followed by the first of the next epoch.
        if window + 2 == len(self._starts(epoch)):
            epoch, window = epoch + 1, -1
        following: list[int] = self._window(epoch, window + 1).tolist()
        return following

    def max_open_bytes(self) -> float:
        """Return the bytes of shards that may be in use at once: two windows, or all shards."""
        return min(2 * max(self._limit, int(self._sizes.max())), int(self._sizes.sum()))

    def _starts(self, epoch: int) -> np.ndarray:
        return self._layout(epoch)[2]

    def _list_rows(self, epoch: int, window: int) -> tuple[np.ndarray, tuple[int | str, ...]]:
        firsts = self._first_rows
        rows = [np.arange(firsts[n], firsts[n + 1]) for n in self._window(epoch, window)]
        return np.concatenate(rows), (*self._key, "window", epoch, window)

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """(shards,) shards of a window."""
        order, ends, _ = self._layout(epoch)
        found: np.ndarray = order[ends[window] : ends[window + 1]]
        return found

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if epoch not in self._layouts:
            for old in [known for known in self._layouts if known < epoch - 1]:
                del self._layouts[old]
            order = keyed_rng(*self._key, "shards", epoch).permutation(len(self._rows))
            filled = np.concatenate([[0], np.cumsum(self._sizes[order])])
            ends = [0]
            while ends[-1] < len(order):
                # As many shards as the limit allows, one at least.
                most = min(filled[ends[-1]] + self._limit, filled[-1])
                end = int(np.searchsorted(filled, most, side="right")) - 1
                ends.append(max(end, ends[-1] + 1))
            rows = np.concatenate([[0], np.cumsum(self._rows[order])])[ends]
            self._layouts[epoch] = order, np.array(ends), rows
        return self._layouts[epoch]


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
            :class:`pipelines.training.loading.samplers.WindowedShuffleSampler`.
    """

    def __init__(
        self,
        rows: Sequence[int] | np.ndarray,
        sizes: Sequence[int] | np.ndarray,
        batch: int,
        groups: int,
        limit: float,
        key: Sequence[int | str],
        lengths: RowLengths | None = None,
    ) -> None:
        rows, sizes = np.asarray(rows, np.int64), np.asarray(sizes, np.int64)
        starts = np.cumsum(rows) - rows
        self._share = batch // groups
        self.groups = divide_shards(rows, groups, key)
        self._numbers = [_GroupRows(starts[group], rows[group]) for group in self.groups]
        self._samplers = [
            WindowedShuffleSampler(
                rows[group],
                sizes[group],
                self._share,
                limit / groups,
                (*key, "group", number),
                lengths and partial(_lengths_of, lengths, self._numbers[number]),
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
            [self._numbers[number](self._samplers[number].batch(batch_index)) for number in numbers]
        )
        start, stop, _ = part.indices(self._share * len(self.groups))
        before = numbers.start * self._share
        return rows[start - before : stop - before]

    def open_shards(self, table: "ShardTable", batch_index: int, part: slice = slice(None)) -> None:
        """Open the shards of a part of a batch, and fetch those that follow."""
        table.open(self.shards(batch_index, part), self.next_shards(batch_index, part))

    def shards(self, batch_index: int, part: slice = slice(None)) -> list[int]:
        """Return the shards of the windows that a part of a batch reads."""
        return [
            int(shard)
            for number in self._groups_of(part)
            for shard in self.groups[number][self._samplers[number].shards(batch_index)]
        ]

    def next_shards(self, batch_index: int, part: slice = slice(None)) -> list[int]:
        """Return the shards of the windows after those that a part of a batch reads."""
        return [
            int(shard)
            for number in self._groups_of(part)
            for shard in self.groups[number][self._samplers[number].next_shards(batch_index)]
        ]

    def max_open_bytes(self) -> float:
        """Return the bytes of shards that may be in use at once on a node that reads all groups."""
        return sum(sampler.max_open_bytes() for sampler in self._samplers)

    def _groups_of(self, part: slice) -> range:
        start, stop, _ = part.indices(self._share * len(self.groups))
        return range(start // self._share, -(-stop // self._share))


class _GroupRows:
    """Row numbers of a group among all rows, from its rows in the order of its shards.

    Args:
        starts: (shards,) rows before each shard of the group.
        rows: (shards,) rows of each.
    """

    def __init__(self, starts: np.ndarray, rows: np.ndarray) -> None:
        self._own_starts = np.cumsum(rows) - rows
        self._offsets = starts - self._own_starts

    def __call__(self, rows_N: np.ndarray) -> np.ndarray:
        """Return the (N,) numbers of (N,) rows of the group."""
        shards_N = np.searchsorted(self._own_starts, rows_N, side="right") - 1
        found: np.ndarray = rows_N + self._offsets[shards_N]
        return found


def divide_shards(
    rows: Sequence[int] | np.ndarray, groups: int, key: Sequence[int | str]
) -> list[np.ndarray]:
    """Divide shards into groups with about equal numbers of rows.

    Args:
        rows: (shards,) rows of each shard.
        groups: number of groups.
        key: seed and names; equal keys give equal groups.

    Returns:
        The sorted (shards,) numbers of the shards of each group.
    """
    sizes = np.asarray(rows, np.int64)
    order = keyed_rng(*key, "groups").permutation(len(sizes))
    # The largest shard goes to the smallest group; the shuffled order decides between equals.
    order = order[np.argsort(-sizes[order], kind="stable")]
    group_of = np.empty(len(sizes), np.int64)
    # Rows, shards and number of each group.
    smallest = [(0, 0, group) for group in range(groups)]
    for shard in order:
        filled, count, group = smallest[0]
        group_of[shard] = group
        heapq.heapreplace(smallest, (filled + int(sizes[shard]), count + 1, group))
    by_group = np.argsort(group_of, kind="stable")
    return np.split(by_group, np.cumsum(np.bincount(group_of, minlength=groups))[:-1])


def _lengths_of(lengths: RowLengths, numbers: _GroupRows, rows: np.ndarray) -> np.ndarray | None:
    return lengths(numbers(rows))
