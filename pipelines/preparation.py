"""Preparing corpora with Ray Data: blocks of raw rows flow in, finished shards stay on the disk.

    a task a corpus: rows -> blocks  ==>  tasks: transform a block, write its shard  ==>  driver
         |                 (as many as the object store holds)      |                  |
         +--> rows set aside                     shard and entry <--+      manifest <--+

Nothing but a few blocks is in memory at any time, however large a corpus is. A shard is whole
once its entry lies beside it, and a prepare that was killed goes on with the shards that are
whole (``pipelines/partial.py``). The driver counts, stops if too many rows are bad, and puts a
corpus in place, manifest last, as soon as all of its blocks are done. Towards a store each shard is
sent as soon as it is whole (``pipelines/delivery.py``).
"""

import contextlib
import json
import logging
import secrets
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial as bound
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import guard, partial
from pipelines import tokenizer as tokenizers
from pipelines.blocks import PLACES, Summary
from pipelines.corpora.base import Corpus, Sources
from pipelines.datasource import AWAY, MISTAKE, CorpusBlocks, Job, texts, unpack, write_spool
from pipelines.delivery import Delivery, clear_making
from pipelines.media import MEDIA, MediaRef
from pipelines.shards import FORMAT_VERSION, MANIFEST, manifest_digest
from skillnet.memory import keep_freed_memory
from skillnet_platform import cluster, console
from skillnet_platform.cli import users_mistake
from skillnet_platform.errors import UserError
from skillnet_platform.remote import StoreUnavailable
from skillnet_platform.storage import atomic_write, require_space, write_json

MADE_WITH = ("pyarrow", "numpy", "pillow", "resvg_py", "av", "tokenizers", "ray")
#: The column of a transform that says why a row goes nowhere.
REJECTED = "rejected"
#: Fewer bytes free than this, and nothing is begun.
LEAST_FREE = 2**20
#: So many rows are looked at before their share of bad ones says something.
FEWEST_TO_JUDGE = 100
#: A manifest counts so many reasons by name, the most frequent.
MOST_REASONS = 100


@dataclass
class Order:
    """A corpus to be prepared.

    Args:
        corpus: it.
        final: its directory.
        identity: the part of the manifest that is known before: see ``prepare.identity_of``.
        tokenizer: file of the tokenizer, if it needs one.
        spool: file of its blocks, if they were read before.
    """

    corpus: Corpus
    final: Path
    identity: dict[str, Any]
    tokenizer: Path | None = None
    spool: Path | None = None


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
    session = secrets.token_hex(8)
    with contextlib.ExitStack() as stack:
        stack.callback(guard.forget, session)
        states, jobs = [], []
        for order in orders:
            require_space(order.final, LEAST_FREE)
            folder = stack.enter_context(partial.partial(order.final, order.identity))
            delivery, words = None, order.identity["tokenizer"]
            if store is not None:
                clear_making(store, order.final.name, but=folder.name)
                sha256 = words["sha256"] if words else None
                delivery = Delivery.into(store, order.final.name, folder, sha256)
            before = delivery.finished(folder) if delivery else partial.finished(folder)
            states.append(_State(order, folder, before, delivery))
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


def write_block(jobs: Sequence[Job], session: str, unit: pa.Table) -> pa.Table:
    """Do a unit of work: transform its block and write its shard. Returns what was done."""
    keep_freed_memory()  # what decoders give back they want again at once: a tenth of their time
    try:
        done = _write_block(jobs, session, unit)
    except StoreUnavailable as problem:
        done = {"away": str(problem)}  # Ray would wrap either beyond recognition
    except Exception as problem:
        message = users_mistake(problem)
        if message is None:
            raise
        done = {"mistake": message}
    return pa.table({"done": [json.dumps(done)]})


def _write_block(jobs: Sequence[Job], session: str, unit: pa.Table) -> dict[str, Any]:
    number, split, shard = (unit[name][0].as_py() for name in ("corpus", "split", "shard"))
    job = jobs[number]
    if shard in (MISTAKE, AWAY):
        kind = "mistake" if shard == MISTAKE else "away"
        return {kind: unit["raw"][0].as_py().decode()}
    if split is None:
        summary = json.loads(unit["raw"][0].as_py())
        return {"corpus": number, "summary": summary, "units": unit["bad"][0].as_py()}
    block, stem = unpack(unit), partial.stem_of(split, shard)
    tokenizer = job.delivery.tokenizer() if job.delivery is not None else job.tokenizer
    with guard.watched(session, f"{number}-{stem}"):
        made = transform_block(job.corpus, tokenizer, block)
    good, rejected = split_rejected(made, block)
    schema = job.corpus.schema(split)
    table = good.select(schema.names).cast(schema)
    folder = job.folder if job.delivery is None else job.delivery.workplace(job.folder)
    keys = unit["keys"][0].as_py()
    entry = partial.write_entry(folder, split, shard, table, rejected, keys)
    if job.delivery is not None:
        job.delivery.send(folder, stem)
    return {
        "corpus": number,
        "stem": stem,
        "entry": entry if job.delivery is not None else None,
        "rows": block.num_rows,
        "bad_read": unit["bad"][0].as_py(),
        "bad": Counter(row["reason"] for row in rejected),
    }


def transform_block(corpus: Corpus, tokenizer: Path | None, block: pa.Table) -> pa.Table:
    """The finished block: the columns of the corpus, key, group, and why a row is rejected."""
    made = corpus.transform(block, tokenizers.load(tokenizer) if tokenizer else None)
    assert made.num_rows == block.num_rows, f"{corpus.name}: the transform lost rows"
    if REJECTED not in made.column_names:
        made = made.append_column(REJECTED, pa.nulls(made.num_rows, pa.string()))
    for name in ("key", "group"):
        made = made.append_column(name, block[name])
    return made


def split_rejected(made: pa.Table, block: pa.Table) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The good rows of a finished block, and a line of the quarantine for each other one."""
    bad = pa.compute.is_valid(made[REJECTED])
    if not pa.compute.any(bad).as_py():
        return made, []
    rows = block.select(_places(block)).filter(bad).to_pylist()
    for row in rows:
        if row.get("media") is not None:
            row["media"] = str(MediaRef(**row["media"]))
    reasons = made[REJECTED].filter(bad).to_pylist()
    lines = [
        {key: value for key, value in row.items() if value is not None} | {"reason": reason}
        for row, reason in zip(rows, reasons, strict=True)
    ]
    return made.filter(pa.compute.invert(bad)), lines


@dataclass
class _State:
    """How far a corpus is.

    Args:
        order: the corpus.
        folder: of its shards.
        before: entries of shards that an earlier run finished, by stem.
        delivery: where the shards go, if that is a store.
    """

    order: Order
    folder: Path
    before: dict[str, dict[str, Any]]
    delivery: Delivery | None = None
    summary: Summary | None = None
    units: int = 0
    done: set[str] = field(default_factory=set)
    rows: int = 0
    bad_read: int = 0
    bad: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for entry in self.before.values():
            self.rows += len(entry["rejected"]) + (entry["file"] or {"rows": 0})["rows"]
            self.bad.update(row["reason"] for row in entry["rejected"])

    def count(self, done: dict[str, Any]) -> int:
        """Take note of what a task did; returns how many rows that were."""
        if "summary" in done:
            self.summary, self.units = Summary(**done["summary"]), done["units"]
            return 0
        self.done.add(done["stem"])
        if done["entry"] is not None:  # it was written on whichever host
            write_json(self.folder / f"{done['stem']}.json", done["entry"])
        self.rows += done["rows"]
        self.bad_read = max(self.bad_read, done["bad_read"])
        self.bad.update(done["bad"])
        return int(done["rows"])

    def is_complete(self) -> bool:
        """Whether all blocks were read and all of them are done."""
        return self.summary is not None and len(self.done) == self.units

    def judge(self, max_bad: float) -> None:
        """Stop if more than that share of the rows is bad.

        Raises:
            UserError: saying how many, and why.
        """
        name = self.order.corpus.name
        if self.summary is not None and (told := self.summary.too_broken(max_bad)):
            raise UserError(f"{name}: {told}")
        reasons = self.bad + Counter(self.summary.bad if self.summary else {})
        bad = reasons.total() if self.summary else reasons.total() + self.bad_read
        seen = self.summary.rows if self.summary else self.rows + self.bad_read
        if bad <= max_bad * seen or (seen < FEWEST_TO_JUDGE and not self.is_complete()):
            return
        most = "; ".join(f"{count} × {why}" for why, count in reasons.most_common(5))
        with atomic_write(self.told, "w") as stream:
            stream.writelines(partial.rejected_lines(self.folder))
        raise UserError(
            f"{name}: {bad} of {seen} rows cannot be used, {bad / seen:.1%}; at most {max_bad:.1%} "
            f"may be (max_bad). {most or 'All were found while reading'}. Each of them stands in "
            f"{self.told}. Mend them, or go on without them: --max_bad {bad / seen + 0.005:.2f}"
        )

    @property
    def told(self) -> Path:
        """Where a person finds the bad rows of a corpus that was not prepared."""
        return self.order.final.with_name(f"{self.order.corpus.name}.rejected.jsonl")

    def finish(self) -> dict[str, Any]:
        """Write the manifest and put the corpus in place; returns the manifest."""
        assert self.summary is not None
        corpus, splits = self.order.corpus, sorted(self.summary.counts)
        parts, reasons, set_aside = partial.gather(self.folder, self.summary.shards)
        rows_in = self.summary.rows
        rows_out = sum(entry["rows"] for entry in parts.values())
        if rows_in != rows_out + set_aside:
            raise RuntimeError(
                f"{corpus.name}: {rows_in} rows in, but {rows_out} out and {set_aside} set aside; "
                "nothing was put in place"
            )
        reasons.update(self.summary.reasons)
        schemas = [corpus.schema(split) for split in splits]
        manifest = {
            "format_version": FORMAT_VERSION,
            "corpus": corpus.name,
            "modality": corpus.modality,
            "task": corpus.task,
            "pretraining": [name for name in corpus.pretraining if name in parts],
            "schema": {f.name: str(f.type) for schema in schemas for f in schema},
            "splits": parts,
            **self.order.identity,
            **corpus.facts(),
            "rows_in": rows_in,
            "rows_out": rows_out,
            "quarantine": counted(reasons),
            **({"broken_off": self.summary.broken} if self.summary.broken else {}),
            "made_with": {name: version(name) for name in MADE_WITH},
        }
        manifest["digest"] = manifest_digest(manifest)
        write_json(self.folder / MANIFEST, manifest)
        if self.delivery is not None:
            self.delivery.commit(self.folder, manifest)
        else:
            partial.commit(self.folder, self.order.final)
        self.told.unlink(missing_ok=True)
        return manifest


def counted(reasons: Counter[str]) -> dict[str, int]:
    """Reasons by name, each with its number of rows; rare ones together if there are many."""
    if len(reasons) <= MOST_REASONS:
        return dict(sorted(reasons.items()))
    most = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:MOST_REASONS]
    rest = reasons.total() - sum(count for _, count in most)
    return dict(sorted([*most, ("other reasons", rest)]))


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


def _places(block: pa.Table) -> list[str]:
    """What the quarantine tells of a row: its place, and the medium that it refers to."""
    wanted = [*PLACES, *(f.name for f in block.schema if f.name == "media" and f.type == MEDIA)]
    return ["key", *(name for name in wanted if name in block.column_names)]


def _train_tokenizer(parts: list[tuple[Corpus, Path]], size: int) -> str:
    terms = [term for corpus, _ in parts for term in corpus.terms]

    def of(*splits: str) -> Iterator[str]:
        for corpus, path in parts:
            yield from texts(corpus, path, splits)

    return tokenizers.train(of("train"), of("pretrain"), terms, size)
