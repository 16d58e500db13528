"""Metadata tables of the format ``folder``: files whose rows name media, or hold texts.

:func:`find_tables` finds them by their names. The readers of folders and tars call it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from pipelines.corpora.base import Row
from pipelines.corpora.formats.encoding import NumberedRecord
from pipelines.corpora.formats.record_reader import read_records
from pipelines.corpora.readers.fields import (
    LABEL_FIELDS,
    MODALITY_OF_EXTENSION,
    TEXT_FIELDS,
    file_extension,
    parse_split_name,
)
from pipelines.io.directory import SourceDirectory

METADATA_NAMES = tuple(
    f"metadata{suffix}{compression}"
    for suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet")
    for compression in ("", ".gz")
    if not (suffix == ".parquet" and compression)
)
FILE_FIELDS = ("file_name", "file", "filename", "path", "audio", "image", "video", "wav")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".csv", ".csv.gz", ".tsv", ".parquet")


@dataclass(frozen=True)
class MetadataTable:
    """A file of rows.

    Args:
        split: split of all its rows, None if the file does not decide it.
        file: its path in the directory of the corpus, "" for the corpus itself.
        folder: folder of the media that its rows name, in the directory of the media.
    """

    split: str | None
    file: str
    folder: str = ""

    def read(self, source: SourceDirectory) -> Iterator[NumberedRecord]:
        """Yield its records with their numbers; see ``read_records``.

        Args:
            source: the directory of the corpus.
        """
        yield from read_records(source, self.file)

    def records(self, source: SourceDirectory, limit: int | None = None) -> Iterator[Row]:
        """Yield its first ``limit`` readable records, or all.

        Args:
            source: the directory of the corpus.
            limit: number of records.
        """
        found = (record for _, record in self.read(source) if isinstance(record, dict))
        return islice(found, limit)


def find_tables(source: SourceDirectory) -> Iterator[MetadataTable]:
    """Yield the metadata tables of a directory: one of the directory itself, or one per split.

    Args:
        source: the directory of the corpus.
    """
    for name in METADATA_NAMES:
        if source.exists(name):
            yield MetadataTable(None, name)
            return
    for entry in source.entries():
        split = parse_split_name(entry.name.split(".")[0])
        if split is None:
            continue
        if entry.is_folder:
            candidates = (f"{entry.name}/{name}" for name in METADATA_NAMES)
            if file := next((each for each in candidates if source.exists(each)), None):
                yield MetadataTable(split, file, entry.name)
        elif entry.name.lower().endswith(ROW_SUFFIXES):
            yield MetadataTable(split, entry.name)


def find_file_field(rows: list[Row]) -> tuple[str | None, str | None]:
    """Return (field of media file names, ending of a file) of some rows; known endings first."""
    found = ((n, r) for r in rows for n in FILE_FIELDS if _names_media(n, r))
    named = [(name, file_extension(str(row[name]))) for name, row in found]
    known = next((each for each in named if each[1] in MODALITY_OF_EXTENSION), None)
    return known or next(iter(named), (None, None))


def _names_media(field: str, row: Row) -> bool:
    """Return whether a field holds the name of a media file; ``path`` can name a source file."""
    value = row.get(field)
    known = isinstance(value, str) and file_extension(value) in MODALITY_OF_EXTENSION
    return known or (field == "file_name" and field in row)


def has_metadata_rows(source: SourceDirectory) -> bool:
    """Return whether metadata name media or hold labelled texts.

    The format ``webdataset`` is then not detected, because tars beside metadata are leftovers.
    """
    if source.is_file:
        return False
    for table in find_tables(source):
        first = list(table.records(source, 100))
        if find_file_field(first)[0] is not None:
            return True
        fields = {name for row in first for name in row}
        if fields & set(TEXT_FIELDS) and fields & set(LABEL_FIELDS):
            return True
    return False
