"""The rows of a batch shared out over threads, for work that leaves Python's lock.

Decoding a JPEG and changing its pixels take longer than reading it: a batch of large pictures is
made by as many threads as there are cores, up to eight, and no more than the process computes with:
beside it others may work on the same cores.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

#: Of a process.
MAX_THREADS = 8
#: Rows that a thread is started for.
MIN_ROWS_PER_THREAD = 8
_limit = MAX_THREADS


def limit_row_threads(threads: int) -> None:
    """From now on no more than so many."""
    global _limit
    if threads != _limit:
        _limit = threads
        _pool.cache_clear()


def map_row_slices(count: int, work: Callable[[slice], None]) -> None:
    """Call ``work`` with slices that make up ``range(count)``, several at once.

    What a row becomes must not hang on which rows come with it. The first error is raised.
    """
    threads = min(_threads(), -(-count // MIN_ROWS_PER_THREAD))
    if threads <= 1:
        work(slice(0, count))
        return
    step = -(-count // threads)
    starts = range(0, count, step)
    list(_pool().map(work, [slice(start, min(start + step, count)) for start in starts]))


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # each of these is one: no teams of their own


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads(), "rows", initializer=_one_thread)


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MAX_THREADS, cores or 1, _limit)
