"""TODO: pipelines.preprocessing.spool."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from pipelines.corpora.base import Corpus, Sources
from pipelines.preprocessing.blocks import Block, Summary, read_blocks
from skillnet_platform.storage import disk_guard

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
