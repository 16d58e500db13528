"""Ray Data's way into a corpus: a task reads its rows in order and yields block after block.

A row of the dataset is the work of a whole shard, its raw rows in one cell as an Arrow IPC
stream: Ray Data cuts and joins blocks of rows as it sees fit, and cannot cut a cell. It stops the
reading task while the object store holds more than its share, so no more is read than is used.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial as bound
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipelines.corpora.base import Corpus, Sources
from pipelines.preprocessing.blocks import read_blocks
from pipelines.preprocessing.remote_staging import Delivery
from pipelines.preprocessing.spool import UNIT, pack, read_spool, rejected_beside
from pipelines.preprocessing.staging import READ, REJECTED_ROWS, stem_of
from skillnet_platform.cli import users_mistake
from skillnet_platform.storage import disk_guard, write_json
from skillnet_platform.storage.directories import StoreUnavailable

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


def _read(job: Job) -> Iterator[pa.Table]:
    return map(pack, read_blocks(job.corpus, job.sources, job.folder / REJECTED_ROWS))


def _spooled(job: Job) -> Iterator[pa.Table]:
    assert job.spool is not None
    shutil.copyfile(rejected_beside(job.spool), job.folder / REJECTED_ROWS)
    return read_spool(job.spool)


def _column(name: str, value: int) -> tuple[int, pa.Field, pa.Array]:
    place = UNIT.get_field_index(name)
    return place, UNIT.field(place), pa.array([value], UNIT.field(place).type)


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
