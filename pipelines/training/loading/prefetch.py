"""Batches loaded ahead of the training: by a thread, or by processes of torch's ``DataLoader``.

A batch is a function of its step, so both give the same batches in the same order. A thread costs
nothing and suffices beside a CPU. It shares Python's lock with the training, which launches
thousands of operations a step on a GPU; processes do not.
"""

import contextlib
import functools
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from pipelines.data.io.media import OrderedPrefetcher
from pipelines.data.shards.row_threads import limit_row_threads
from pipelines.training.loading.dataloader import Batch, MultiTaskDataLoader

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
) -> Iterator[Iterator[Batch]]:
    """Load the batches of steps ``start`` to ``stop`` ahead of a block.

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
    batches = StepBatches(dataloader, rank, world, for_gpu)
    if processes:
        loaded = _raise_errors(_open_processes(batches, range(start, stop), processes, for_gpu))
        try:
            yield loaded
        finally:
            # The processes end with the iterator that the generator holds.
            loaded.close()
        return

    def load(number: int, grant: Callable[[int], None]) -> Batch | Exception:
        batch = batches[start + number]
        return batch.pin_memory() if for_gpu and isinstance(batch, Batch) else batch

    # One compute thread: the others belong to the model.
    use_one_thread = functools.partial(torch.set_num_threads, 1)
    ahead = OrderedPrefetcher(
        stop - start, load, streams=1, ahead=BATCHES_OF_THREAD, initializer=use_one_thread
    )
    try:
        yield _raise_errors(ahead)
    finally:
        ahead.close(wait=True)


def _open_processes(
    batches: "StepBatches", steps: range, processes: int, pin: bool
) -> "DataLoader[Batch | Exception]":
    # A fork would copy the locks of threads, and a process with a GPU must not fork. A server that
    # has imported torch forks the processes instead.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
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
