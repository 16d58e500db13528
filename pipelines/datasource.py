"""Ray Data's way into a corpus: a task reads its rows in order and yields block after block.

A row of the dataset is the work of a whole shard, its raw rows in one cell as an Arrow IPC
stream: Ray Data cuts and joins blocks of rows as it sees fit, and cannot cut a cell. It stops the
reading task while the object store holds more than its share, so no more is read than is used.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial as bound
from pathlib import Path

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipelines.blocks import Block, Summary, read_blocks
from pipelines.corpora.base import Corpus, Sources
from pipelines.delivery import Delivery
from pipelines.partial import READ, REJECTED_ROWS, stem_of
from skillnet_platform.cli import users_mistake
from skillnet_platform.storage import disk_guard, write_json
from skillnet_platform.storage.directories import StoreUnavailable

#: Of a unit of work. The last unit of a corpus has no split: its ``raw`` is the summary, and
#: ``units`` the number of units before it.
UNIT = pa.schema(
    [
        ("corpus", pa.int32()),
        ("split", pa.string()),
        ("shard", pa.int32()),
        ("keys", pa.string()),
        ("units", pa.int64()),
        ("raw", pa.large_binary()),
    ]
)
#: The shards of units that tell of a user's mistake, and of a store that is away.
MISTAKE, AWAY = -1, -2


@dataclass(frozen=True)
class Job:
    """A corpus to prepare.

    Args:
        corpus: it.
        sources: its archives.
        folder: of the shards in the making; all nodes see it.
        tokenizer: file of the tokenizer, if the corpus needs one.
        spool: file of blocks that were read before, if they were.
        finished: digest of the keys of blocks that are not read again, by stem.
        delivery: where its shards go, if that is a store.
    """

    corpus: Corpus
    sources: Sources
    folder: Path
    tokenizer: Path | None = None
    spool: Path | None = None
    finished: dict[str, str] = field(default_factory=dict)
    delivery: Delivery | None = None


class CorpusBlocks(Datasource):
    """The blocks of some corpora, one reading task for each."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs

    def estimate_inmemory_data_size(self) -> int | None:
        """Nobody knows before the rows were read."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """One task for each corpus: its rows have an order."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(bound(units, number, job), unknown, schema=UNIT)
            for number, job in enumerate(self.jobs)
        ]


def units(number: int, job: Job) -> Iterator[pa.Table]:
    """The blocks of a corpus that are not finished, as units of work, and its summary.

    A user's mistake in the sources, or a store that is away, is a unit too: Ray would wrap an
    exception beyond recognition.
    """
    try:
        with disk_guard(job.folder):
            yield from _units(number, job)
    except StoreUnavailable as problem:
        yield _told(number, AWAY, str(problem))
    except Exception as problem:
        message = users_mistake(problem)
        if message is None:
            raise
        yield _told(number, MISTAKE, message)


def _told(number: int, kind: int, message: str) -> pa.Table:
    row = {"corpus": number, "shard": kind, "raw": message.encode()}
    return pa.Table.from_pylist([row], schema=UNIT)


def _units(number: int, job: Job) -> Iterator[pa.Table]:
    given = 0
    for unit in _spooled(job) if job.spool is not None else _read(job):
        split, shard, keys = (unit[name][0].as_py() for name in ("split", "shard", "keys"))
        if split is None:
            summary = json.loads(unit["raw"][0].as_py())
            write_json(job.folder / READ, {"summary": summary, "units": given})
            unit = unit.set_column(*_column("units", given))
        elif job.finished.get(stem_of(split, shard)) == keys:
            continue
        given += 1
        yield unit.set_column(*_column("corpus", number))


def pack(part: Block | Summary) -> pa.Table:
    """A unit of work."""
    if isinstance(part, Summary):
        return pa.Table.from_pylist([{"raw": json.dumps(asdict(part)).encode()}], schema=UNIT)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, part.table.schema) as writer:
        writer.write_table(part.table)
    raw = sink.getvalue()
    ends = pa.py_buffer(memoryview(bytes(8) + len(raw).to_bytes(8, "little")))
    cell = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, raw])
    row = {"split": part.split, "shard": part.shard, "keys": part.keys}
    values = [pa.array([row.get(f.name)], f.type) for f in UNIT if f.name != "raw"]
    return pa.Table.from_arrays([*values, cell], schema=UNIT)


def unpack(unit: pa.Table) -> pa.Table:
    """The raw rows of a unit, without a copy."""
    with pa.ipc.open_stream(unit["raw"].chunk(0)[0].as_buffer()) as reader:
        return reader.read_all()


def write_spool(corpus: Corpus, sources: Sources, path: Path) -> None:
    """Read a corpus once and keep its blocks in a file, for those that read them twice.

    The rows that were set aside go to a file beside it.

    Raises:
        UserError: the disk is full.
    """
    with (
        disk_guard(path),
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, UNIT) as writer,
    ):
        for part in read_blocks(corpus, sources, rejected_beside(path)):
            writer.write_table(pack(part))


def read_spool(path: Path) -> Iterator[pa.Table]:
    """The units of a spool file, mapped, one at a time."""
    with pa.memory_map(str(path)) as stream:
        for batch in pa.ipc.open_stream(stream):
            yield pa.Table.from_batches([batch])


def rejected_beside(spool: Path) -> Path:
    """The file of rows that were set aside while a spool was written."""
    return spool.with_suffix(".rejected.jsonl")


def texts(corpus: Corpus, spool: Path, splits: Iterable[str]) -> Iterator[str]:
    """The texts of some splits that the tokenizer learns from."""
    for unit in read_spool(spool):
        if unit["split"][0].as_py() not in splits:
            continue
        block = unpack(unit)
        for name in corpus.text_columns:
            values = block[name]
            kind = values.type
            nested = pa.types.is_list(kind) or pa.types.is_large_list(kind)
            yield from (pa.compute.list_flatten(values) if nested else values).to_pylist()


def _read(job: Job) -> Iterator[pa.Table]:
    return map(pack, read_blocks(job.corpus, job.sources, job.folder / REJECTED_ROWS))


def _spooled(job: Job) -> Iterator[pa.Table]:
    assert job.spool is not None
    shutil.copyfile(rejected_beside(job.spool), job.folder / REJECTED_ROWS)
    return read_spool(job.spool)


def _column(name: str, value: int) -> tuple[int, pa.Field, pa.Array]:
    place = UNIT.get_field_index(name)
    return place, UNIT.field(place), pa.array([value], UNIT.field(place).type)
