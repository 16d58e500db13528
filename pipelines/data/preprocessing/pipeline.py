"""Preparation of corpora with Ray Data: blocks of raw rows flow in, finished shards stay on disk.

    one task per corpus: rows -> blocks  ==>  tasks: transform a block, write its shard  ==>  driver
         |              (limited by the object store)                |                      |
         +--> rejected rows                      shard and entry <---+          manifest <--+

Only a few blocks are in memory at any time. A shard is complete once its entry exists, and a killed
run resumes with the complete shards (:mod:`pipelines.data.preprocessing.staging`). The driver
counts rows, stops if too many are bad, and publishes each corpus, manifest last, as soon as all of
its blocks are done. With an object store, each shard is uploaded as soon as it is complete
(:mod:`pipelines.data.preprocessing.remote_staging`).
"""

import contextlib
import functools
import json
import logging
import queue
import secrets
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.data.corpora.base import ROW_COLUMNS, Corpus, SourceArchives
from pipelines.data.io.media import MEDIA, MediaRef
from pipelines.data.preprocessing import staging
from pipelines.data.preprocessing.blocks import SOURCE_COLUMNS, iter_texts, unpack_unit, write_spool
from pipelines.data.preprocessing.datasource import (
    STORE_UNAVAILABLE,
    USER_ERROR,
    CorpusDatasource,
    CorpusJob,
)
from pipelines.data.preprocessing.progress import CorpusProgress
from pipelines.data.preprocessing.remote_staging import RemoteStaging, clear_staging
from pipelines.data.shards.row_checks import digest_shard
from pipelines.data.tokenizer import training as tokenizers
from pipelines.data.transforms import decode_guard
from pipelines.data.transforms.sound import find_ctc_problems
from skillnet.precision import keep_freed_memory
from skillnet_platform import cluster, console
from skillnet_platform.cli import user_error_message
from skillnet_platform.errors import UserError
from skillnet_platform.storage import require_space
from skillnet_platform.storage.location import join_location
from skillnet_platform.storage.locks import LEASE, hold_lease, is_shared_disk
from skillnet_platform.storage.retry import StoreUnavailableError

#: With fewer free bytes than this, no corpus is started.
MIN_FREE_BYTES = 2**20


@dataclass(frozen=True)
class SchedulingOptions:
    """Ray options that decide on which nodes tasks run.

    Args:
        this_node: options of tasks that need the disk of this node.
        any_node: options of tasks that do not.
        cpus: CPUs of a task that runs on this node.
    """

    this_node: dict[str, Any] = field(default_factory=dict)
    any_node: dict[str, Any] = field(default_factory=dict)
    cpus: float = 1.0


def choose_scheduling(corpora: Sequence[Corpus], store: str | None) -> SchedulingOptions:
    """Return scheduling options: any node if the nodes share a disk.

    With an object store, this node reads, and any node transforms.

    Args:
        corpora: corpora to prepare.
        store: URI of the folder of prepared corpora, or ``None`` for a shared disk.

    Raises:
        UserError: a corpus must be read on this node, and this node has no CPU for Ray.
    """
    if store is None:
        return SchedulingOptions()
    import ray

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
    return SchedulingOptions(this_node, this_node if bound_here else {}, float(has_cpu))


def spool_corpora(
    corpora: Sequence[Corpus], archives: Path, folder: Path, scheduling: SchedulingOptions
) -> dict[str, Path]:
    """Read corpora in parallel, each into a spool file.

    Args:
        corpora: corpora to read.
        archives: directory of the downloads.
        folder: directory of the spool files.
        scheduling: see :func:`choose_scheduling`.

    Returns:
        Corpus name -> spool file.
    """
    import ray

    task = ray.remote(num_cpus=scheduling.cpus, max_retries=0, **scheduling.this_node)(write_spool)
    files = {corpus.name: folder / f"{corpus.name}.arrows" for corpus in corpora}
    pending = [task.remote(c, SourceArchives(archives, c.archives), files[c.name]) for c in corpora]
    try:
        ray.get(pending)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, StoreUnavailableError):
            raise error.cause from None
        raise
    return files


def train_shared_tokenizer(
    corpora: Sequence[Corpus],
    spools: dict[str, Path],
    size: int,
    scheduling: SchedulingOptions,
) -> str:
    """Train the tokenizer on the spooled texts of corpora, and return its JSON.

    Args:
        corpora: training corpora.
        spools: corpus name -> spool file.
        size: number of tokens.
        scheduling: see :func:`choose_scheduling`.
    """
    import ray

    task = ray.remote(num_cpus=scheduling.cpus, max_retries=0, **scheduling.this_node)(
        _train_tokenizer
    )
    text: str = ray.get(task.remote([(corpus, spools[corpus.name]) for corpus in corpora], size))
    return text


def write_corpora(
    jobs: Sequence[CorpusJob],
    max_error_rate: float,
    scheduling: SchedulingOptions,
    store: str | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Prepare corpora at the same time; yield the manifest of each one when it is published.

    Args:
        jobs: corpora to prepare.
        max_error_rate: allowed fraction of a corpus' rows that are bad.
        scheduling: see :func:`choose_scheduling`.
        store: URI of the folder of prepared corpora; ``None`` leaves them on this disk.

    Raises:
        UserError: the disk is full, too many rows are bad, or another process prepares one of the
            corpora.
        StoreUnavailableError: the store does not answer. Uploaded shards stay there.
    """
    if not jobs:
        return
    session = secrets.token_hex(8)
    with contextlib.ExitStack() as stack:
        stack.callback(decode_guard.remove_attempts, session)
        states = [_start_job(job, store, stack) for job in jobs]
        running = [state.job for state in states]
        with (
            console.show_progress("preparing", unit="rows") as bar,
            contextlib.closing(
                _iterate_in_thread(_run_tasks(running, session, scheduling))
            ) as results,
        ):
            for result in results:
                if "user_error" in result:
                    raise UserError(result["user_error"])
                if "store_unavailable" in result:
                    raise StoreUnavailableError(result["store_unavailable"])
                state = states[result["corpus"]]
                bar.advance(state.add_result(result), state.job.corpus.name)
                state.check_error_rate(max_error_rate)
                if state.is_complete():
                    yield state.finish()


def _start_job(job: CorpusJob, store: str | None, stack: contextlib.ExitStack) -> CorpusProgress:
    """Lock the staging directory of a job, and find the shards that an earlier run finished."""
    require_space(job.final_dir, MIN_FREE_BYTES)
    folder = stack.enter_context(staging.staging_dir(job.final_dir, job.identity))
    name, data = job.final_dir.name, store or job.final_dir.parent
    if isinstance(data, str) or is_shared_disk(data):

        def describe(holder: str) -> str:
            return f"{data}: {holder} prepares {name} now. Wait for it, or give another --data"

        # The lock of the staging directory holds on this host only.
        stack.enter_context(hold_lease(join_location(data, f".{name}{LEASE}"), describe))
    remote, tokenizer = None, job.identity["tokenizer"]
    if store is not None:
        clear_staging(store, job.final_dir.name, keep=folder.name)
        sha256 = tokenizer["sha256"] if tokenizer else None
        remote = RemoteStaging.create(store, job.final_dir.name, folder, sha256)
    finished = remote.finished_shards(folder) if remote else staging.finished_shards(folder)
    if finished:
        console.print_note(f"{job.corpus.name}: resumes with {len(finished)} finished shards")
    keys = {stem: entry["keys"] for stem, entry in finished.items()}
    job = replace(job, staging_dir=folder, finished_keys=keys, remote=remote)
    return CorpusProgress(job, finished)


def _run_tasks(
    jobs: Sequence[CorpusJob], session: str, scheduling: SchedulingOptions
) -> Generator[dict[str, Any], None, None]:
    """Yield the results of all tasks in the order in which the tasks end."""
    import ray

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
            CorpusDatasource(jobs),
            num_cpus=0,
            override_num_blocks=len(jobs),
            concurrency=min(len(jobs), max(2, int(ray.cluster_resources().get("CPU", 1)))),
            ray_remote_args=dict(scheduling.this_node),
        )
        dataset = read.map_batches(
            functools.partial(write_block, jobs, session),
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


def _train_tokenizer(parts: list[tuple[Corpus, Path]], size: int) -> str:
    terms = [term for corpus, _ in parts for term in corpus.terms]

    def texts_of(*splits: str) -> Iterator[str]:
        for corpus, path in parts:
            yield from iter_texts(corpus, path, splits)

    return tokenizers.train_tokenizer(texts_of("train"), texts_of("pretrain"), terms, size)


#: Column of a transformed block: the reason of a rejected row, null for a good row.
REJECTED_COLUMN = "rejected"


def write_block(jobs: Sequence[CorpusJob], session: str, unit: pa.Table) -> pa.Table:
    """Transform the block of one unit and write its shard.

    Args:
        jobs: all corpora; the unit names its corpus by index.
        session: identifies this run for :mod:`pipelines.data.transforms.decode_guard`.
        unit: unit of work, see ``spool.UNIT_SCHEMA``.

    Returns:
        A table with one JSON cell: the result for ``CorpusProgress.add_result``, or the message
        of an error. Ray would wrap an exception beyond recognition.
    """
    # Decoders allocate what they freed at once again. Keeping the memory saves a tenth of the time.
    keep_freed_memory()
    try:
        result = _write_block(jobs, session, unit)
    except StoreUnavailableError as error:
        result = {"store_unavailable": str(error)}
    except Exception as error:
        message = user_error_message(error)
        if message is None:
            raise
        result = {"user_error": message}
    return pa.table({"result": [json.dumps(result)]})


def _write_block(jobs: Sequence[CorpusJob], session: str, unit: pa.Table) -> dict[str, Any]:
    index, split, shard = (unit[name][0].as_py() for name in ("corpus", "split", "shard"))
    job = jobs[index]
    if shard in (USER_ERROR, STORE_UNAVAILABLE):
        kind = "user_error" if shard == USER_ERROR else "store_unavailable"
        return {kind: unit["raw"][0].as_py().decode()}
    if split is None:
        summary = json.loads(unit["raw"][0].as_py())
        return {"corpus": index, "summary": summary, "units": unit["units"][0].as_py()}
    block, stem = unpack_unit(unit), staging.shard_stem(split, shard)
    tokenizer = job.remote.fetch_tokenizer() if job.remote is not None else job.tokenizer
    with decode_guard.watch_block(session, f"{index}-{stem}"):
        transformed = transform_block(job.corpus, tokenizer, block)
    good, rejected = split_rejected(transformed, block)
    schema = job.corpus.schema(split)
    table = good.select(schema.names).cast(schema)
    folder = job.staging_dir if job.remote is None else job.remote.scratch_dir(job.staging_dir)
    keys = unit["keys"][0].as_py()
    checks = digest_shard(table, job.corpus.modality)
    entry = staging.write_shard_entry(folder, split, shard, table, rejected, keys, checks)
    if job.remote is not None:
        job.remote.upload_shard(folder, stem)
    return {
        "corpus": index,
        "stem": stem,
        "entry": entry if job.remote is not None else None,
        "rows": block.num_rows,
        "bad": Counter(row["reason"] for row in rejected),
    }


def transform_block(corpus: Corpus, tokenizer: Path | None, block: pa.Table) -> pa.Table:
    """Transform a block of raw rows.

    Args:
        corpus: corpus of the rows.
        tokenizer: tokenizer file, if the corpus needs one.
        block: ``ROW_COLUMNS`` and the raw columns.

    Returns:
        The columns of the corpus, ``ROW_COLUMNS`` and ``REJECTED_COLUMN``; one row per raw row.
    """
    transformed = corpus.transform(
        block, tokenizers.load_tokenizer(tokenizer) if tokenizer else None
    )
    assert transformed.num_rows == block.num_rows, f"{corpus.name}: the transform lost rows"
    if REJECTED_COLUMN not in transformed.column_names:
        nulls = pa.nulls(transformed.num_rows, pa.string())
        transformed = transformed.append_column(REJECTED_COLUMN, nulls)
    if "symbols" in transformed.column_names and "log_mel" in transformed.column_names:
        transformed = _reject_unalignable(transformed)
    for column in ROW_COLUMNS:
        transformed = transformed.append_column(column, block[column.name])
    return transformed


def _reject_unalignable(transformed: pa.Table) -> pa.Table:
    """Return a block whose rows with an impossible transcript have a reason."""
    symbols, mel = (transformed[name].combine_chunks() for name in ("symbols", "log_mel"))
    problems = find_ctc_problems(symbols, pa.compute.list_value_length(mel).to_numpy())
    known = transformed[REJECTED_COLUMN].to_pylist()
    reasons = [reason or problem for reason, problem in zip(known, problems, strict=True)]
    place = transformed.schema.get_field_index(REJECTED_COLUMN)
    return transformed.set_column(place, REJECTED_COLUMN, pa.array(reasons, pa.string()))


def split_rejected(transformed: pa.Table, block: pa.Table) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Separate good rows from rejected rows.

    Args:
        transformed: see :func:`transform_block`.
        block: raw rows of the same block, in the same order.

    Returns:
        The good rows, and one line of the quarantine for each rejected row.
    """
    bad = pa.compute.is_valid(transformed[REJECTED_COLUMN])
    if not pa.compute.any(bad).as_py():
        return transformed, []
    rows = block.select(_quarantine_columns(block)).filter(bad).to_pylist()
    for row in rows:
        if row.get("media") is not None:
            row["media"] = str(MediaRef(**row["media"]))
    reasons = transformed[REJECTED_COLUMN].filter(bad).to_pylist()
    lines = [
        {key: value for key, value in row.items() if value is not None} | {"reason": reason}
        for row, reason in zip(rows, reasons, strict=True)
    ]
    return transformed.filter(pa.compute.invert(bad)), lines


def _quarantine_columns(block: pa.Table) -> list[str]:
    """Return the columns that locate a row in its source, and its media reference."""
    media = (f.name for f in block.schema if f.name == "media" and f.type == MEDIA)
    return ["key", *(name for name in (*SOURCE_COLUMNS, *media) if name in block.column_names)]
