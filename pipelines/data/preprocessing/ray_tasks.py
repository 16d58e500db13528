"""Tasks of a preparation on Ray: one task per corpus reads its rows in order and yields blocks.

A row of the dataset is the work of one shard: its raw rows lie in one cell as an Arrow IPC stream.
Ray Data splits and merges blocks of rows freely, but it cannot split a cell. Ray Data pauses a
reading task while the object store holds more than its share, so reading never runs far ahead.
The task of a divided corpus starts tasks that read its parts, and only cuts their rows into blocks.
"""

import contextlib
import functools
import json
import logging
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipelines.data.corpora.base import Corpus
from pipelines.data.preprocessing.blocks import UNIT_SCHEMA, TaskStarter
from pipelines.data.preprocessing.jobs import (
    CorpusJob,
    list_writable,
    read_units,
    write_block,
)
from skillnet_platform import cluster
from skillnet_platform.errors import UserError
from skillnet_platform.storage.retry import StoreUnavailableError


@dataclass(frozen=True)
class RayTasks:
    """Tasks of a preparation on Ray, with the options that decide on which nodes they run.

    Args:
        this_node: options of tasks that need the disk of this node.
        any_node: options of tasks that do not.
        cpus: CPUs of a task that runs on this node.
    """

    this_node: dict[str, Any] = field(default_factory=dict)
    any_node: dict[str, Any] = field(default_factory=dict)
    cpus: float = 1.0

    def readers(self) -> TaskStarter:
        """Return the tasks that read the parts of a corpus; other tasks can start them."""
        options = {"num_cpus": 1} | self.any_node
        return TaskStarter(functools.partial(_submit, options), count_cpus())

    def call(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run a function for several arguments at the same time; return the results.

        Args:
            function: reads the disk of this node.
            arguments: those of each call.
        """
        options = {"num_cpus": self.cpus, "max_retries": 0} | self.this_node
        return [each.result() for each in [_submit(options, function, *a) for a in arguments]]

    def run(self, jobs: Sequence[CorpusJob], session: str) -> Generator[dict[str, Any], None, None]:
        """Yield the results of all blocks of some corpora, in the order in which tasks end.

        Args:
            jobs: corpora to prepare.
            session: see :func:`pipelines.data.preprocessing.jobs.write_block`.
        """
        return _iterate_in_thread(_run_tasks(jobs, session, self))


class _RayResult(NamedTuple):
    """Result of a task of Ray, whose errors are those of its function."""

    reference: Any

    def result(self) -> Any:
        try:
            return ray.get(self.reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError | StoreUnavailableError):
                raise error.cause from None
            raise


def _submit(options: dict[str, Any], function: Callable[..., Any], *given: Any) -> _RayResult:
    return _RayResult(ray.remote(**options)(function).remote(*given))


def count_cpus() -> int:
    """Return the number of CPUs of the cluster, at least 2."""
    return max(2, int(ray.cluster_resources().get("CPU", 1)))


def choose_scheduling(corpora: Sequence[Corpus], store: str | None) -> RayTasks:
    """Return tasks that run on any node if the nodes share a disk.

    With an object store, this node reads, and any node transforms.

    Args:
        corpora: corpora to prepare.
        store: URI of the folder of prepared corpora, or ``None`` for a shared disk.

    Raises:
        UserError: a corpus must be read on this node, and this node has no CPU for Ray.
    """
    if store is None:
        return RayTasks()
    node = ray.get_runtime_context().get_node_id()
    (own,) = [each for each in ray.nodes() if each["NodeID"] == node]
    has_cpu, this_node = bool(own["Resources"].get("CPU")), cluster.pin_to_this_node(ray)
    bound_here = [corpus.name for corpus in corpora if not corpus.can_run_remotely()]
    if bound_here and not has_cpu:
        raise UserError(
            f"{', '.join(bound_here)}: media on a disk are read on the node that runs the command, "
            "and this node offers no CPU to Ray. Put the media into the store and name them by "
            "URI, or run the same command on a machine that reaches the store"
        )
    return RayTasks(this_node, this_node if bound_here else {}, float(has_cpu))


class CorpusDatasource(Datasource):
    """Ray Data source that yields the blocks of several corpora, with one task per corpus."""

    def __init__(self, jobs: Sequence[CorpusJob], readers: TaskStarter) -> None:
        self.jobs, self.readers = jobs, readers

    def estimate_inmemory_data_size(self) -> int | None:
        """Return ``None``: the size is unknown before the rows were read."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """Return one task per corpus, because the rows of a corpus have an order."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(
                functools.partial(read_units, index, job, self.readers), unknown, schema=UNIT_SCHEMA
            )
            for index, job in enumerate(self.jobs)
        ]


def _run_tasks(
    jobs: Sequence[CorpusJob], session: str, scheduling: RayTasks
) -> Generator[dict[str, Any], None, None]:
    """Yield the results of all tasks in the order in which the tasks end."""
    context = ray.data.DataContext.get_current().copy()
    # Names and bytes of shards depend on the blocks alone, so their order is free.
    context.execution_options.preserve_order = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A row is the work of a shard. It must not wait until other rows fill a block.
    context.target_max_block_size = 1
    # Errors are raised here, and the command reports them once.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    with ray.data.DataContext.current(context):
        # A reading task waits most of the time, so it reserves no CPU.
        read = ray.data.read_datasource(
            CorpusDatasource(jobs, scheduling.readers()),
            num_cpus=0,
            override_num_blocks=len(jobs),
            concurrency=min(len(jobs), count_cpus()),
            ray_remote_args=dict(scheduling.this_node),
        )
        dataset = read.map_batches(
            functools.partial(write_block, list_writable(jobs), session),
            batch_format="pyarrow",
            batch_size=None,
            zero_copy_batch=True,
            num_cpus=1,
            **scheduling.any_node,
        )
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from map(json.loads, block["result"].to_pylist())


def _iterate_in_thread(
    items: Generator[dict[str, Any], None, None],
) -> Generator[dict[str, Any], None, None]:
    """Yield the items of an iterator that runs in a thread of its own.

    A signal interrupts the main thread at any place. Inside Ray Data it would leave a submission
    half done, and Ray's teardown of that state aborts the process.
    """
    # One item at a time: Ray Data slows its readers down if its results are not taken.
    ready: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue(maxsize=1)
    is_closed = threading.Event()

    def put(item: dict[str, Any] | BaseException | None) -> None:
        while not is_closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def iterate() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    put(item)
                    if is_closed.is_set():
                        return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=iterate, name="prepare", daemon=True)
    try:
        # A signal can arrive while the start waits for the thread, which may work already.
        thread.start()
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        is_closed.set()
        if not cluster.halt_if_asked() and thread.ident is not None:
            thread.join()
