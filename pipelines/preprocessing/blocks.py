"""Rows of a corpus cut into blocks, each the work of one shard, while they are read.

A block holds rows of one split in the order of the corpus, ``shard_rows`` of them, or fewer whose
texts are long: how rows fall into shards hangs on the rows alone. Nothing of a block is kept once
it is given away, and rows that are set aside go to a file, so that memory does not grow with the
corpus.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.corpora.base import Corpus, Rejected, Row, Sources
from pipelines.io.directory import printable
from pipelines.io.key_set import Seen

#: A longer string in a row is no caption, heading or function: the row is set aside.
LONGEST_TEXT = 1_000_000
#: Characters that the rows of one block hold in all, about: a block lies in memory.
MOST_TEXT = 128 * 2**20
#: Columns of a row that say where it came from, for the quarantine.
PLACES = ("file", "row")
TWICE = "the key came before"


@dataclass(frozen=True)
class Block:
    """Raw rows of one shard.

    Args:
        split: of all rows.
        shard: number of the shard in its split, from 0.
        table: key, group and the raw columns of the corpus.
        keys: a digest of the rows' keys, in order.
    """

    split: str
    shard: int
    table: pa.Table
    keys: str


@dataclass
class Summary:
    """What reading a corpus gave in all.

    Args:
        counts: rows of each split.
        shards: blocks of each split.
        reasons: of the rejected rows, counted.
        bad: the same of those rows that should have been readable.
        files: how many files the rows stand in.
        broken: file -> after how many rows it breaks off, and why. What stood behind is lost, and
            nobody knows how much that is.
    """

    counts: dict[str, int] = field(default_factory=dict)
    shards: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
    files: int = 1
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """All that were read."""
        return sum(self.counts.values()) + sum(self.reasons.values())

    def too_broken(self, max_bad: float) -> str:
        """The message that more than that share of the files breaks off; "" if not.

        Files and not rows are counted: of the rows that are lost nobody knows the number.
        """
        if len(self.broken) <= max_bad * self.files:
            return ""
        share = min(1.0, len(self.broken) / self.files)
        most = "; ".join(f"{file} {how}" for file, how in list(self.broken.items())[:5])
        return (
            f"{len(self.broken)} of {self.files} files break off, and what stands behind is lost: "
            f"{most}. At most {max_bad:.1%} of the files may (max_bad). Put whole files in their "
            f"place, or go on without the rest: --max_bad {min(share + 0.005, 1.0):.2f}"
        )


def read_blocks(corpus: Corpus, sources: Sources, rejected: Path) -> Iterator[Block | Summary]:
    """Blocks of raw rows, and last a summary.

    Args:
        corpus: whose rows are read.
        sources: where they come from.
        rejected: a file for the rows that are set aside while reading; written anew.
    """
    waiting: dict[str, list[Row]] = defaultdict(list)
    texts = Counter[str]()
    counts, shards = Counter[str](), Counter[str]()
    reasons, bad = Counter[str](), Counter[str]()
    broken: dict[str, str] = {}
    with rejected.open("w", encoding="utf-8") as stream, Seen() as seen:

        def reject(row: Rejected) -> None:
            stream.write(json_line(told(row)))
            reasons[row.reason] += 1
            if row.bad:
                bad[row.reason] += 1
            if row.rest:
                before = "" if row.row is None else f"after {row.row - 1} rows "
                broken[printable(row.file or row.key)] = f"{before}({row.reason})"

        def cut(split: str) -> Iterator[Block]:
            table, refused = to_table(corpus, waiting.pop(split))
            texts[split] = 0
            for row in refused:
                reject(row)
            if table.num_rows:
                counts[split] += table.num_rows
                yield Block(split, shards[split], table, digest_of_keys(table))
                shards[split] += 1

        for row in corpus.rows(sources):
            row = _checked(row, seen)
            if isinstance(row, Rejected):
                reject(row)
                continue
            split = row["split"]
            waiting[split].append(row)
            texts[split] += _characters(row)
            if len(waiting[split]) == corpus.shard_rows or texts[split] > MOST_TEXT:
                yield from cut(split)
        for split in sorted(waiting):
            yield from cut(split)
    files = corpus.files_of_rows()
    yield Summary(dict(counts), dict(shards), dict(reasons), dict(bad), files, broken)


def told(row: Rejected) -> dict[str, Any]:
    """The line of a row in the quarantine: key and reason, with file and row where known."""
    places = {"file": row.file and printable(row.file), "row": row.row}
    line = {"key": row.key, **{k: v for k, v in places.items() if v is not None}}
    return line | {"reason": row.reason}


def json_line(line: dict[str, Any]) -> str:
    """A line of a quarantine file; what is no Unicode is spelt with backslashes."""
    text = json.dumps(line, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"


def to_table(corpus: Corpus, rows: list[Row]) -> tuple[pa.Table, list[Rejected]]:
    """The rows as a table, without those whose values are not of the corpus' types."""
    schema = pa.schema([("key", pa.string()), ("group", pa.int64()), *corpus.raw])
    try:
        return pa.Table.from_pylist(rows, schema=schema), []
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeError, OverflowError, TypeError):
        pass
    good, refused = [], []
    for row in rows:
        reason = _misfit(row, schema)
        if reason:
            refused.append(_refused(row, reason))
        else:
            good.append(row)
    return pa.Table.from_pylist(good, schema=schema), refused


def digest_of_keys(table: pa.Table) -> str:
    """Of the keys of some rows in their order: equal digests, equal rows of an unchanged corpus."""
    text = "\n".join(table["key"].to_pylist())
    return hashlib.sha256(text.encode()).hexdigest()


def _checked(row: Row | Rejected, seen: Seen) -> Row | Rejected:
    if isinstance(row, Rejected):
        return row if seen.add(row.key) else _again(row.key, row.file, row.row)
    key = row["key"]
    if isinstance(row.get("file"), str):
        row["file"] = printable(row["file"])
    if not seen.add(key):
        return _again(key, row.get("file"), row.get("row"))
    for name, value in row.items():
        texts = value if isinstance(value, list) else (value,)
        if texts and isinstance(texts[0], str) and max(map(len, texts)) > LONGEST_TEXT:
            return _refused(row, f"{name} is longer than {LONGEST_TEXT} characters")
    return row


def _characters(row: Row) -> int:
    count = 0
    for value in row.values():
        if isinstance(value, str):
            count += len(value)
        elif isinstance(value, list) and value and isinstance(value[0], str):
            count += sum(map(len, value))
    return count


def _again(key: str, file: Any, row: Any) -> Rejected:
    return Rejected(key, TWICE, file=file, row=row, bad=True)


def _refused(row: Row, reason: str) -> Rejected:
    return Rejected(str(row["key"]), reason, file=row.get("file"), row=row.get("row"), bad=True)


def _misfit(row: Row, schema: pa.Schema) -> str:
    """Which value does not fit its column; "" if all do."""
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
