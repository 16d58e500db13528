"""Threads that share the rows of a batch, for work that releases the GIL.

Decoding a JPEG and augmenting its pixels take longer than reading it. Each core works on a part of
the batch, up to eight cores and up to the number of threads that the process computes with: other
processes may use the remaining cores.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

#: Threads of a process.
MAX_THREADS = 8
#: With fewer rows per thread, fewer threads are used.
MIN_ROWS_PER_THREAD = 8
_limit = MAX_THREADS


def limit_row_threads(threads: int) -> None:
    """Set the maximum number of threads of this process."""
    global _limit
    if threads != _limit:
        _limit = threads
        _get_pool.cache_clear()


def map_row_slices(count: int, work: Callable[[slice], None]) -> None:
    """Call ``work`` in parallel with slices that together cover ``range(count)``.

    The result of a row must not depend on the other rows of its slice. The first error is raised.

    Args:
        count: number of rows.
        work: processes the rows of a slice.
    """
    threads = min(_count_threads(), -(-count // MIN_ROWS_PER_THREAD))
    if threads <= 1:
        work(slice(0, count))
        return
    step = -(-count // threads)
    starts = range(0, count, step)
    list(_get_pool().map(work, [slice(start, min(start + step, count)) for start in starts]))


def _use_one_torch_thread() -> None:
    import torch

    torch.set_num_threads(1)  # the threads here are the parallelism; torch must not add its own


@cache
def _get_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_count_threads(), "rows", initializer=_use_one_torch_thread)


def _count_threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MAX_THREADS, cores or 1, _limit)
