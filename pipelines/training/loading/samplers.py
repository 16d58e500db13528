"""Samplers of the task and the rows of each global step: pure functions of (seed, step).

They do not depend on the number of workers or on earlier steps, so resuming needs only the step.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from skillnet.keyed_random import keyed_rng

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
    """Sampler of the task of each step.

    Before the shuffling inside blocks of ``BLOCK`` steps, the count of a task is within one of its
    fraction after every step, so short runs get the configured fractions too.

    Args:
        weights: fraction per task, summing to 1.
        seed: start of the random numbers of the shuffling.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        # Sorted, so that the order of the tasks in a file has no effect.
        self.names: tuple[str, ...] = tuple(sorted(weights))
        self._shares = np.array([weights[name] for name in self.names])
        self._seed = seed
        self._tasks = np.zeros(0, dtype=np.int64)
        self._batch_indices = np.zeros(0, dtype=np.int64)

    def task_at(self, step: int) -> tuple[str, int]:
        """Return the task of a step, and the number of earlier steps of this task."""
        if step >= len(self._tasks):
            self._extend(max(step + 1, 2 * len(self._tasks), 64 * BLOCK))
        return self.names[self._tasks[step]], int(self._batch_indices[step])

    def count_steps(self, steps: int) -> dict[str, int]:
        """Return the number of steps of each task among the first ``steps``."""
        if steps:
            self.task_at(steps - 1)
        counts = np.bincount(self._tasks[:steps], minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def _extend(self, steps: int) -> None:
        blocks = -(-steps // BLOCK)
        counts = np.zeros(len(self.names))
        tasks = np.empty(blocks * BLOCK, dtype=np.int64)
        for step in range(len(tasks)):
            # The task that is furthest behind its fraction comes next.
            task = int(np.argmax((step + 1) * self._shares - counts))
            counts[task] += 1
            tasks[step] = task
        for block in range(blocks):
            part = tasks[block * BLOCK : (block + 1) * BLOCK]
            # Shuffling hides the regular pattern from the optimizer; the key is the block.
            keyed_rng(self._seed, "schedule", block).shuffle(part)
        batch_indices = np.empty_like(tasks)
        for task in range(len(self.names)):
            is_task = tasks == task
            batch_indices[is_task] = np.arange(int(is_task.sum()))
        self._tasks, self._batch_indices = tasks, batch_indices


class ShuffleSampler:
    """Endless order of one task's rows: a new permutation each epoch, cut into batches.

    A batch may cross the border of two epochs, so every row occurs once per epoch. Within windows
    of ``window`` batches rows are sorted by length, so that a batch has rows of similar length;
    the batches of a window are shuffled.

    Args:
        rows: rows of the split.
        batch: rows of a global batch.
        lengths: (rows,) length of each row for bucketing; a function that returns them at their
            first use; or None.
        key: seed and names that determine the order.
        window: batches in a window.
    """

    def __init__(
        self,
        rows: int,
        batch: int,
        lengths: np.ndarray | Callable[[], np.ndarray | None] | None,
        key: Sequence[int | str],
        window: int = 16,
    ) -> None:
        self._rows, self._batch, self._lengths = rows, batch, lengths
        self._key, self._window = tuple(key), window
        self._epochs: dict[int, np.ndarray] = {}

    def batch(self, batch_index: int, part: slice = slice(None)) -> np.ndarray:
        """Return the row numbers of one batch of the task, or of a part of it."""
        start = batch_index * self._batch
        epoch, offset = divmod(start, self._rows)
        parts: list[np.ndarray] = []
        missing = self._batch
        while missing:
            rows = self._epoch(epoch)[offset : offset + missing]
            parts.append(rows)
            missing -= len(rows)
            epoch, offset = epoch + 1, 0
        return (parts[0] if len(parts) == 1 else np.concatenate(parts))[part]

    def remaining(self, batch_index: int) -> np.ndarray:
        """Return the row numbers of a batch and of the rest of its epoch, in their order."""
        epoch, offset = divmod(batch_index * self._batch, self._rows)
        return self._epoch(epoch)[offset:]

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            # A batch may touch two epochs; older permutations are not needed again.
            for old in [known for known in self._epochs if known < epoch - 1]:
                del self._epochs[old]
            self._epochs[epoch] = self._permutation(epoch)
        return self._epochs[epoch]

    def _permutation(self, epoch: int) -> np.ndarray:
        random = keyed_rng(*self._key, epoch)
        order = random.permutation(self._rows)
        # Lengths of a remote corpus are read at the first batch, not when training starts.
        if callable(self._lengths):
            self._lengths = self._lengths()
        if self._lengths is None:
            return order
        lengths = self._lengths[order]
        return bucket_by_length(
            order, lengths, epoch * self._rows, self._batch, self._window, random
        )


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
