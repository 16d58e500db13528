"""What a corpus is: pinned archives, raw rows with their split, and a transform to columns."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from pipelines.corpora.archives import Archive, iter_members, read_member

#: A row of raw values: the columns of ``Corpus.raw`` and ``split``, ``key``, ``group``.
Row = dict[str, Any]


@dataclass(frozen=True)
class RejectedRow:
    """A row that is set aside before it is transformed.

    Args:
        key: of the row.
        reason: short; rows are counted by it.
        file: where the row stands, if a reader must be told.
        row: its number in that file, from 1.
        bad: it should have been readable. Others are set aside by choice; too large a share of
            bad rows stops a prepare.
        rest: its file cannot be read on, and nobody knows how many rows are lost with this one: too
            large a share of such files stops a prepare, too.
    """

    key: str
    reason: str
    file: str | None = None
    row: int | None = None
    counts_as_error: bool = False
    truncates_file: bool = False


@dataclass(frozen=True)
class SourceArchives:
    """The archives of a corpus, found on disk and verified by the caller."""

    directory: Path
    archives: tuple[Archive, ...]

    @classmethod
    def none(cls) -> "SourceArchives":
        """No archives: for a corpus that the user has."""
        return cls(Path(), ())

    def path(self, start: str) -> Path:
        """Path of the archive whose file name starts so."""
        found = [a.file for a in self.archives if a.file.startswith(start)]
        assert len(found) == 1, f"{start} names {found}"
        return self.directory / found[0]

    def read(self, start: str, name: str) -> bytes:
        """Bytes of the member ``name`` of that archive."""
        return read_member(self.path(start), name)

    def members(self, start: str, prefix: str, suffix: str) -> Iterator[tuple[str, bytes]]:
        """Members between ``prefix`` and ``suffix``, as (the name between the two, bytes)."""

        def wanted(name: str) -> bool:
            return name.startswith(prefix) and name.endswith(suffix)

        for name, data in iter_members(self.path(start), wanted):
            yield name[len(prefix) : len(name) - len(suffix)], data


class Corpus(ABC):
    """One source of rows. Ray copies it to its workers: it holds settings, never rows.

    A row is read by ``rows`` (cheap, in order, every decision that needs the whole corpus:
    duplicates, splits, groups) and finished by ``transform`` (costly, a block at a time, in
    parallel). Where rows hold references to media, the size of a corpus costs no memory.
    """

    name: str
    modality: str
    task: str
    archives: ClassVar[tuple[Archive, ...]]
    #: Count it up when a change of the code changes what is prepared.
    version: ClassVar[int] = 1
    #: Raw columns that ``rows`` yields, beside split, key and group. Those named ``file`` (text)
    #: and ``row`` (a number, from 1) stand in the quarantine's line of a row set aside later.
    raw_schema: pa.Schema
    #: Columns of the finished shards after key and group, of every split together.
    columns: pa.Schema
    #: Columns left out in a split, where they would be empty.
    omitted_columns: ClassVar[dict[str, frozenset[str]]] = {}
    #: Raw columns whose text of the splits "pretrain" and "train" the tokenizer learns from.
    text_columns: tuple[str, ...] = ()
    #: Words that the tokenizer keeps whole.
    terms: ClassVar[tuple[str, ...]] = ()
    #: Splits that pretraining of the modality reads.
    pretraining: ClassVar[tuple[str, ...]] = ("pretrain", "train")
    shard_rows: int = 1024

    @abstractmethod
    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Every row of the corpus, in an order that only the archives decide."""

    @abstractmethod
    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """The finished columns of a block, row for row.

        A row that cannot be finished keeps its place, with its reason in a string column
        ``rejected``. ``tokenizer`` is None for a corpus without ``text_columns``.
        """

    @abstractmethod
    def preprocessing(self) -> dict[str, Any]:
        """Every number that decides the bytes, for the manifest and its digest."""

    def can_run_remotely(self) -> bool:
        """Whether ``transform`` can run on a host that sees neither the archives nor this disk."""
        return True

    def facts(self) -> dict[str, Any]:
        """More for the manifest: names of labels or symbols."""
        return {}

    def extra_sources(self) -> list[dict[str, str]]:
        """Sources that are not archives, each a file (or a name) with a sha256."""
        return []

    def num_source_files(self) -> int:
        """How many files its rows stand in: a file that breaks off costs one of so many."""
        return 1

    def schema(self, split: str) -> pa.Schema:
        """Columns of the shards of a split."""
        skipped = self.omitted_columns.get(split, frozenset())
        return pa.schema(
            [pa.field("key", pa.string()), pa.field("group", pa.int64())]
            + [column for column in self.columns if column.name not in skipped]
        )


def tensor_field(name: str, dtype: pa.DataType, shape: tuple[int, ...]) -> pa.Field:
    """A column of tensors of one shape, flat; the shape stands in the field's metadata."""
    size = 1
    for length in shape:
        size *= length
    text = "[" + ",".join(str(length) for length in shape) + "]"
    return pa.field(name, pa.list_(dtype, size), metadata={b"shape": text.encode()})


def stable_hash(*parts: object) -> int:
    """A number that only ``parts`` decide, spread evenly over 0 … 2**64 - 1: for splits."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(
        hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()[:8], "big"
    )


@dataclass
class IdAllocator:
    """Consecutive numbers for names, in the order in which they come."""

    numbers: dict[str, int] = field(default_factory=dict)

    def __call__(self, name: str) -> int:
        """The number of ``name``, a new one if it is new."""
        return self.numbers.setdefault(name, len(self.numbers))
