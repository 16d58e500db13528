"""Data loader of all tasks: global batches as a pure function of (seed, number of the batch).

Each batch has one task, so that all its workers activate the same skills. A worker takes its slice
of the global batch. Order, captions and augmentation depend on (seed, number, row) and not on the
number of workers, and resuming needs only the step. The number of a batch is the step; with
``training.tasks_per_step`` it is that of its lane, see
:class:`pipelines.training.loading.samplers.TaskSampler`.

:func:`prefetch_batches` loads them ahead of the training, in a thread or in processes. A thread
costs nothing and suffices beside a CPU. It shares Python's lock with the training, which launches
thousands of operations a step on a GPU; processes do not.
"""

import contextlib
import functools
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipelines.data.io.media import OrderedPrefetcher
from pipelines.data.shards.folds import select_label_fraction
from pipelines.data.shards.row_threads import limit_row_threads
from pipelines.training.config.data import AugmentConfig, MaskConfig
from pipelines.training.config.run import TaskTraining
from pipelines.training.loading.pixel_changes import PixelChanges, apply_changes
from pipelines.training.loading.samplers import (
    GroupedShuffleSampler,
    ShuffleSampler,
    TaskSampler,
    WindowedShuffleSampler,
    compute_task_weights,
)
from pipelines.training.loading.task_columns import resolve_splits
from pipelines.training.loading.task_dataset import TaskDataset
from skillnet.config import SkillNetConfig
from skillnet.keyed_random import BatchRandom, keyed_rng
from skillnet.objectives.base import find_objective
from skillnet.skills import Task, find_task
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from pipelines.data.shards.dataset import PreparedCorpus

RowSampler = ShuffleSampler | GroupedShuffleSampler


@dataclass(frozen=True)
class BatchSpec:
    """Task and rows of one step.

    Args:
        task: name of the task.
        batch_index: number of earlier batches of this task.
        rows: (global batch,) row numbers in the split.
    """

    task: str
    batch_index: int
    rows: np.ndarray


@dataclass
class Batch:
    """One rank's part of a global batch.

    Args:
        task: name of the task.
        towers: tower -> input tensors of the model.
        targets: ``labels`` (B,), or ``symbols`` (B, L) and ``symbols_lengths`` (B,), or
            ``groups`` (B,), or ``masked`` (B, T) and the masked ``values`` (M, …).
        rows: (B,) row numbers in the split.
        global_rows: rows of all ranks.
        is_padding: the global batch has no row for this rank. The rank computes the first row,
            with a loss of zero weight, so that it takes part in all collective operations.
        masked_counts: (B,) masked tokens of each row, in memory of the host; None without masks.
        changes: tower -> change of its pixels that is not applied yet.
        first_row: position of the first row in the global batch.
        seed: start of the random draws for the global batch, equal on all ranks.
    """

    task: str
    towers: dict[str, dict[str, Tensor]]
    targets: dict[str, Tensor]
    rows: np.ndarray
    global_rows: int
    is_padding: bool = False
    masked_counts: np.ndarray | None = None
    changes: PixelChanges = field(default_factory=dict)
    first_row: int = 0
    seed: int = 0

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "Batch":
        """Return the batch on a device, its pixels changed, its floats in ``dtype``.

        Args:
            device: to move to; the changes of pixels are applied there.
            dtype: number type of the model's weights.
        """

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        def cast(x: Tensor) -> Tensor:
            return x.to(dtype) if x.is_floating_point() else x

        return self._map_tensors(move).apply_changes()._map_tensors(cast)

    def apply_changes(self) -> "Batch":
        """Return the batch with changed pixels, as the model reads them."""
        towers, targets = apply_changes(self.towers, self.targets, self.changes)
        return replace(self, towers=towers, targets=targets, changes={})

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        towers = {
            name: {key: change(x) for key, x in tensors.items()}
            for name, tensors in self.towers.items()
        }
        targets = {key: change(x) for key, x in self.targets.items()}
        return replace(self, towers=towers, targets=targets)

    def pin_memory(self) -> "Batch":
        """Move the tensors to pinned memory, from which copies to a GPU are asynchronous."""
        for tensors in (*self.towers.values(), self.targets):
            tensors.update({key: x.pin_memory() for key, x in tensors.items()})
        return self


def rank_slice(count: int, rank: int, world: int) -> slice:
    """Return the rows of a rank; the first ``count % world`` ranks have one more row.

    Args:
        count: rows of all ranks.
        rank: index of the process among the workers, from 0.
        world: number of ranks.
    """
    base, more = divmod(count, world)
    start = rank * base + min(rank, more)
    return slice(start, start + base + (rank < more))


class MultiTaskDataLoader:
    """Loader of the global batches of all tasks of a run.

    Args:
        corpora: corpus name -> opened corpus.
        tasks: task name -> its corpus, weight and batch size.
        model: shape of the model; its tasks name the towers.
        seed: start of the random numbers of order, captions and augmentation.
        augmentation: random changes of rows; None turns them off.
        temperature: exponent of the row counts that weigh tasks without a weight.
        masks: masks of masked tasks.
        shuffle_bytes: largest size of a task's shards that are shuffled as a unit; a larger task
            is shuffled in windows of this size.
        shard_groups: groups of shards from which each batch takes equal parts; None for none.
        tasks_per_step: lanes of the schedule.

    Raises:
        UserError: an unknown task, a corpus that is missing or of another modality, or a setting
            that has no effect on its task.
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
        shuffle_bytes: float = float("inf"),
        shard_groups: int | None = None,
        tasks_per_step: int = 1,
    ) -> None:
        if not tasks:
            raise UserError("there is no task to train; name at least one in tasks")
        self.seed, self.tasks, self._augmentation = seed, dict(tasks), augmentation
        self._shuffle_bytes, self._shard_groups = shuffle_bytes, shard_groups
        self.datasets: dict[str, TaskDataset] = {}
        self._samplers: dict[str, RowSampler] = {}
        for name, settings in tasks.items():
            task, corpus = find_task(name, model.tasks), corpora[settings.corpus]
            _check_settings(name, task, settings)
            splits = resolve_splits(corpus, settings.split)
            corpus = select_label_fraction(corpus, splits, settings.label_fraction)
            dataset = TaskDataset(name, task, corpus, model, settings, masks)
            self.datasets[name] = dataset
            # Local shards are cheap to open, and a missing one is reported before training starts.
            is_whole = type(self._find_sampler(name)) is ShuffleSampler
            if is_whole and not dataset.shard_table.is_remote:
                dataset.shard_table.open()
            # Shards in a store are checked when a worker downloads them.
            if not dataset.shard_table.is_remote:
                dataset.check_columns()
        self.weights = compute_task_weights(
            {name: settings.weight for name, settings in tasks.items()},
            {name: dataset.num_rows for name, dataset in self.datasets.items()},
            temperature,
        )
        self._task_sampler = TaskSampler(self.weights, seed, tasks_per_step)
        self.lanes = self._task_sampler.lanes

    def __getstate__(self) -> dict[str, Any]:
        # Another process divides the shards itself: their order has a number for each.
        return self.__dict__ | {"_samplers": {}}

    def tasks_at(self, step: int) -> list[str]:
        """Return the task of each lane in a step."""
        count = len(self.lanes)
        return [self._task_sampler.task_at(step * count + lane)[0] for lane in range(count)]

    def batch_spec(self, number: int) -> BatchSpec:
        """Return the task and rows of a global batch."""
        task, batch_index = self._task_sampler.task_at(number)
        return BatchSpec(task, batch_index, self._find_sampler(task).batch(batch_index))

    def bytes_in_use(self) -> int:
        """Return the largest size of remote shards that this node needs at the same time."""
        sizes: dict[tuple[str, str], int] = {}
        for name, dataset in self.datasets.items():
            table = dataset.shard_table
            if table.is_remote:
                total = int(table.bytes.sum())
                size = int(min(self._find_sampler(name).max_open_bytes(), total))
                # Tasks that read all of the same rows share the files.
                sizes[dataset.location, name if size < total else ""] = size
        return sum(sizes.values())

    def count_steps(self, steps: int) -> dict[str, int]:
        """Return the number of batches of each task among the first ``steps`` steps."""
        return self._task_sampler.count_steps(steps)

    def batch(self, number: int, rank: int = 0, world: int = 1, for_gpu: bool = False) -> Batch:
        """Load a rank's part of a global batch.

        Args:
            number: index of the batch in the run, from 0.
            rank: index of the process among those of the batch, from 0.
            world: number of ranks of the batch.
            for_gpu: leave pixels as stored; :meth:`Batch.to` changes them on the GPU.
        """
        task, batch_index = self._task_sampler.task_at(number)
        dataset, sampler = self.datasets[task], self._find_sampler(task)
        count = self.tasks[task].batch_size
        part = rank_slice(count, rank, world)
        is_padding = part.stop == part.start
        # The first row stands in; its loss has zero weight.
        if is_padding:
            part = slice(0, 1)
        sampler.open_shards(dataset.shard_table, batch_index, part)
        rows = sampler.batch(batch_index, part)
        random = BatchRandom((self.seed, "rows", number), count, part)
        towers, targets, changes = dataset.load(rows, random, self._augmentation)
        masked = targets.get("masked")
        counts = None if masked is None else masked.sum(1).numpy()
        seed = int(keyed_rng(self.seed, "depth", number).integers(2**62))
        batch = Batch(
            task, towers, targets, rows, count, is_padding, counts, changes, part.start, seed
        )
        return batch if for_gpu else batch.apply_changes()

    def _find_sampler(self, task: str) -> RowSampler:
        if task not in self._samplers:
            self._samplers[task] = self._build_sampler(task)
        return self._samplers[task]

    def _build_sampler(self, task: str) -> RowSampler:
        dataset, batch_size = self.datasets[task], self.tasks[task].batch_size
        table, lengths, limit = dataset.shard_table, dataset.row_lengths, self._shuffle_bytes
        # The key has the task's name: adding a task does not change the order of the others.
        key = (self.seed, "order", task)
        if self._shard_groups is not None:
            _check_groups(dataset, batch_size, self._shard_groups)
            return GroupedShuffleSampler(
                table.rows, table.bytes, batch_size, self._shard_groups, limit, key, lengths
            )
        # One shard cannot be divided into windows.
        if table.bytes.sum() > limit and len(table.bytes) > 1:
            return WindowedShuffleSampler(table.rows, table.bytes, batch_size, limit, key, lengths)
        return ShuffleSampler(dataset.num_rows, batch_size, key, lengths)


def _check_settings(name: str, task: Task, settings: TaskTraining) -> None:
    """Raise UserError if a setting would have no effect on its task."""
    objective = find_objective(task.objective)
    has_labels = objective.has_labels and not settings.views
    if settings.label_fraction < 1 and not has_labels:
        raise UserError(
            f"tasks.{name}.label_fraction: this task learns without labels. Set it to 1, and the "
            "fraction of a task with labels"
        )
    if settings.class_weights is not None and not objective.weighs_rows:
        raise UserError(
            f"tasks.{name}.class_weights: the loss of {task.objective} weighs no classes. Remove "
            "the key; a classification task has weights"
        )


def _check_groups(dataset: TaskDataset, batch_size: int, groups: int) -> None:
    """Raise UserError unless a batch and the shards of a task can be divided into groups."""
    if batch_size % groups:
        raise UserError(
            f"tasks.{dataset.name}.batch_size {batch_size} is not a multiple of "
            f"training.shard_groups {groups}; change one of them"
        )
    shards = len(dataset.shard_table.rows)
    if shards < groups:
        raise UserError(
            f"{dataset.location} has {shards} shards, fewer than training.shard_groups {groups}; "
            "lower it, or prepare the corpus with smaller shards"
        )


#: Batches that each process, or the thread, loads ahead.
BATCHES_PER_PROCESS, BATCHES_OF_THREAD = 2, 4


@contextlib.contextmanager
def prefetch_batches(
    dataloader: MultiTaskDataLoader,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    processes: int = 0,
    for_gpu: bool = False,
    lanes: Sequence[int] | None = None,
) -> Iterator[Iterator[Batch]]:
    """Load the batches of steps ``start`` to ``stop`` ahead of a block.

    Args:
        dataloader: loads the batches.
        start: first step.
        stop: step after the last one.
        rank: index of the process among those of a batch, from 0.
        world: number of ranks of a batch.
        processes: that load batches; 0 for a thread.
        for_gpu: put tensors into pinned memory, for asynchronous copies, and leave the changes of
            pixels to the GPU.
        lanes: whose batches of each step are loaded, in this order; None for all.
    """
    count = len(dataloader.lanes)
    chosen = range(count) if lanes is None else lanes
    total = (stop - start) * len(chosen)

    def find_number(index: int) -> int:
        step, place = divmod(index, len(chosen))
        return (start + step) * count + chosen[place]

    batches = StepBatches(dataloader, rank, world, for_gpu)
    if processes:
        numbers = map(find_number, range(total))
        loaded = _raise_errors(_open_processes(batches, numbers, processes, for_gpu))
        try:
            yield loaded
        finally:
            # The processes end with the iterator that the generator holds.
            loaded.close()
        return

    def load(index: int, grant: Callable[[int], None]) -> Batch | Exception:
        batch = batches[find_number(index)]
        return batch.pin_memory() if for_gpu and isinstance(batch, Batch) else batch

    # One compute thread: the others belong to the model.
    use_one_thread = functools.partial(torch.set_num_threads, 1)
    ahead = OrderedPrefetcher(
        total, load, streams=1, ahead=BATCHES_OF_THREAD, initializer=use_one_thread
    )
    try:
        yield _raise_errors(ahead)
    finally:
        ahead.close(wait=True)


def _open_processes(
    batches: "StepBatches", numbers: Iterator[int], processes: int, pin: bool
) -> "DataLoader[Batch | Exception]":
    # A fork would copy the locks of threads, and a process with a GPU must not fork. A server that
    # has imported torch forks the processes instead.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=processes,
        pin_memory=pin,
        prefetch_factor=BATCHES_PER_PROCESS,
        worker_init_fn=_start_process,
        multiprocessing_context=context,
    )


def _raise_errors(items: Iterable[Batch | Exception]) -> Generator[Batch, None, None]:
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


class StepBatches(Dataset["Batch | Exception"]):
    """Batches of a rank by number, as torch's ``DataLoader`` expects them.

    Args:
        dataloader: loads the batches.
        rank: index of the process among those of a batch, from 0.
        world: number of ranks of a batch.
        for_gpu: leave the changes of pixels to the GPU.
    """

    def __init__(
        self, dataloader: MultiTaskDataLoader, rank: int, world: int, for_gpu: bool = False
    ) -> None:
        self._dataloader, self._rank, self._world = dataloader, rank, world
        self._for_gpu = for_gpu

    def __getitem__(self, number: int) -> "Batch | Exception":
        """Return a batch, or the error; ``DataLoader`` would rewrite its message."""
        try:
            return self._dataloader.batch(number, self._rank, self._world, self._for_gpu)
        except Exception as error:
            return error


def _start_process(number: int) -> None:
    # The processes are the parallelism.
    torch.set_num_threads(1)
    limit_row_threads(1)
    # Ctrl+C is for the training process, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
