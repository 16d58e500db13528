"""Tasks of a preparation in processes of this machine: they need no Ray.

The driver cuts blocks; child processes read parts and write shards. Small corpora of texts are
prepared in the driver. Ray takes seconds to start, so texts do without it, and so do media that
Python prepares, or that are prepared where Ray is not installed.
"""

import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType
from typing import Any

from pipelines.data.corpora.base import Corpus
from pipelines.data.preprocessing.blocks import IN_PROCESS, FutureResult, TaskStarter
from pipelines.data.preprocessing.jobs import CorpusJob, list_writable, read_units, write_block
from skillnet.modality import is_string_modality
from skillnet_platform.errors import UserError

#: Ends of its process that a task survives. A row that ends two of them is rejected.
MAX_ENDS = 20


def are_texts(corpora: Sequence[Corpus]) -> bool:
    """Return whether all inputs of corpora are strings."""
    return all(is_string_modality(corpus.modality) for corpus in corpora)


def needs_no_ray(corpora: Sequence[Corpus], store: str | None) -> bool:
    """Return whether corpora are prepared on this machine alone.

    Args:
        corpora: corpora to prepare.
        store: URI of the folder of prepared corpora, or ``None`` for a disk.
    """
    ray = sys.modules.get("ray")
    is_running = ray is not None and ray.is_initialized()
    has_cluster = is_running or bool(os.environ.get("RAY_ADDRESS"))
    is_enough = are_texts(corpora) or importlib.util.find_spec("ray") is None
    return is_enough and store is None and not has_cluster


class LocalTasks:
    """Child processes, or this process alone. Leave its ``with`` block to end them.

    Args:
        processes: number of child processes; 1 does all work in this process.
        decodes: whether rows have media. A decoder may end its process, so there is a child then.
    """

    def __init__(self, processes: int, decodes: bool = False) -> None:
        self._processes = processes
        self._pool = self._make_pool() if processes > 1 or decodes else None

    def __enter__(self) -> "LocalTasks":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _make_pool(self) -> ProcessPoolExecutor:
        # A fork would copy the locks of running threads.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self._processes, context, _start_worker)

    def readers(self) -> TaskStarter:
        """Return the tasks that read the parts of a corpus."""
        return IN_PROCESS if self._pool is None else TaskStarter(self._submit, self._processes)

    def call(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run a function in this process, which can start tasks; return the results.

        Args:
            function: function to call.
            arguments: those of each call.
        """
        return [function(*given) for given in arguments]

    def run(self, jobs: Sequence[CorpusJob], session: str) -> Generator[dict[str, Any], None, None]:
        """Yield the results of all blocks of some corpora, in their order.

        Args:
            jobs: corpora to prepare.
            session: see :func:`pipelines.data.preprocessing.jobs.write_block`.
        """
        tasks = self.readers()
        write = functools.partial(write_block, list_writable(jobs), session)
        for index, job in enumerate(jobs):
            units = ((unit,) for unit in read_units(index, job, tasks))
            for done in tasks.map(write, units):
                yield from map(json.loads, done["result"].to_pylist())

    def _submit(self, function: Callable[..., Any], *given: Any) -> FutureResult:
        return _LocalResult(self, function, given)

    def start(
        self, function: Callable[..., Any], given: Sequence[Any]
    ) -> tuple[ProcessPoolExecutor, FutureResult]:
        """Start a task; return it with the processes that it runs in."""
        assert self._pool is not None
        # Each submission can start a process.
        with _hidden_main():
            try:
                return self._pool, self._pool.submit(function, *given)
            except BrokenProcessPool:
                self.replace_pool(self._pool)
                return self._pool, self._pool.submit(function, *given)

    def replace_pool(self, broken: ProcessPoolExecutor) -> None:
        """Start a process in place of those that ended together, because one of them died.

        From now on it is one, so that another death concerns only the row that caused it.

        Args:
            broken: result of :meth:`start`, perhaps replaced before.
        """
        if self._pool is broken:
            broken.shutdown(cancel_futures=True)
            self._processes = 1
            self._pool = self._make_pool()


class _LocalResult:
    """Result of a task in a child process, which can die; the task is then started again.

    Args:
        tasks: starts it.
        function: work of the task.
        given: arguments.
    """

    def __init__(
        self, tasks: LocalTasks, function: Callable[..., Any], given: Sequence[Any]
    ) -> None:
        self._tasks, self._function, self._given = tasks, function, given
        self._pool, self._future = tasks.start(function, given)

    def result(self) -> Any:
        for _ in range(MAX_ENDS):
            try:
                return self._future.result()
            except BrokenProcessPool:
                self._tasks.replace_pool(self._pool)
                self._pool, self._future = self._tasks.start(self._function, self._given)
        raise UserError(
            f"processes that prepare rows ended {MAX_ENDS} times, perhaps because the memory is "
            "full. Free memory or give fewer --cpus, and run the same command again: it resumes"
        )


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep child processes from importing the main module, which would run a script again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_worker() -> None:
    # Ctrl-C reaches the group of processes; the driver ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One process per CPU: the threads of tokenizers would compete with the other processes.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, name="parent", daemon=True).start()
