"""Which task and which rows each global step takes: pure functions of (seed, step).

Nothing here depends on the number of workers or on what ran before, so resuming needs only
the step.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pipelines.loading.rng import keyed_rng

#: Steps within which the tasks' counts follow their weights; their order inside is shuffled.
BLOCK = 20


def task_weights(
    weights: Mapping[str, float | None], rows: Mapping[str, int], temperature: float
) -> dict[str, float]:
    """Share of the steps per task, summing to 1.

    Tasks with a weight keep it relative to each other; those without share
    ``rows ** (1 / temperature)``, scaled to the mean of the given ones.
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
    """Task of each step and how often it has occurred before.

    After every step the count of a task is within one of its share, before shuffling inside
    blocks of ``BLOCK`` steps; so short runs get the shares they ask for.

    Args:
        weights: share per task, summing to 1.
        seed: of the shuffling.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        # Sorted: the order in which a file names the tasks does not count.
        self.names: tuple[str, ...] = tuple(sorted(weights))
        self._shares = np.array([weights[name] for name in self.names])
        self._seed = seed
        self._tasks = np.zeros(0, dtype=np.int64)
        self._occurrences = np.zeros(0, dtype=np.int64)

    def at(self, step: int) -> tuple[str, int]:
        """(task name, occurrence) of a step; the first occurrence of a task is 0."""
        if step >= len(self._tasks):
            self._extend(max(step + 1, 2 * len(self._tasks), 64 * BLOCK))
        return self.names[self._tasks[step]], int(self._occurrences[step])

    def counts(self, steps: int) -> dict[str, int]:
        """How often each task occurs in the first ``steps`` steps."""
        if steps:
            self.at(steps - 1)
        found = np.bincount(self._tasks[:steps], minlength=len(self.names))
        return dict(zip(self.names, found.tolist(), strict=True))

    def _extend(self, steps: int) -> None:
        blocks = -(-steps // BLOCK)
        counts = np.zeros(len(self.names))
        tasks = np.empty(blocks * BLOCK, dtype=np.int64)
        for step in range(len(tasks)):
            task = int(np.argmax((step + 1) * self._shares - counts))
            counts[task] += 1
            tasks[step] = task
        for block in range(blocks):
            part = tasks[block * BLOCK : (block + 1) * BLOCK]
            keyed_rng(self._seed, "schedule", block).shuffle(part)
        occurrences = np.empty_like(tasks)
        for task in range(len(self.names)):
            mine = tasks == task
            occurrences[mine] = np.arange(int(mine.sum()))
        self._tasks, self._occurrences = tasks, occurrences


class RowOrder:
    """Endless order of one task's rows: a fresh permutation each epoch, cut into batches.

    Batches are cut across the border of two epochs, so every row comes once an epoch and none
    is lost. Within windows of ``window`` batches rows are sorted by length, so that a batch
    holds rows of like length; the batches of a window come in random order.

    Args:
        rows: rows of the split.
        batch: rows of a global batch.
        lengths: (rows,) length of each row for bucketing, what gives them when they are first
            needed, or none.
        key: seed and names that the order hangs on.
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

    def batch(self, occurrence: int) -> np.ndarray:
        """(batch,) row numbers of the task's occurrence-th batch."""
        start = occurrence * self._batch
        epoch, offset = divmod(start, self._rows)
        parts: list[np.ndarray] = []
        missing = self._batch
        while missing:
            part = self._epoch(epoch)[offset : offset + missing]
            parts.append(part)
            missing -= len(part)
            epoch, offset = epoch + 1, 0
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def coming(self, occurrence: int) -> np.ndarray:
        """Row numbers of a batch and of the rest of its epoch, in their order."""
        epoch, offset = divmod(occurrence * self._batch, self._rows)
        return self._epoch(epoch)[offset:]

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            for old in [known for known in self._epochs if known < epoch - 1]:
                del self._epochs[old]
            self._epochs[epoch] = self._permutation(epoch)
        return self._epochs[epoch]

    def _permutation(self, epoch: int) -> np.ndarray:
        random = keyed_rng(*self._key, epoch)
        order = random.permutation(self._rows)
        if callable(self._lengths):
            self._lengths = self._lengths()
        if self._lengths is None:
            return order
        lengths = self._lengths[order]
        return bucketed(order, lengths, epoch * self._rows, self._batch, self._window, random)


def bucketed(
    order: np.ndarray,
    lengths: np.ndarray,
    before: int,
    batch: int,
    window: int,
    random: np.random.Generator,
) -> np.ndarray:
    """Shuffled rows brought into an order whose batches hold rows of like length.

    Args:
        order: (rows,) shuffled.
        lengths: (rows,) of these rows.
        before: rows that came before them, so that it is known where batches begin.
        batch: rows of a batch.
        window: batches within which rows are sorted.
        random: what has shuffled them; goes on with their batches.
    """
    # The first rows fill up the batch that the rows before left unfinished.
    head = -before % batch
    parts = [order[:head]]
    for start in range(head, len(order), window * batch):
        span = slice(start, start + window * batch)
        rows = order[span][np.argsort(lengths[span], kind="stable")]
        whole = len(rows) // batch
        rest = len(rows) - whole * batch
        # The unfinished batch has to come last, and is not always the longest one.
        cut = int(random.integers(whole + 1)) * batch
        tail, rows = rows[cut : cut + rest], np.delete(rows, slice(cut, cut + rest))
        parts.append(rows.reshape(whole, batch)[random.permutation(whole)].ravel())
        parts.append(tail)
    return np.concatenate(parts)
