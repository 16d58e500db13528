"""Ray Data source of corpora: one task per corpus reads its rows in order and yields blocks.

A row of the dataset is the work of one shard: its raw rows lie in one cell as an Arrow IPC stream.
Ray Data splits and merges blocks of rows freely, but it cannot split a cell. Ray Data pauses a
reading task while the object store holds more than its share, so reading never runs far ahead.
"""

import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipelines.data.corpora.base import Corpus, SourceArchives
from pipelines.data.preprocessing.blocks import (
    UNIT_SCHEMA,
    pack_unit,
    read_blocks,
    read_spool_units,
    rejected_rows_path,
)
from pipelines.data.preprocessing.remote_staging import RemoteStaging
from pipelines.data.preprocessing.staging import READ_SUMMARY, REJECTED_ROWS, shard_stem
from skillnet_platform.cli import user_error_message
from skillnet_platform.storage import disk_guard, write_json
from skillnet_platform.storage.retry import StoreUnavailableError


@dataclass(frozen=True)
class CorpusJob:
    """One corpus to prepare: its sources, its destination and its state before the run.

    ``prepare`` fills the first six fields. ``pipeline.write_corpora`` adds the others.

    Args:
        corpus: reads and transforms the rows.
        sources: downloaded archives of the corpus.
        final_dir: directory of the finished corpus.
        identity: part of the manifest that is known before the work and that decides the bytes;
            see ``prepare.build_corpus_identity``.
        tokenizer: tokenizer file on this node, if the corpus has text columns.
        spool: file of blocks that were read before, if the tokenizer was trained on them.
        staging_dir: directory of unfinished work; all nodes see it unless ``remote`` is set.
        finished_keys: stem of a finished shard -> digest of the keys of its rows. Blocks with an
            equal digest are not prepared again.
        remote: destination of the shards, if the corpus is prepared into an object store.
    """

    corpus: Corpus
    sources: SourceArchives
    final_dir: Path
    identity: dict[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None
    spool: Path | None = None
    staging_dir: Path = Path()
    finished_keys: dict[str, str] = field(default_factory=dict)
    remote: RemoteStaging | None = None


#: Values of ``shard`` in units that carry an error message instead of rows.
USER_ERROR, STORE_UNAVAILABLE = -1, -2


class CorpusDatasource(Datasource):
    """Ray Data source that yields the blocks of several corpora, with one task per corpus."""

    def __init__(self, jobs: Sequence[CorpusJob]) -> None:
        self.jobs = jobs

    def estimate_inmemory_data_size(self) -> int | None:
        """Return ``None``: the size is unknown before the rows were read."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """Return one task per corpus, because the rows of a corpus have an order."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(functools.partial(read_units, index, job), unknown, schema=UNIT_SCHEMA)
            for index, job in enumerate(self.jobs)
        ]


def read_units(index: int, job: CorpusJob) -> Iterator[pa.Table]:
    """Yield the unfinished blocks of a corpus as units of work, and last its summary.

    A user error in the sources and an unavailable object store are yielded as units too, because
    Ray would wrap an exception beyond recognition.

    Args:
        index: position of the corpus among the jobs.
        job: corpus to read.
    """
    try:
        with disk_guard(job.staging_dir):
            yield from _read_units(index, job)
    except StoreUnavailableError as error:
        yield _error_unit(index, STORE_UNAVAILABLE, str(error))
    except Exception as error:
        message = user_error_message(error)
        if message is None:
            raise
        yield _error_unit(index, USER_ERROR, message)


def _error_unit(index: int, kind: int, message: str) -> pa.Table:
    row = {"corpus": index, "shard": kind, "raw": message.encode()}
    return pa.Table.from_pylist([row], schema=UNIT_SCHEMA)


def _read_units(index: int, job: CorpusJob) -> Iterator[pa.Table]:
    yielded = 0
    for unit in _read_spooled(job) if job.spool is not None else _read_sources(job):
        split, shard, keys = (unit[name][0].as_py() for name in ("split", "shard", "keys"))
        if split is None:
            summary = json.loads(unit["raw"][0].as_py())
            write_json(job.staging_dir / READ_SUMMARY, {"summary": summary, "units": yielded})
            unit = unit.set_column(*_make_column("units", yielded))
        elif job.finished_keys.get(shard_stem(split, shard)) == keys:
            continue
        yielded += 1
        yield unit.set_column(*_make_column("corpus", index))


def _read_sources(job: CorpusJob) -> Iterator[pa.Table]:
    return map(pack_unit, read_blocks(job.corpus, job.sources, job.staging_dir / REJECTED_ROWS))


def _read_spooled(job: CorpusJob) -> Iterator[pa.Table]:
    assert job.spool is not None
    shutil.copyfile(rejected_rows_path(job.spool), job.staging_dir / REJECTED_ROWS)
    return read_spool_units(job.spool)


def _make_column(name: str, value: int) -> tuple[int, pa.Field, pa.Array]:
    index = UNIT_SCHEMA.get_field_index(name)
    field = UNIT_SCHEMA.field(index)
    return index, field, pa.array([value], field.type)
