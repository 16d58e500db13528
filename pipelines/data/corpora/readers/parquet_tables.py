"""Tables of Parquet files that embed media or number their classes, as on the Hub.

:func:`describe_tables` turns metadata tables into :class:`ParquetTable` where their files describe
such columns.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from pipelines.data.corpora.base import Row
from pipelines.data.corpora.formats.arrow_reader import read_parquet_rows
from pipelines.data.corpora.formats.class_names import FileClasses, unify_class_names
from pipelines.data.corpora.formats.encoding import NumberedRecord
from pipelines.data.corpora.formats.parquet_media import (
    ParquetDescription,
    check_unread_media,
    read_embedded_rows,
    read_parquet_classes,
    read_parquet_description,
)
from pipelines.data.corpora.readers.metadata_tables import MetadataTable
from pipelines.data.io.directory import SourceDirectory
from skillnet.modality import is_media_modality
from skillnet_platform.errors import UserError

#: Files whose schemas are read at the same time.
MAX_READERS = 16


@dataclass(frozen=True)
class ParquetTable(MetadataTable):
    """A Parquet file of rows, in which classes can be numbers and media can be embedded.

    Args:
        media_column: column of the media that are read, if there are any.
        described: all columns of media, and those of classes in the first file.
    """

    media_column: str | None = None
    # Not compared, because tables are keys, and the split and the file identify them.
    described: ParquetDescription = field(default_factory=ParquetDescription, compare=False)

    def read(self, source: SourceDirectory) -> Iterator[NumberedRecord]:
        """Yield its records with their numbers; see ``read_embedded_rows``."""
        if self.media_column is None:
            return self._read_fields(source)
        others = self._unread_columns() - {self.media_column}
        return self.name_rows(read_embedded_rows(source, self.file, self.media_column, others))

    def records(self, source: SourceDirectory, limit: int | None = None) -> Iterator[Row]:
        """Yield its first ``limit`` readable records, or all, without embedded media."""
        found = (record for _, record in self._read_fields(source) if isinstance(record, dict))
        return islice(found, limit)

    def _read_fields(self, source: SourceDirectory) -> Iterator[NumberedRecord]:
        rows = read_parquet_rows(source, self.file, unread=self._unread_columns())
        return self.name_rows(rows)

    def _unread_columns(self) -> set[str]:
        return {*self.described.media, *self.described.nested}


def describe_tables(
    source: SourceDirectory, tables: list[MetadataTable], modality: str | None
) -> tuple[list[MetadataTable], dict[str, tuple[str, ...]]]:
    """Return (tables with the media and classes that their Parquet files describe, class names).

    The first file of training rows decides the media: the files of a corpus have the same columns.
    The numbers of classes mean the names of their own file.

    Args:
        source: the directory of the corpus.
        tables: tables of the corpus.
        modality: modality of the corpus, None to take that of the first column of media.

    Raises:
        UserError: the format of embedded media is unknown, or files name different classes.
    """
    named = ((table, (table.file or source.name).lower()) for table in tables)
    parquet = [table for table, name in named if name.endswith(".parquet")]
    if not parquet:
        return tables, unify_class_names(table.classes for table in tables)
    first = min(parquet, key=lambda table: table.split != "train")
    path, described = source.path(first.file), read_parquet_description(source, first.file)
    column = choose_media_column(described.media, modality)
    if column is None and modality is None and described.media:
        raise UserError(
            f"{path}: the format of the media in the column {next(iter(described.media))} is "
            "unknown; give the option modality"
        )
    check_unread_media(path, described, column, modality)
    classes = _read_classes(source, sorted(parquet, key=lambda table: table.split != "train"))
    stated = {table.classes.file: table.classes for table in tables}
    names = unify_class_names([*classes.values(), *stated.values()])
    built = [
        ParquetTable(
            table.split,
            table.file,
            table.folder,
            column,
            described,
            classes=FileClasses(classes[table].file, {**names, **classes[table].names}),
            partition=table.partition,
        )
        if table in classes
        else table
        for table in tables
    ]
    return built, names


def _read_classes(
    source: SourceDirectory, tables: list[MetadataTable]
) -> dict[MetadataTable, FileClasses]:
    """Return the classes of each Parquet file: of its own schema, else of its repository."""

    def read(table: MetadataTable) -> FileClasses:
        own, stated = read_parquet_classes(source, table.file), table.classes.names
        kept = {column: names for column, names in stated.items() if column in own.unnamed}
        return FileClasses(own.file, {**kept, **own.names}, own.unnamed - kept.keys())

    # A corpus in a store can have thousands of files, each of which takes a few round trips.
    with ThreadPoolExecutor(MAX_READERS) as pool:
        return dict(zip(tables, pool.map(read, tables), strict=True))


def choose_media_column(media: Mapping[str, str], modality: str | None) -> str | None:
    """Return the first column of a modality, or the first of a known one; None without any.

    Args:
        media: column -> modality, "" if it is unknown.
        modality: modality of the corpus; media of an unknown format have it, too.
    """
    if modality is None:
        return next((name for name, kind in media.items() if kind), None)
    known = next((name for name, kind in media.items() if kind == modality), None)
    unknown = (name for name, kind in media.items() if not kind and is_media_modality(modality))
    return known or next(unknown, None)
