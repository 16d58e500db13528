"""Ray task of one shard: transform a block of raw rows, and write the rows that are good."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.data.corpora.base import ROW_COLUMNS, Corpus
from pipelines.data.io.media import MEDIA, MediaRef
from pipelines.data.preprocessing import staging
from pipelines.data.preprocessing.blocks import SOURCE_COLUMNS
from pipelines.data.preprocessing.corpus_job import CorpusJob
from pipelines.data.preprocessing.datasource import STORE_UNAVAILABLE, USER_ERROR
from pipelines.data.preprocessing.spool import unpack_unit
from pipelines.data.shards.row_checks import digest_shard
from pipelines.data.tokenizer import training as tokenizers
from pipelines.data.transforms import decode_guard
from pipelines.data.transforms.ctc_alignment import find_ctc_problems
from skillnet.precision import keep_freed_memory
from skillnet_platform.cli import user_error_message
from skillnet_platform.storage.directories import StoreUnavailableError

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
