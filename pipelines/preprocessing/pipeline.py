"""Preparing corpora with Ray Data: blocks of raw rows flow in, finished shards stay on the disk.

    a task a corpus: rows -> blocks  ==>  tasks: transform a block, write its shard  ==>  driver
         |                 (as many as the object store holds)      |                  |
         +--> rows set aside                     shard and entry <--+      manifest <--+

Nothing but a few blocks is in memory at any time, however large a corpus is. A shard is whole
once its entry lies beside it, and a prepare that was killed goes on with the shards that are
whole (``pipelines/preprocessing/staging.py``). The driver counts, stops if too many rows are bad, and puts a
corpus in place, manifest last, as soon as all of its blocks are done. Towards a store each shard is
sent as soon as it is whole (``pipelines/preprocessing/remote_staging.py``).
"""

import contextlib
import json
import logging
import secrets
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial as bound
from pathlib import Path
from typing import Any

from pipelines.corpora.base import Corpus, Sources
from pipelines.preprocessing import staging
from pipelines.preprocessing.datasource import CorpusBlocks, Job, Order
from pipelines.preprocessing.progress import Making
from pipelines.preprocessing.remote_staging import Delivery, clear_making
from pipelines.preprocessing.spool import texts, write_spool
from pipelines.preprocessing.transform_task import write_block
from pipelines.tokenizer import training as tokenizers
from pipelines.transforms import decode_guard
from skillnet_platform import cluster, console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import atomic_write, require_space
from skillnet_platform.storage.directories import StoreUnavailable

#: Fewer bytes free than this, and nothing is begun.
LEAST_FREE = 2**20


@dataclass(frozen=True)
class Hosts:
    """Where Ray's tasks run.

    Args:
        here: options of those that need the disk of this host.
        anywhere: of those that do not.
        cpus: that one of the former takes.
    """

    here: dict[str, Any] = field(default_factory=dict)
    anywhere: dict[str, Any] = field(default_factory=dict)
    cpus: float = 1.0


def hosts_for(corpora: Sequence[Corpus], store: str | None) -> Hosts:
    """All hosts, which share a disk; or, towards a store, this one for reading, and all others that
    can do it for transforming.

    Raises:
        UserError: all of the work must be done here, and this host has no CPU to give away.
    """
    if store is None:
        return Hosts()
    import ray

    node = ray.get_runtime_context().get_node_id()
    (mine,) = [each for each in ray.nodes() if each["NodeID"] == node]
    has_cpu, here = bool(mine["Resources"].get("CPU")), cluster.on_this_host(ray)
    bound_here = [corpus.name for corpus in corpora if not corpus.travels()]
    if bound_here and not has_cpu:
        raise UserError(
            f"{', '.join(bound_here)}: media on a disk are read on the host that runs the command, "
            "and this one gives Ray no CPU. Put them into the store and name them by their URI, or "
            "run the same command on any machine that reaches the store"
        )
    return Hosts(here, here if bound_here else {}, float(has_cpu))


def spool(
    teachers: Sequence[Corpus], archives: Path, folder: Path, hosts: Hosts
) -> dict[str, Path]:
    """Read those corpora in parallel, each into a file of blocks; returns name -> file."""
    import ray

    task = ray.remote(num_cpus=hosts.cpus, max_retries=0, **hosts.here)(write_spool)
    files = {corpus.name: folder / f"{corpus.name}.arrows" for corpus in teachers}
    work = [task.remote(c, Sources(archives, c.archives), files[c.name]) for c in teachers]
    try:
        ray.get(work)
    except ray.exceptions.RayTaskError as problem:
        if isinstance(problem.cause, StoreUnavailable):
            raise problem.cause from None
        raise
    return files


def train_tokenizer(
    teachers: Sequence[Corpus],
    spools: dict[str, Path],
    path: Path,
    size: int,
    hosts: Hosts,
) -> None:
    """Learn the tokenizer of that many tokens from the spooled blocks of those corpora, and write
    it."""
    import ray

    task = ray.remote(num_cpus=hosts.cpus, max_retries=0, **hosts.here)(_train_tokenizer)
    learnt = ray.get(task.remote([(corpus, spools[corpus.name]) for corpus in teachers], size))
    with atomic_write(path, "w") as stream:
        stream.write(learnt)


def write_corpora(
    orders: Sequence[Order],
    archives: Path,
    max_bad: float,
    hosts: Hosts,
    store: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Prepare corpora, all at once; yields the manifest of each when it is in place.

    Args:
        orders: what to prepare.
        archives: directory of the downloads.
        max_bad: share of a corpus' rows that may be bad.
        hosts: where the work is done; see :func:`hosts_for`.
        store: URI of the folder that the corpora go to; none leaves them on this disk.

    Raises:
        UserError: the disk is full; too many bad rows; another process prepares one of them.
        StoreUnavailable: the store does not answer. What has arrived there stays.
    """
    if not orders:
        return
    session = secrets.token_hex(8)
    with contextlib.ExitStack() as stack:
        stack.callback(decode_guard.forget, session)
        states, jobs = [], []
        for order in orders:
            require_space(order.final, LEAST_FREE)
            folder = stack.enter_context(staging.partial(order.final, order.identity))
            delivery, words = None, order.identity["tokenizer"]
            if store is not None:
                clear_making(store, order.final.name, but=folder.name)
                sha256 = words["sha256"] if words else None
                delivery = Delivery.into(store, order.final.name, folder, sha256)
            before = delivery.finished(folder) if delivery else staging.finished(folder)
            states.append(Making(order, folder, before, delivery))
            if before:
                console.note(f"{order.corpus.name}: {len(before)} shards are there")
            job = Job(order.corpus, Sources(archives, order.corpus.archives), folder)
            job = replace(job, tokenizer=order.tokenizer, spool=order.spool, delivery=delivery)
            jobs.append(replace(job, finished={k: e["keys"] for k, e in states[-1].before.items()}))
        with (
            console.progress("preparing", unit="rows") as bar,
            contextlib.closing(_run(jobs, session, hosts)) as work,
        ):
            for done in work:
                if "mistake" in done:
                    raise UserError(done["mistake"])
                if "away" in done:
                    raise StoreUnavailable(done["away"])
                state = states[done["corpus"]]
                bar.advance(state.count(done), state.order.corpus.name)
                state.judge(max_bad)
                if state.is_complete():
                    yield state.finish()


def _run(jobs: Sequence[Job], session: str, hosts: Hosts) -> Generator[dict[str, Any], None, None]:
    """What each task did, in the order in which they end."""
    import ray

    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = False  # names and bytes hang on blocks alone
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A row is the work of a shard: it never waits for another one to join it in a block.
    context.target_max_block_size = 1
    # What fails is raised here and told once, by the command.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    with ray.data.DataContext.current(context):
        # A reading task waits most of the time: it holds no CPU.
        read = ray.data.read_datasource(
            CorpusBlocks(jobs),
            num_cpus=0,
            override_num_blocks=len(jobs),
            concurrency=min(len(jobs), max(2, int(ray.cluster_resources().get("CPU", 1)))),
            ray_remote_args=dict(hosts.here),
        )
        dataset = read.map_batches(
            bound(write_block, jobs, session),
            batch_format="pyarrow",
            batch_size=None,
            zero_copy_batch=True,
            num_cpus=1,
            **hosts.anywhere,
        )
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from map(json.loads, block["done"].to_pylist())


def _train_tokenizer(parts: list[tuple[Corpus, Path]], size: int) -> str:
    terms = [term for corpus, _ in parts for term in corpus.terms]

    def of(*splits: str) -> Iterator[str]:
        for corpus, path in parts:
            yield from texts(corpus, path, splits)

    return tokenizers.train(of("train"), of("pretrain"), terms, size)
