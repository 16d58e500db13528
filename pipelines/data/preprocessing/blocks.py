"""Cut the rows of a corpus into blocks while they are read. One block becomes one shard.

A block holds consecutive rows of one split: ``shard_rows`` of them, or fewer if their texts are
long. The rows alone decide how they are divided into shards. A block is dropped once it was
yielded, and rejected rows go to a file, so memory does not grow with the corpus.

Corpora that train the tokenizer, and corpora of several parts whose classes are not known, are read
once into a spool file. The tokenizer reads their texts from the file, and the transform tasks read
the same blocks from it afterwards.
"""

import hashlib
import json
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.corpora.base import (
    MAX_TEXT_LENGTH,
    ROW_COLUMNS,
    Corpus,
    CorpusPart,
    RejectedRow,
    Row,
    SourceArchives,
    measure_texts,
)
from pipelines.data.corpora.readers.row_builders import error_row
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


#: Rows, and characters of their texts, that are converted to a table at once.
FRAGMENT_ROWS, FRAGMENT_CHARACTERS = 4096, 2**22
#: Column of a fragment beside those of the corpus.
SPLIT = pa.field("split", pa.string())


class RowFragment(NamedTuple):
    """Consecutive rows of a corpus.

    Args:
        table: accepted rows: ``SPLIT``, ``ROW_COLUMNS`` and the raw columns of the corpus.
        characters: characters of the texts of each accepted row, (N,) int64.
        rejected: the other rows, in order.
    """

    table: pa.Table
    characters: np.ndarray
    rejected: list[RejectedRow]


def read_fragments(
    corpus: Corpus, sources: SourceArchives, seen: KeySet | None = None
) -> Iterator[RowFragment]:
    """Yield the rows of a corpus, or of a part of one, with bounded memory.

    Args:
        corpus: corpus whose rows are read.
        sources: archives that hold the rows.
        seen: keys of earlier rows; None if no key repeats.
    """
    rows: list[Row] = []
    characters: list[int] = []
    rejected: list[RejectedRow] = []
    total = 0
    for row in corpus.rows(sources):
        checked, count = check_row(row, seen)
        if isinstance(checked, RejectedRow):
            rejected.append(checked)
        else:
            rows.append(checked)
            characters.append(count)
            total += count
        if len(rows) + len(rejected) == FRAGMENT_ROWS or total > FRAGMENT_CHARACTERS:
            yield _make_fragment(corpus, rows, characters, rejected)
            rows, characters, rejected, total = [], [], [], 0
    yield _make_fragment(corpus, rows, characters, rejected)


def read_part(corpus: Corpus, sources: SourceArchives) -> list[RowFragment]:
    """Return the rows of a bounded part of a divided corpus; the work of a task.

    The part fits into memory, so its texts are measured by columns, and not row by row.
    """
    fragments = []
    found = corpus.rows(sources)
    while some := list(islice(found, FRAGMENT_ROWS)):
        rows = [row for row in some if not isinstance(row, RejectedRow)]
        rejected = [row for row in some if isinstance(row, RejectedRow)]
        fragment = _make_fragment(corpus, rows, [0] * len(rows), rejected)
        counts = _count_characters(fragment.table)
        if counts.max(initial=0) > MAX_TEXT_LENGTH:
            checked = [check_row(row, None) for row in rows]
            rows = [row for row, _ in checked if not isinstance(row, RejectedRow)]
            rejected += [row for row, _ in checked if isinstance(row, RejectedRow)]
            fragment = _make_fragment(corpus, rows, [0] * len(rows), rejected)
            counts = _count_characters(fragment.table)
        # The report of rejected rows must not depend on the ends of fragments.
        ordered = sorted(fragment.rejected, key=lambda row: row.row or 0)
        fragments.append(RowFragment(fragment.table, counts, ordered))
    return fragments


def _count_characters(table: pa.Table) -> np.ndarray:
    """Return the characters of the texts of each row, (N,), as ``measure_texts`` does."""
    counts = np.zeros(table.num_rows, np.int64)
    for column in table.columns:
        values = column.combine_chunks()
        if pa.types.is_string(values.type):
            counts += pc.fill_null(pc.utf8_length(values), 0).to_numpy()
        elif pa.types.is_list(values.type) and pa.types.is_string(values.type.value_type):
            lengths = pc.fill_null(pc.utf8_length(values.flatten()), 0).to_numpy()
            sums = np.concatenate([[0], np.cumsum(lengths)])
            sizes = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
            ends = np.cumsum(sizes)
            counts += sums[ends] - sums[ends - sizes]
    return counts


def _make_fragment(
    corpus: Corpus, rows: list[Row], characters: list[int], rejected: list[RejectedRow]
) -> RowFragment:
    table, refused = rows_to_table(corpus, rows)
    counts = np.delete(np.array(characters, np.int64), list(refused))
    return RowFragment(table, counts, [*rejected, *refused.values()])


class FutureResult(Protocol):
    """Result of a task that runs: a ``concurrent.futures.Future``, or one of Ray."""

    def result(self) -> Any:
        """Wait for the result and return it."""


class TaskStarter(NamedTuple):
    """Way to run functions as tasks.

    Args:
        submit: starts a task: a function and its arguments.
        ahead: tasks that are started before the result of the first one is taken.
    """

    submit: Callable[..., FutureResult]
    ahead: int

    def map(
        self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]
    ) -> Iterator[Any]:
        """Yield the results of tasks in the order of their arguments.

        Args:
            function: work of a task.
            arguments: those of each task.
        """
        pending = deque[FutureResult]()
        for given in arguments:
            pending.append(self.submit(function, *given))
            if len(pending) > self.ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _run_here(function: Callable[..., Any], *given: Any) -> FutureResult:
    future: Future[Any] = Future()
    future.set_result(function(*given))
    return future


#: Runs each task at once, in this process.
IN_PROCESS = TaskStarter(_run_here, 0)


def _iter_fragments(
    corpus: Corpus, sources: SourceArchives, parts: Sequence[CorpusPart], tasks: TaskStarter
) -> Iterator[RowFragment]:
    """Yield the rows of a corpus in order; tasks read its parts."""
    if not parts:
        with KeySet() as seen:
            yield from read_fragments(corpus, sources, seen)
        return
    bounded = ((part.corpus, sources) for part in parts if part.is_bounded)
    results = tasks.map(read_part, bounded)
    truncated = ""
    for part in parts:
        if part.is_bounded:
            fragments: Iterable[RowFragment] = next(results)
        else:
            fragments = read_fragments(part.corpus, sources)
        for fragment in fragments if part.file != truncated else ():
            yield fragment
            if any(row.truncates_file for row in fragment.rejected):
                truncated = part.file


def read_blocks(
    corpus: Corpus,
    sources: SourceArchives,
    rejected: Path,
    parts: Sequence[CorpusPart] = (),
    tasks: TaskStarter = IN_PROCESS,
) -> Iterator[RowBlock | ReadSummary]:
    """Yield blocks of raw rows, and last a summary.

    The result does not depend on the parts: their rows come in the order of the corpus, and blocks
    are cut here.

    Args:
        corpus: corpus whose rows are read.
        sources: archives that hold the rows.
        rejected: file for rows that are rejected while reading; it is replaced.
        parts: result of ``Corpus.divide``; by default the corpus is read whole.
        tasks: read the parts.
    """
    waiting = defaultdict[str, _WaitingRows](lambda: _WaitingRows(corpus.shard_rows))
    split_rows, split_shards = Counter[str](), Counter[str]()
    rejections, errors = Counter[str](), Counter[str]()
    truncated: dict[str, str] = {}
    with rejected.open("w", encoding="utf-8") as stream:

        def reject(row: RejectedRow) -> None:
            stream.write(format_json_line(quarantine_record(row)))
            rejections[row.reason] += 1
            if row.counts_as_error:
                errors[row.reason] += 1
            if row.truncates_file:
                before = "" if row.row is None else f"after {row.row - 1} rows "
                truncated[to_printable(row.file or row.key)] = f"{before}({row.reason})"

        def make_block(split: str, table: pa.Table) -> RowBlock:
            split_rows[split] += table.num_rows
            split_shards[split] += 1
            return RowBlock(split, split_shards[split] - 1, table, digest_keys(table))

        for fragment in _iter_fragments(corpus, sources, parts, tasks):
            for row in fragment.rejected:
                reject(row)
            splits = fragment.table[SPLIT.name]
            rows = fragment.table.drop_columns([SPLIT.name])
            for split in sorted(pc.unique(splits).to_pylist()):
                own = pc.equal(splits, split)
                table, counts = rows.filter(own), fragment.characters[own.to_numpy()]
                for full in waiting[split].add(table, counts):
                    yield make_block(split, full)
        # The last, incomplete blocks come in a fixed order.
        for split in sorted(waiting):
            if (last := waiting[split].take()).num_rows:
                yield make_block(split, last)
    yield ReadSummary(
        dict(split_rows),
        dict(split_shards),
        dict(rejections),
        dict(errors),
        corpus.num_source_files(),
        truncated,
    )


class _WaitingRows:
    """Rows of a split that do not fill a block yet."""

    def __init__(self, block_rows: int) -> None:
        self._block_rows = block_rows
        self._tables: list[pa.Table] = []
        self._rows = self._characters = 0

    def add(self, table: pa.Table, characters: np.ndarray) -> Iterator[pa.Table]:
        """Add rows with the characters of their texts; yield each block that becomes full."""
        while table.num_rows:
            sums = self._characters + np.cumsum(characters)
            long = int(np.searchsorted(sums, MAX_BLOCK_CHARACTERS, side="right")) + 1
            count = min(self._block_rows - self._rows, long)
            taken = table.slice(0, count)
            self._tables.append(taken)
            self._rows += taken.num_rows
            self._characters = int(sums[taken.num_rows - 1])
            if taken.num_rows < count:
                return
            yield self.take()
            table, characters = table.slice(count), characters[count:]

    def take(self) -> pa.Table:
        """Return all rows, and forget them."""
        table = pa.concat_tables(self._tables).combine_chunks()
        # A slice keeps bytes of the rows after it, which would reach the shard. A copy has none.
        table = table.take(pa.array(np.arange(table.num_rows)))
        self._tables, self._rows, self._characters = [], 0, 0
        return table


def quarantine_record(row: RejectedRow) -> dict[str, Any]:
    """Return a row's line of the quarantine: key, reason, and file and row number if known."""
    located = {"file": row.file and to_printable(row.file), "row": row.row}
    line = {"key": row.key, **{k: v for k, v in located.items() if v is not None}}
    return line | {"reason": row.reason}


def rows_to_table(corpus: Corpus, rows: list[Row]) -> tuple[pa.Table, dict[int, RejectedRow]]:
    """Convert rows to a table, and reject rows whose values have wrong types.

    Args:
        corpus: corpus that declares the types of its raw columns.
        rows: raw rows.

    Returns:
        The table of the rows that fit, and position -> rejection of the others.
    """
    schema = pa.schema([SPLIT, *ROW_COLUMNS, *corpus.raw_schema])
    try:
        return pa.Table.from_pylist(rows, schema=schema), {}
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeError, OverflowError, TypeError):
        # At least one row does not fit. Only now pay for a check of each row.
        reasons = [_find_misfit(row, schema) for row in rows]
    refused = {
        place: _reject_row(row, reason)
        for place, (row, reason) in enumerate(zip(rows, reasons, strict=True))
        if reason
    }
    good = [row for place, row in enumerate(rows) if place not in refused]
    return pa.Table.from_pylist(good, schema=schema), refused


def digest_keys(table: pa.Table) -> str:
    """Return the SHA-256 of the keys of a table, in order.

    In an unchanged corpus, equal digests mean equal rows.
    """
    text = "\n".join(table["key"].to_pylist())
    return hashlib.sha256(text.encode()).hexdigest()


def check_row(row: Row | RejectedRow, seen: KeySet | None) -> tuple[Row | RejectedRow, int]:
    """Return a row, or its rejection if its key came before or one of its texts is too long.

    Args:
        row: as the corpus yields it.
        seen: keys of earlier rows, extended in place; None if no key repeats.

    Returns:
        The row or its rejection, and the characters of its texts.
    """
    if isinstance(row, RejectedRow):
        is_new = seen is None or seen.add(row.key)
        return row if is_new else error_row(row.key, DUPLICATE_KEY, row.file, row.row), 0
    if isinstance(row.get("file"), str):
        row["file"] = to_printable(row["file"])
    if seen is not None and not seen.add(row["key"]):
        return _reject_row(row, DUPLICATE_KEY), 0
    count, reason = measure_texts(row)
    return _reject_row(row, reason) if reason else row, count


def _reject_row(row: Row, reason: str) -> RejectedRow:
    return error_row(str(row["key"]), reason, row.get("file"), row.get("row"))


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


def write_spool(
    corpus: Corpus,
    sources: SourceArchives,
    path: Path,
    parts: Sequence[CorpusPart] = (),
    tasks: TaskStarter = IN_PROCESS,
) -> None:
    """Read a corpus once and write its blocks to a file for later readers.

    Rows that are rejected while reading go to a file beside it, see :func:`rejected_rows_path`.

    Args:
        corpus: corpus to read.
        sources: archives that hold its rows.
        path: spool file to write.
        parts: see :func:`read_blocks`.
        tasks: read the parts.

    Raises:
        UserError: the disk is full.
    """
    with (
        disk_guard(path),
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, UNIT_SCHEMA) as writer,
    ):
        for part in read_blocks(corpus, sources, rejected_rows_path(path), parts, tasks):
            writer.write_table(pack_unit(part))


def read_spool_units(path: Path) -> Iterator[pa.Table]:
    """Yield the units of a spool file one at a time, memory-mapped."""
    with pa.memory_map(str(path)) as stream:
        for batch in pa.ipc.open_stream(stream):
            yield pa.Table.from_batches([batch])


def read_spooled_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the accepted rows of a spool file with their splits; equal labels once per block.

    Args:
        path: spool file.
        columns: columns that are read.
    """
    for unit in read_spool_units(path):
        if (split := unit["split"][0].as_py()) is None:
            continue
        block = unpack_unit(unit).select(columns)
        if columns == ["label"]:
            block = pa.table({"label": pc.unique(block["label"])})
        for row in block.to_pylist():
            yield row | {"split": split}


def read_spool_summary(path: Path) -> ReadSummary:
    """Return the summary at the end of a spool file."""
    *_, last = read_spool_units(path)
    return ReadSummary(**json.loads(last["raw"][0].as_py()))


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
            yield from (pc.list_flatten(values) if nested else values).to_pylist()
