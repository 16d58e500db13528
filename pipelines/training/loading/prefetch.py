"""Batches loaded ahead of the training: by a thread, or by processes of torch's ``DataLoader``.

A batch is a function of its step, so both give the same batches in the same order. A thread costs
nothing and suffices beside a CPU. It shares Python's lock with the training, which launches
thousands of operations a step on a GPU; processes do not.
"""

import contextlib
import multiprocessing
import queue
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch.utils.data import DataLoader, Dataset

from pipelines.data.shards.row_threads import limit_row_threads
from pipelines.training.loading.dataloader import Batch, MultiTaskDataLoader

#: Batches that each process loads ahead.
BATCHES_PER_PROCESS = 2


def prefetch_batches(
    dataloader: MultiTaskDataLoader,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    processes: int = 0,
    for_gpu: bool = False,
) -> AbstractContextManager[Iterable[Batch]]:
    """Return a context manager of the batches of steps ``start`` to ``stop``, loaded ahead.

    Args:
        dataloader: loads the batches.
        start: first step.
        stop: step after the last one.
        rank: index of the process among the workers, from 0.
        world: number of ranks.
        processes: that load batches; 0 for a thread.
        for_gpu: put tensors into pinned memory, for asynchronous copies, and leave the changes of
            pixels to the GPU.
    """
    batches, steps = StepBatches(dataloader, rank, world, for_gpu), range(start, stop)
    if processes:
        return _prefetch_in_processes(batches, steps, processes, for_gpu)
    return BatchPrefetcher(batches, steps, for_gpu)


@contextlib.contextmanager
def _prefetch_in_processes(
    batches: "StepBatches", steps: range, processes: int, pin: bool
) -> Iterator[Iterable[Batch]]:
    # A fork would copy the locks of threads, and a process with a GPU must not fork. A server that
    # has imported torch forks the processes instead.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    loader: DataLoader[Batch | Exception] = DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=processes,
        pin_memory=pin,
        prefetch_factor=BATCHES_PER_PROCESS,
        worker_init_fn=_start_process,
        multiprocessing_context=context,
    )
    loaded = _raise_errors(loader)
    try:
        yield loaded
    finally:
        # The processes end with the iterator that the generator holds.
        loaded.close()


def _raise_errors(items: Iterable[Batch | Exception]) -> Generator[Batch, None, None]:
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


class StepBatches(Dataset["Batch | Exception"]):
    """Batches of a rank by step, as torch's ``DataLoader`` expects them.

    Args:
        dataloader: loads the batches.
        rank: index of the process among the workers, from 0.
        world: number of ranks.
        for_gpu: leave the changes of pixels to the GPU.
    """

    def __init__(
        self, dataloader: MultiTaskDataLoader, rank: int, world: int, for_gpu: bool = False
    ) -> None:
        self._dataloader, self._rank, self._world = dataloader, rank, world
        self._for_gpu = for_gpu

    def __getitem__(self, step: int) -> "Batch | Exception":
        """Return the batch of a step, or the error; ``DataLoader`` would rewrite its message."""
        try:
            return self._dataloader.batch(step, self._rank, self._world, self._for_gpu)
        except Exception as error:
            return error


def _start_process(number: int) -> None:
    # The processes are the parallelism.
    torch.set_num_threads(1)
    limit_row_threads(1)
    # Ctrl+C is for the training process, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class BatchPrefetcher:
    """Batches that a thread loads ahead.

    Close it, or leave its ``with`` block, to end the thread. An error in the thread is raised
    where the batch is requested.

    Args:
        batches: batches by step.
        steps: to load, in order.
        pin: put tensors into pinned memory.
        depth: batches that are loaded ahead.
    """

    def __init__(
        self, batches: StepBatches, steps: range, pin: bool = False, depth: int = 4
    ) -> None:
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._fill, args=(batches, steps, pin), name="prefetch", daemon=True
        )
        self._thread.start()

    def _fill(self, batches: StepBatches, steps: range, pin: bool) -> None:
        # One compute thread: the others belong to the model.
        torch.set_num_threads(1)
        try:
            for step in steps:
                batch = batches[step]
                if pin and isinstance(batch, Batch):
                    batch.pin_memory()
                if not self._put(batch):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

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

    def __enter__(self) -> "BatchPrefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
