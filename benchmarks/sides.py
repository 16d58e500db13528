"""Contenders in processes of their own, so that neither's threads, caches and memory touch the
other's; and their CPU time is that of all processes that they start."""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Took, timed

#: Makes a contender: it gets its arguments, an empty folder and a stack that ends with it, and
#: returns what is timed.
Maker = Callable[..., Callable[..., object]]


@contextmanager
def side(
    maker: Maker, *arguments: Any, keep: bool = False, without: Sequence[str] = ()
) -> Iterator[Callable[..., Took]]:
    """A contender: call it to have it work, and to hear what that took.

    Args:
        maker: see ``Maker``; of a module, as it is sent by name.
        arguments: for it.
        keep: freed memory stays in the process, as in a training worker.
        without: processes that do not count; see ``measure.tree_cpu_time``.
    """
    # Not forked: what this process has set of its memory would be theirs too.
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, maker, arguments, keep, without))
    process.start()
    theirs.close()

    def call(*words: Any) -> Took:
        mine.send(words)
        took: Took = mine.recv()
        return took

    try:
        yield call
    finally:
        mine.close()
        process.join(60)
        if process.is_alive():
            process.terminate()


def _serve(
    pipe: Any, maker: Maker, arguments: Sequence[Any], keep: bool, without: Sequence[str]
) -> None:
    if keep:
        from skillnet.malloc import keep_freed_memory

        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = maker(*arguments, Path(folder), stack)
        while True:
            try:
                words = pipe.recv()
            except EOFError:
                return
            pipe.send(timed(partial(work, *words), without))


def rounds_of(
    sides: dict[str, Callable[..., Took]], rounds: int, *words: Any
) -> dict[str, list[Took]]:
    """What each took in each round, after one to warm up; every other round in reverse order."""
    took: dict[str, list[Took]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in sides if number % 2 == 0 else reversed(sides):
            one = sides[name](*words)
            if number:
                took[name].append(one)
    return took
