"""The mixed stream: global batches of five modalities as a pure function of (seed, step).

A step has one task, so that all workers activate the same skills. A worker takes its slice of
the global batch; the order, the captions, the augmentation hang on (seed, step, row) and so on
no number of workers, and going on needs only the step.
"""

import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipelines.config.data import AugmentConfig, MaskConfig
from pipelines.config.run import TaskTraining
from pipelines.loading.augment import Draws
from pipelines.loading.samplers import RowOrder, TaskSampler, task_weights
from pipelines.loading.shard_table import HeldRows
from pipelines.loading.task_dataset import TaskRows
from pipelines.loading.window_sampler import WindowOrder
from skillnet.config import SkillNetConfig
from skillnet.skills import find_task
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from pipelines.shards.dataset import PreparedCorpus


@dataclass(frozen=True)
class StepPlan:
    """Task, its how-manieth batch, and the (global batch,) row numbers of a step."""

    task: str
    occurrence: int
    rows: np.ndarray


@dataclass
class Batch:
    """One rank's part of a global batch.

    Args:
        task: name of the task.
        towers: tower -> tensors that the model reads.
        targets: ``labels`` (B,), or ``symbols`` (B, L) and ``symbol_lengths`` (B,), or
            ``groups`` (B,), or ``masked`` (B, T) and what stood there, ``values`` (M, …).
        rows: (B,) row numbers in the split.
        global_rows: rows of all ranks.
        ghost: this rank has no rows of its own; it computes the first row of the batch, whose
            loss counts nothing, so that it takes part in all exchanges.
    """

    task: str
    towers: dict[str, dict[str, Tensor]]
    targets: dict[str, Tensor]
    rows: np.ndarray
    global_rows: int
    ghost: bool = False

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "Batch":
        """The batch on a device, its floats in ``dtype``."""
        if device.type == "cpu" and dtype == torch.float32:
            return self

        def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                key: x.to(device, dtype if x.is_floating_point() else None, non_blocking=True)
                for key, x in tensors.items()
            }

        towers = {name: move(tensors) for name, tensors in self.towers.items()}
        return Batch(self.task, towers, move(self.targets), self.rows, self.global_rows, self.ghost)


def rank_slice(count: int, rank: int, world: int) -> slice:
    """Rows of a rank: the first ``count % world`` ranks have one more, as np.array_split."""
    base, more = divmod(count, world)
    start = rank * base + min(rank, more)
    return slice(start, start + base + (rank < more))


class MultiTaskDataLoader:
    """Global batches of all tasks of a run.

    Args:
        corpora: corpus name -> opened corpus.
        tasks: task name -> how it takes part.
        model: shape of the model; its tasks name the towers.
        seed: of order, captions and augmentation.
        augmentation: random changes; none for rows as they are.
        temperature: over the rows of tasks without a weight.
        masks: what masked tasks hide.
        shuffle: bytes of shards up to which a task's rows are shuffled whole; beyond, in windows
            of so many bytes.

    Raises:
        UserError: an unknown task, a corpus that is missing or of the wrong kind.
    """

    def __init__(
        self,
        corpora: Mapping[str, "PreparedCorpus"],
        tasks: Mapping[str, TaskTraining],
        model: SkillNetConfig,
        seed: int,
        augmentation: AugmentConfig | None = None,
        temperature: float = 2.0,
        masks: MaskConfig | None = None,
        shuffle: float = float("inf"),
    ) -> None:
        if not tasks:
            raise UserError("no task to train: name at least one under tasks")
        self.seed, self.tasks, self._augmentation = seed, dict(tasks), augmentation
        self.rows: dict[str, TaskRows] = {}
        self._orders: dict[str, RowOrder | WindowOrder] = {}
        for name, settings in tasks.items():
            task, corpus = find_task(name, model.tasks), corpora[settings.corpus]
            rows = TaskRows(name, task, corpus, model, settings, masks)
            self.rows[name] = rows
            key = (seed, "order", name)
            self._orders[name] = _order(rows, settings.batch_size, key, shuffle)
        self.weights = task_weights(
            {name: settings.weight for name, settings in tasks.items()},
            {name: rows.count for name, rows in self.rows.items()},
            temperature,
        )
        self._schedule = TaskSampler(self.weights, seed)

    def plan(self, step: int) -> StepPlan:
        """Task and rows of the global batch of a step."""
        task, occurrence = self._schedule.at(step)
        return StepPlan(task, occurrence, self._orders[task].batch(occurrence))

    def bytes_in_use(self) -> int:
        """Bytes of shards in a store that are needed on this machine at once, at most."""
        sizes: dict[tuple[str, str], int] = {}
        for name, rows in self.rows.items():
            if rows.held.remote:
                order, whole = self._orders[name], sum(rows.held.bytes)
                size = order.largest() if isinstance(order, WindowOrder) else whole
                # Tasks that read the same rows whole share the files.
                sizes[rows.where, name if size < whole else ""] = size
        return sum(sizes.values())

    def counts(self, steps: int) -> dict[str, int]:
        """Steps that each task gets of the first ``steps``."""
        return self._schedule.counts(steps)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """A rank's part of the global batch of a step."""
        plan = self.plan(step)
        follow(self._orders[plan.task], self.rows[plan.task].held, plan.occurrence)
        mine = rank_slice(len(plan.rows), rank, world)
        ghost = mine.stop == mine.start
        if ghost:
            mine = slice(0, 1)
        draws = Draws((self.seed, "rows", step), len(plan.rows), mine)
        rows = plan.rows[mine]
        towers, targets = self.rows[plan.task].load(rows, draws, self._augmentation)
        return Batch(plan.task, towers, targets, rows, len(plan.rows), ghost)


def follow(order: RowOrder | WindowOrder, held: HeldRows, occurrence: int) -> None:
    """Have the shards at hand that a batch is taken from, and the next ones on their way.

    Raises:
        UserError, StoreUnavailable: see :meth:`HeldRows.hold`.
    """
    if isinstance(order, WindowOrder):
        held.hold(order.shards(occurrence), order.ahead(occurrence))
    elif held.remote:
        # The batch opens its own.
        held.fetch(order.coming(occurrence))


def _order(
    rows: TaskRows, batch: int, key: tuple[int | str, ...], shuffle: float
) -> RowOrder | WindowOrder:
    held = rows.held
    if sum(held.bytes) > shuffle and len(held.bytes) > 1:
        return WindowOrder(held.rows, held.bytes, batch, shuffle, key, rows.lengths)
    if held.remote:
        return RowOrder(rows.count, batch, rows.lengths, key)
    # On a disk opening costs nothing, and what is missing is best found now.
    held.hold()
    return RowOrder(rows.count, batch, rows.lengths(), key)


class Prefetcher:
    """Batches of steps ``start`` to ``stop``, made ahead by a thread.

    Close it, or leave its ``with`` block, to end the thread. An error in the thread is raised
    where the batch is asked for.
    """

    def __init__(
        self,
        stream: MultiTaskDataLoader,
        start: int,
        stop: int,
        rank: int = 0,
        world: int = 1,
        depth: int = 4,
        pin: bool = False,
    ) -> None:
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._args = (stream, start, stop, rank, world, pin)
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        stream, start, stop, rank, world, pin = self._args
        # One thread: the compute threads belong to the model.
        torch.set_num_threads(1)
        try:
            for step in range(start, stop):
                batch = stream.batch(step, rank, world)
                if pin:
                    for tensors in (*batch.towers.values(), batch.targets):
                        tensors.update({key: x.pin_memory() for key, x in tensors.items()})
                if not self._put(batch):
                    return
            self._put(None)
        except BaseException as problem:
            self._put(problem)

    def _put(self, item: Batch | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Batch]:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
