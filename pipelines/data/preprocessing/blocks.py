"""Cut the rows of a corpus into blocks while they are read. One block becomes one shard.

A block holds consecutive rows of one split: ``shard_rows`` of them, or fewer if their texts are
long. The rows alone decide how they are divided into shards. A block is dropped once it was
yielded, and rejected rows go to a file, so memory does not grow with the corpus.

Corpora that train the tokenizer are read once into a spool file. The tokenizer reads their texts
from the file, and the transform tasks read the same blocks from it afterwards.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.data.corpora.base import (
    ROW_COLUMNS,
    Corpus,
    RejectedRow,
    Row,
    SourceArchives,
    find_long_text,
)
from pipelines.data.io.directory import to_printable
from pipelines.data.io.key_set import KeySet
from pipelines.data.io.source_file import format_json_line
from skillnet_platform.storage import disk_guard

#: Characters of all rows of one block, approximately: a block lies in memory.
MAX_BLOCK_CHARACTERS = 128 * 2**20
#: Columns of a row that the quarantine records to locate the row in its source.
SOURCE_COLUMNS = ("file", "row")
DUPLICATE_KEY = "the key came before"


@dataclass(frozen=True)
class RowBlock:
    """Raw rows of one shard.

    Args:
        split: split of all rows.
        shard: index of the shard in its split, from 0.
        table: ``ROW_COLUMNS`` and the raw columns of the corpus.
        keys: digest of the rows' keys, in order.
    """

    split: str
    shard: int
    table: pa.Table
    keys: str


@dataclass
class ReadSummary:
    """Counts of all rows that were read from one corpus.

    Args:
        split_rows: split -> accepted rows.
        split_shards: split -> blocks.
        rejections: reason -> rejected rows.
        errors: the part of ``rejections`` that counts as errors: rows that should have been
            readable.
        num_files: files that hold the rows.
        truncated_files: file -> number of rows before the file ends early, and why. The number of
            rows after that point is unknown.
    """

    split_rows: dict[str, int] = field(default_factory=dict)
    split_shards: dict[str, int] = field(default_factory=dict)
    rejections: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    num_files: int = 1
    truncated_files: dict[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of rows that were read, accepted and rejected."""
        return sum(self.split_rows.values()) + sum(self.rejections.values())

    def truncation_error(self, max_error_rate: float) -> str:
        """Return the message that too many files are truncated, or "" if they are not.

        Files are counted and not rows, because the number of lost rows is unknown.

        Args:
            max_error_rate: allowed fraction of truncated files.
        """
        if len(self.truncated_files) <= max_error_rate * self.num_files:
            return ""
        share = min(1.0, len(self.truncated_files) / self.num_files)
        examples = list(self.truncated_files.items())[:5]
        listed = "; ".join(f"{file} {where}" for file, where in examples)
        return (
            f"{len(self.truncated_files)} of {self.num_files} files are truncated, and the rows "
            f"after that point are lost: {listed}. The limit is {max_error_rate:.1%} of the files "
            "(max_error_rate). Replace the files, or raise the limit: "
            f"--max_error_rate {min(share + 0.005, 1.0):.2f}"
        )


def read_blocks(
    corpus: Corpus, sources: SourceArchives, rejected: Path
) -> Iterator[RowBlock | ReadSummary]:
    """Yield blocks of raw rows, and last a summary.

    Args:
        corpus: corpus whose rows are read.
        sources: archives that hold the rows.
        rejected: file for rows that are rejected while reading; it is replaced.
    """
    waiting: dict[str, list[Row]] = defaultdict(list)
    characters = Counter[str]()
    split_rows, split_shards = Counter[str](), Counter[str]()
    rejections, errors = Counter[str](), Counter[str]()
    truncated: dict[str, str] = {}
    with rejected.open("w", encoding="utf-8") as stream, KeySet() as seen:

        def reject(row: RejectedRow) -> None:
            stream.write(format_json_line(quarantine_record(row)))
            rejections[row.reason] += 1
            if row.counts_as_error:
                errors[row.reason] += 1
            if row.truncates_file:
                before = "" if row.row is None else f"after {row.row - 1} rows "
                truncated[to_printable(row.file or row.key)] = f"{before}({row.reason})"

        def cut(split: str) -> Iterator[RowBlock]:
            table, refused = rows_to_table(corpus, waiting.pop(split))
            characters[split] = 0
            for row in refused:
                reject(row)
            # A block without accepted rows becomes no shard, and the next block takes its index.
            if table.num_rows:
                split_rows[split] += table.num_rows
                yield RowBlock(split, split_shards[split], table, digest_keys(table))
                split_shards[split] += 1

        for row in corpus.rows(sources):
            row = check_row(row, seen)
            if isinstance(row, RejectedRow):
                reject(row)
                continue
            split = row["split"]
            waiting[split].append(row)
            characters[split] += _count_characters(row)
            full = len(waiting[split]) == corpus.shard_rows
            if full or characters[split] > MAX_BLOCK_CHARACTERS:
                yield from cut(split)
        # The last, incomplete blocks come in a fixed order.
        for split in sorted(waiting):
            yield from cut(split)
    yield ReadSummary(
        dict(split_rows),
        dict(split_shards),
        dict(rejections),
        dict(errors),
        corpus.num_source_files(),
        truncated,
    )


def quarantine_record(row: RejectedRow) -> dict[str, Any]:
    """Return a row's line of the quarantine: key, reason, and file and row number if known."""
    located = {"file": row.file and to_printable(row.file), "row": row.row}
    line = {"key": row.key, **{k: v for k, v in located.items() if v is not None}}
    return line | {"reason": row.reason}


def rows_to_table(corpus: Corpus, rows: list[Row]) -> tuple[pa.Table, list[RejectedRow]]:
    """Convert rows to a table, and reject rows whose values have wrong types.

    Args:
        corpus: corpus that declares the types of its raw columns.
        rows: raw rows.

    Returns:
        The table of the rows that fit, and the other rows.
    """
    schema = pa.schema([*ROW_COLUMNS, *corpus.raw_schema])
    try:
        return pa.Table.from_pylist(rows, schema=schema), []
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeError, OverflowError, TypeError):
        # At least one row does not fit. Only now pay for a check of each row.
        pass
    good, refused = [], []
    for row in rows:
        reason = _find_misfit(row, schema)
        if reason:
            refused.append(_make_error_row(row, reason))
        else:
            good.append(row)
    return pa.Table.from_pylist(good, schema=schema), refused


def digest_keys(table: pa.Table) -> str:
    """Return the SHA-256 of the keys of a table, in order.

    In an unchanged corpus, equal digests mean equal rows.
    """
    text = "\n".join(table["key"].to_pylist())
    return hashlib.sha256(text.encode()).hexdigest()


def check_row(row: Row | RejectedRow, seen: KeySet) -> Row | RejectedRow:
    """Return a row, or its rejection if its key came before or one of its texts is too long.

    Args:
        row: as the corpus yields it.
        seen: keys of earlier rows; extended in place.
    """
    if isinstance(row, RejectedRow):
        return row if seen.add(row.key) else _make_duplicate(row.key, row.file, row.row)
    key = row["key"]
    if isinstance(row.get("file"), str):
        row["file"] = to_printable(row["file"])
    if not seen.add(key):
        return _make_duplicate(key, row.get("file"), row.get("row"))
    reason = find_long_text(row)
    return _make_error_row(row, reason) if reason else row


def _count_characters(row: Row) -> int:
    count = 0
    for value in row.values():
        if isinstance(value, str):
            count += len(value)
        elif isinstance(value, list) and value and isinstance(value[0], str):
            count += sum(map(len, value))
    return count


def _make_duplicate(key: str, file: Any, row: Any) -> RejectedRow:
    return RejectedRow(key, DUPLICATE_KEY, file=file, row=row, counts_as_error=True)


def _make_error_row(row: Row, reason: str) -> RejectedRow:
    return RejectedRow(
        str(row["key"]), reason, file=row.get("file"), row=row.get("row"), counts_as_error=True
    )


def _find_misfit(row: Row, schema: pa.Schema) -> str:
    """Return which value does not fit its column, or "" if all values fit."""
    for column in schema:
        try:
            pa.array([row.get(column.name)], column.type)
        except UnicodeError:
            if column.name == "media":
                return "the media file's name is not UTF-8; rename it"
            return f"{column.name} is not Unicode text"
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, TypeError):
            kind = type(row.get(column.name)).__name__
            return f"{column.name} is of type {kind}, expected {column.type}"
    return ""


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
