"""The work of the tasks that prepare a corpus: units of raw rows, and shards made of them.

    read_units: rows -> blocks -> units  ==>  write_block: unit -> columns -> shard

Both run in Ray tasks (:mod:`pipelines.data.preprocessing.ray_tasks`) or in processes of this
machine (:mod:`pipelines.data.preprocessing.local_tasks`), so this module imports neither Ray nor
torch.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.data.corpora.base import ROW_COLUMNS, Corpus, CorpusPart, SourceArchives
from pipelines.data.io.media import MEDIA, MediaRef
from pipelines.data.preprocessing import staging
from pipelines.data.preprocessing.blocks import (
    IN_PROCESS,
    SOURCE_COLUMNS,
    UNIT_SCHEMA,
    TaskStarter,
    pack_unit,
    read_blocks,
    read_spool_units,
    rejected_rows_path,
    unpack_unit,
)
from pipelines.data.preprocessing.remote_staging import RemoteStaging
from pipelines.data.preprocessing.staging import READ_SUMMARY, REJECTED_ROWS, shard_stem
from pipelines.data.shards.row_checks import digest_shard
from pipelines.data.tokenizer import training as tokenizers
from pipelines.data.transforms import decode_guard
from skillnet.modality import is_media_modality
from skillnet_platform.cli import user_error_message
from skillnet_platform.storage import disk_guard, write_json
from skillnet_platform.storage.retry import StoreUnavailableError


@dataclass(frozen=True)
class CorpusJob:
    """One corpus to prepare: its sources, its destination and its state before the run.

    ``prepare`` fills the first seven fields. ``pipeline.write_corpora`` adds the others.

    Args:
        corpus: reads and transforms the rows.
        sources: downloaded archives of the corpus.
        final_dir: directory of the finished corpus.
        identity: part of the manifest that is known before the work and that decides the bytes;
            see ``prepare.build_corpus_identity``.
        tokenizer: tokenizer file on this node, if the corpus has text columns.
        spool: file of blocks that were read before, for the tokenizer or for the labels.
        parts: parts of the corpus that tasks read; none if it is read whole.
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
    parts: Sequence[CorpusPart] = ()
    staging_dir: Path = Path()
    finished_keys: dict[str, str] = field(default_factory=dict)
    remote: RemoteStaging | None = None


#: Values of ``shard`` in units that carry an error message instead of rows.
USER_ERROR, STORE_UNAVAILABLE = -1, -2


def list_writable(jobs: Sequence[CorpusJob]) -> list[CorpusJob]:
    """Return jobs without what only their readers need, which every task would receive."""
    return [replace(job, parts=(), finished_keys={}) for job in jobs]


def read_units(index: int, job: CorpusJob, tasks: TaskStarter = IN_PROCESS) -> Iterator[pa.Table]:
    """Yield the unfinished blocks of a corpus as units of work, and last its summary.

    A user error in the sources and an unavailable object store are yielded as units too, because
    Ray would wrap an exception beyond recognition.

    Args:
        index: position of the corpus among the jobs.
        job: corpus to read.
        tasks: read the parts of the corpus.
    """
    try:
        with disk_guard(job.staging_dir):
            yield from _read_units(index, job, tasks)
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


def _read_units(index: int, job: CorpusJob, tasks: TaskStarter) -> Iterator[pa.Table]:
    yielded = 0
    for unit in _read_spooled(job) if job.spool is not None else _read_sources(job, tasks):
        split, shard, keys = (unit[name][0].as_py() for name in ("split", "shard", "keys"))
        if split is None:
            summary = json.loads(unit["raw"][0].as_py())
            write_json(job.staging_dir / READ_SUMMARY, {"summary": summary, "units": yielded})
            unit = unit.set_column(*_make_column("units", yielded))
        elif job.finished_keys.get(shard_stem(split, shard)) == keys:
            continue
        yielded += 1
        yield unit.set_column(*_make_column("corpus", index))


def _read_sources(job: CorpusJob, tasks: TaskStarter) -> Iterator[pa.Table]:
    rejected = job.staging_dir / REJECTED_ROWS
    return map(pack_unit, read_blocks(job.corpus, job.sources, rejected, job.parts, tasks))


def _read_spooled(job: CorpusJob) -> Iterator[pa.Table]:
    assert job.spool is not None
    shutil.copyfile(rejected_rows_path(job.spool), job.staging_dir / REJECTED_ROWS)
    return read_spool_units(job.spool)


def _make_column(name: str, value: int) -> tuple[int, pa.Field, pa.Array]:
    index = UNIT_SCHEMA.get_field_index(name)
    field = UNIT_SCHEMA.field(index)
    return index, field, pa.array([value], field.type)


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
    if any(is_media_modality(job.corpus.modality) for job in jobs):
        # torch loads with it, which texts do not need.
        from skillnet.precision import keep_freed_memory

        # Decoders allocate what they freed at once again. Keeping the memory saves a tenth of the
        # time.
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
    # scipy loads with it.
    from pipelines.data.transforms.sound import find_ctc_problems

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
