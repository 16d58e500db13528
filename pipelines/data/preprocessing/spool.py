"""Units of work in Arrow, and the spool file that keeps them for a second reading.

Corpora that train the tokenizer are read once into a spool file. The tokenizer reads their texts
from the file, and the transform tasks read the same blocks from it afterwards.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from pipelines.data.corpora.base import Corpus, SourceArchives
from pipelines.data.preprocessing.blocks import ReadSummary, RowBlock, read_blocks
from skillnet_platform.storage import disk_guard

#: Schema of a unit of work. The last unit of a corpus has no split: its ``raw`` is the summary,
#: and ``units`` is the number of units before it.
UNIT_SCHEMA = pa.schema(
    [
        ("corpus", pa.int32()),
        ("split", pa.string()),
        ("shard", pa.int32()),
        ("keys", pa.string()),
        ("units", pa.int64()),
        ("raw", pa.large_binary()),
    ]
)


def pack_unit(part: RowBlock | ReadSummary) -> pa.Table:
    """Return a block or a summary as a table of one row, a unit of work."""
    if isinstance(part, ReadSummary):
        return pa.Table.from_pylist(
            [{"raw": json.dumps(asdict(part)).encode()}], schema=UNIT_SCHEMA
        )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, part.table.schema) as writer:
        writer.write_table(part.table)
    raw = sink.getvalue()
    # The binary cell is built from buffers: ``pa.array`` would copy the block.
    ends = pa.py_buffer(memoryview(bytes(8) + len(raw).to_bytes(8, "little")))
    cell = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, raw])
    row = {"split": part.split, "shard": part.shard, "keys": part.keys}
    values = [pa.array([row.get(f.name)], f.type) for f in UNIT_SCHEMA if f.name != "raw"]
    return pa.Table.from_arrays([*values, cell], schema=UNIT_SCHEMA)


def unpack_unit(unit: pa.Table) -> pa.Table:
    """Return the raw rows of a unit without a copy."""
    with pa.ipc.open_stream(unit["raw"].chunk(0)[0].as_buffer()) as reader:
        return reader.read_all()


def write_spool(corpus: Corpus, sources: SourceArchives, path: Path) -> None:
    """Read a corpus once and write its blocks to a file for later readers.

    Rows that are rejected while reading go to a file beside it, see :func:`rejected_rows_path`.

    Args:
        corpus: corpus to read.
        sources: archives that hold its rows.
        path: spool file to write.

    Raises:
        UserError: the disk is full.
    """
    with (
        disk_guard(path),
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, UNIT_SCHEMA) as writer,
    ):
        for part in read_blocks(corpus, sources, rejected_rows_path(path)):
            writer.write_table(pack_unit(part))


def read_spool_units(path: Path) -> Iterator[pa.Table]:
    """Yield the units of a spool file one at a time, memory-mapped."""
    with pa.memory_map(str(path)) as stream:
        for batch in pa.ipc.open_stream(stream):
            yield pa.Table.from_batches([batch])


def rejected_rows_path(spool: Path) -> Path:
    """Return the path of the rows that were rejected while a spool file was written."""
    return spool.with_suffix(".rejected.jsonl")


def iter_texts(corpus: Corpus, spool: Path, splits: Iterable[str]) -> Iterator[str]:
    """Yield the texts that the tokenizer is trained on.

    Args:
        corpus: corpus that names its text columns.
        spool: spool file of the corpus.
        splits: splits to read.
    """
    for unit in read_spool_units(spool):
        if unit["split"][0].as_py() not in splits:
            continue
        block = unpack_unit(unit)
        for name in corpus.text_columns:
            values = block[name]
            kind = values.type
            nested = pa.types.is_list(kind) or pa.types.is_large_list(kind)
            yield from (pa.compute.list_flatten(values) if nested else values).to_pylist()
