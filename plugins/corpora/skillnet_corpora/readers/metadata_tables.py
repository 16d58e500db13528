"""Metadata tables of the format ``folder``: files whose rows name media, or hold texts.

    metadata.jsonl, train.tsv           rows with named fields; Common Voice is such a corpus
    metadata.csv                        LJSpeech: "LJ001-0001|text|normalized text", no header
    annotations/captions_val2017.json   COCO: images and their captions in two arrays
    results_20130124.token              Flickr: "1000.jpg#0", a tab, a caption
    captions.txt, results.csv           Flickr: a CSV file with a header

:func:`find_tables` finds them by their names, and :func:`locate_media` finds their media. The
readers of folders and tars call them. :func:`describe_tables` turns tables of Parquet files into
:class:`ParquetTable` where they embed media or number their classes, as on the Hub.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any
from urllib.parse import unquote

from pipelines.data.corpora.base import Row
from pipelines.data.corpora.formats.encoding import BadRecord, NumberedRecord, peek_start
from pipelines.data.corpora.formats.record_reader import (
    FilePart,
    JsonText,
    divide_file,
    read_csv_rows,
    read_parquet_rows,
    read_records,
)
from pipelines.data.io.directory import DAMAGE_ERRORS, SourceDirectory
from pipelines.data.io.field_names import FILE_FIELDS, fold_name
from pipelines.data.modalities.text import TextFiles
from skillnet.modality import find_modality, is_media_modality
from skillnet_corpora.readers.class_names import (
    NO_CLASSES,
    FileClasses,
    name_classes,
    unify_class_names,
)
from skillnet_corpora.readers.fields import (
    LABEL_FIELDS,
    MODALITY_OF_EXTENSION,
    file_extension,
    parse_split_name,
    read_field,
)
from skillnet_corpora.readers.hub_repository import (
    CARD,
    choose_classes,
    find_stated_files,
    list_missing_splits,
    list_repository_files,
    read_card,
    require_all_shards,
)
from skillnet_corpora.readers.parquet_media import (
    ParquetDescription,
    check_unread_media,
    read_embedded_rows,
    read_parquet_classes,
    read_parquet_description,
)
from skillnet_corpora.readers.split_lists import find_first_media, join_path
from skillnet_platform.errors import UserError

METADATA_NAMES = tuple(
    f"metadata{suffix}{compression}"
    for suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet")
    for compression in ("", ".gz")
    if not (suffix == ".parquet" and compression)
)
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".csv", ".csv.gz", ".tsv", ".parquet")
#: Files of COCO and Flickr. A corpus can hold several of Flickr; the first one is read.
_COCO_NAME = re.compile(r"captions_(\w+)\.json")
_FLICKR_NAME = re.compile(r"results_\d+\.token|flickr\w+\.token(\.txt)?|results\.csv|captions\.txt")
#: Images of a split of Flickr8k, one name per line.
_FLICKR_SPLIT = re.compile(r"flickr_?8k\.(train|dev|test)images\.txt")
#: Folders of annotation files beside the media.
_ANNOTATION_FOLDER = re.compile(r"annotations?|captions?|flickr\w*_?text", re.IGNORECASE)
#: A folder of a partitioned table, and the value of rows without one.
_PARTITION = re.compile(r"([A-Za-z_]\w*)=(.+)")
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
#: Folders of recordings whose names have no ending, "" for the directory itself.
_SOUND_FOLDERS = ("wavs", "wav", "audio", "clips", "")
#: Rows and folders in which media are searched.
_TRIED_ROWS, _TRIED_FOLDERS = 5, 32


@dataclass(frozen=True)
class MetadataTable:
    """A file of rows with named fields.

    Args:
        split: split of all its rows, None if the file does not decide it.
        file: its path in the directory of the corpus, "" for the corpus itself.
        folder: folder of the media that its rows name, in the directory of the media.
        classes: names of its classes, as it numbers them, and the file that states them.
        partition: fields of all its rows that its folders state, as in ``label=cat/0.parquet``.
        part: the records of the file that belong to the table; None for all.
    """

    split: str | None
    file: str
    folder: str = ""
    # Not compared, because tables are keys, and the split and the file identify them.
    classes: FileClasses = field(default=NO_CLASSES, compare=False, kw_only=True)
    partition: Mapping[str, str | None] = field(default_factory=dict, compare=False, kw_only=True)
    part: FilePart | None = field(default=None, compare=False, kw_only=True)

    #: Folders that can hold the media, in addition to those beside the file.
    media_folders = ("",)

    @property
    def files(self) -> tuple[str, ...]:
        """All files that ``read`` opens."""
        return (self.file,)

    def read(self, source: SourceDirectory) -> Iterator[NumberedRecord]:
        """Yield its records with their numbers and with names of classes; see ``read_records``.

        Args:
            source: the directory of the corpus.
        """
        yield from self.name_rows(read_records(source, self.file, self.part))

    def divide(self, source: SourceDirectory) -> list["MetadataTable"]:
        """Return tables of its parts in order, or the table itself if it has to be read whole."""
        # Other layouts read several files, or keep what came before.
        known = type(self) in (MetadataTable, ParquetTable)
        parts = divide_file(source, self.file) if known else []
        return [replace(self, part=part) for part in parts] or [self]

    def name_rows(self, rows: Iterator[NumberedRecord]) -> Iterator[NumberedRecord]:
        """Yield records with the fields of the partition, and with names of classes."""
        if not self.partition and not self.classes.names:
            yield from rows
            return
        for number, record in rows:
            if isinstance(record, dict):
                record |= self.partition
                name_classes(self.classes.names, record)
            yield number, record

    def records(self, source: SourceDirectory, limit: int | None = None) -> Iterator[Row]:
        """Yield its first ``limit`` readable records, or all.

        Args:
            source: the directory of the corpus.
            limit: number of records.
        """
        found = (record for _, record in self.read(source) if isinstance(record, dict))
        return islice(found, limit)


@dataclass(frozen=True)
class SpeechTable(MetadataTable):
    """Names of recordings with their transcripts, as in LJSpeech: ``name|text|normalized text``.

    Args:
        fields: names of the fields; the last one is the transcript.
        extension: ending of the recordings with its dot, which the names lack.
    """

    fields: tuple[str, ...] = ()
    extension: str = ""

    def read(self, source: SourceDirectory) -> Iterator[NumberedRecord]:
        """Yield its records with their line numbers."""
        for number, record in read_csv_rows(source, self.file, "|", self.fields):
            if isinstance(record, dict):
                record["file_name"] += self.extension
            yield number, record


@dataclass(frozen=True)
class FlickrTable(MetadataTable):
    """Names of images with one caption per row, as in Flickr8k and Flickr30k.

    Args:
        has_header: whether the file is CSV. Otherwise each line is ``1000.jpg#0``, a tab, and the
            caption.
        lists: (split, file) of the lists of images per split, which Flickr8k has.
    """

    has_header: bool = False
    lists: tuple[tuple[str, str], ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The file of the captions, and the lists of images."""
        return self.file, *(file for _, file in self.lists)

    def read(self, source: SourceDirectory) -> Iterator[NumberedRecord]:
        """Yield its records with their line numbers; the lists decide the field ``split``."""
        splits = dict[str, str]()
        for split, file in self.lists:
            with contextlib.suppress(*DAMAGE_ERRORS):  # a line without end
                for _, line in source.lines(file):
                    splits[line.decode("utf-8", "replace").strip()] = split
        plain = partial(read_csv_rows, separator="\t", names=("image", "caption"))
        read_rows = read_csv_rows if self.has_header else plain
        for number, record in read_rows(source, self.file):
            if isinstance(record, dict):
                name = read_field(record, "image") or read_field(record, "image_name") or ""
                if not self.has_header:
                    record["image"] = name = _remove_number(name)
                record |= {"split": splits.get(name)} if splits else {}
            yield number, record


@dataclass(frozen=True)
class CocoTable(MetadataTable):
    """Captions of COCO: an array of images and an array of captions, which names image ids."""

    @property
    def media_folders(self) -> tuple[str, ...]:  # type: ignore[override]
        """``captions_val2017.json`` annotates the folder ``val2017``, or ``images/val2017``."""
        found = _COCO_NAME.search(self.file)
        folder = found[1] if found else ""
        return folder, f"images/{folder}", "images", ""

    def read(self, source: SourceDirectory) -> Iterator[NumberedRecord]:
        """Yield the captions with their numbers, each with the ``file_name`` of its image."""
        names = self._read_names(source)
        is_empty = True
        for number, array, value in read_json_arrays(source, self.file):
            if isinstance(value, BadRecord):
                is_empty = False
                yield number, value
            elif array == "annotations" and isinstance(value, dict):
                is_empty = False
                yield number, {"file_name": names.get(str(value.get("image_id")))} | value
        if is_empty:
            reason = "no captions as in COCO: an object with the arrays images and annotations"
            yield 1, BadRecord(reason, truncates_file=True)

    def _read_names(self, source: SourceDirectory) -> dict[str, Any]:
        """Return image id -> file name. The 118,287 images of COCO take 20 MB."""
        names: dict[str, Any] = {}
        for _, array, value in read_json_arrays(source, self.file):
            if array == "images" and isinstance(value, dict):
                names[str(value.get("id"))] = value.get("file_name")
            elif names and array == "annotations":
                break
        return names


def read_json_arrays(source: SourceDirectory, file: str) -> Iterator[tuple[int, str, Any]]:
    """Yield the elements of the arrays of a JSON object: ``{"images": […], "annotations": […]}``.

    Other values of the object are skipped. Memory holds one element, never an array.

    Args:
        source: the directory of the file.
        file: path of the file in ``source``, "" for ``source`` itself.

    Yields:
        (number in the array from 1, name of the array, element). After damage the last element is
        a ``BadRecord``.
    """
    with source.open(file) as stream:
        start = peek_start(stream)
        if isinstance(start, BadRecord):
            yield 1, "", start
            return
        text, number, name = JsonText(stream), 0, ""
        try:
            for _ in _iter_starts(text, "{", "}"):
                name = str(text.next_value())
                _require(text, ":")
                if text.next_character(consume=False) != "[":
                    text.next_value()
                    continue
                number = 0
                for _ in _iter_starts(text, "[", "]"):
                    value = text.next_value()
                    number += 1
                    yield number, name, value
        except UserError:
            raise
        except ValueError:
            yield number + 1, name, BadRecord("JSON damaged from here on", truncates_file=True)


def _iter_starts(text: JsonText, opening: str, closing: str) -> Iterator[None]:
    """Yield at the beginning of each entry of the next value; the caller parses the entry."""
    _require(text, opening)
    while (following := text.next_character(consume=False)) != closing:
        if following == ",":
            text.next_character()
        else:
            yield
    text.next_character()


def _require(text: JsonText, character: str) -> None:
    if text.next_character() != character:
        raise ValueError(f"no {character}")


def find_tables(
    source: SourceDirectory,
    media: SourceDirectory | None = None,
    configuration: str | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> list[MetadataTable]:
    """Return the metadata tables of a directory: of the directory itself, or one per split.

    The only file of rows of a directory without media in folders can have any name.

    Args:
        source: the directory of the corpus, or a single file of rows.
        media: directory of the media; by default ``source``.
        configuration: name of a configuration of a repository of the Hub.
        warn: prints a warning. By default nothing is printed, because several readers look.

    Raises:
        SeveralConfigurationsError: the directory is a repository with several configurations.
        UserError: README.md of a repository, or its files, are incomplete.
    """
    media = media or source
    if source.is_file:
        return [_open_table(source, media, None, "")]
    card = read_card(source)
    name, stated = find_stated_files(source, card, ROW_SUFFIXES, configuration, warn)
    found = [MetadataTable(s, file, file.rpartition("/")[0]) for s, file in stated]
    if not found and configuration is None:
        found = _find_named_tables(source, media)
    if not found:
        name, shards = list_repository_files(source, ROW_SUFFIXES, configuration)
        found = [MetadataTable(s, file, file.rpartition("/")[0]) for s, file in shards]
    require_all_shards(source, [table.file for table in found])
    # Beside media in folders, such a file can be anything; without them it is all that there is.
    if not found and find_first_media(source) is None and len(rows := list_row_files(source)) == 1:
        found = [_open_table(source, media, None, rows[0])]
    if missing := list_missing_splits(card, name, [table.split for table in found]):
        warn(
            f"{source.path(CARD)}: names the split {', '.join(missing)}, and no file holds it. "
            "Download it, unless it is left out on purpose"
        )
    classes = choose_classes(card, name)
    return [replace(table, classes=classes) for table in found]


def _find_named_tables(source: SourceDirectory, media: SourceDirectory) -> list[MetadataTable]:
    """Return the tables whose names show what they are, outside of shards."""
    for name in METADATA_NAMES:
        if source.exists(name):
            return [_open_table(source, media, None, name)]
    return (
        _find_partitions(source)
        or _find_split_tables(source, media)
        or _find_caption_tables(source, media)
    )


def _find_partitions(source: SourceDirectory) -> list[MetadataTable]:
    """Return the tables in folders that state a value, as Hive and Spark write them."""
    if not any(entry.is_folder and _PARTITION.fullmatch(entry.name) for entry in source.entries()):
        return []
    found = []
    for entry in source.walk():
        *folders, name = entry.name.split("/")
        stated = {
            parts[1]: None if parts[2] == _NO_VALUE else unquote(parts[2])
            for folder in folders
            if (parts := _PARTITION.fullmatch(folder))
        }
        # Names with an underscore are of the writer: _SUCCESS, _metadata.
        if not stated or name.startswith("_") or not name.lower().endswith(ROW_SUFFIXES):
            continue
        split = next((value for key, value in stated.items() if fold_name(key) == "split"), None)
        values = {key: value for key, value in stated.items() if fold_name(key) != "split"}
        known = (parse_split_name(split) or split) if split else None
        found.append(MetadataTable(known, entry.name, "/".join(folders), partition=values))
    return found


def list_row_files(source: SourceDirectory) -> list[str]:
    """Return the files of rows of any name that lie in a directory itself."""
    files = (entry.name for entry in source.entries() if not entry.is_folder)
    return [name for name in files if name.lower().endswith(ROW_SUFFIXES)]


def _find_split_tables(source: SourceDirectory, media: SourceDirectory) -> list[MetadataTable]:
    found = list[MetadataTable]()
    for entry in source.entries():
        split = parse_split_name(entry.name.split(".")[0])
        if split is None:
            continue
        if entry.is_folder:
            candidates = (f"{entry.name}/{name}" for name in METADATA_NAMES)
            if file := next((each for each in candidates if source.exists(each)), None):
                found.append(MetadataTable(split, file, entry.name))
        elif entry.name.lower().endswith(ROW_SUFFIXES):
            found.append(_open_table(source, media, split, entry.name))
    return found


def _find_caption_tables(source: SourceDirectory, media: SourceDirectory) -> list[MetadataTable]:
    """Return the tables of COCO, one per split, or the first one of Flickr."""
    top = source.entries()
    files = [entry.name for entry in top if not entry.is_folder]
    for folder in top:
        if folder.is_folder and _ANNOTATION_FOLDER.fullmatch(folder.name):
            inside = source.entries(folder.name)
            files += [f"{folder.name}/{entry.name}" for entry in inside if not entry.is_folder]
    coco = [(_coco_split(file), file) for file in files]
    if tables := [CocoTable(split, file) for split, file in coco if split]:
        return list(tables)
    for file in files:
        if is_caption_file(file) and not _coco_split(file):
            table = _open_table(source, media, None, file)
            if find_file_field(list(table.records(source, _TRIED_ROWS)))[0] is not None:
                return [table]
    return []


def _open_table(
    source: SourceDirectory, media: SourceDirectory, split: str | None, file: str
) -> MetadataTable:
    """Return the table of a file; its name and first lines decide the layout."""
    name = (file or source.name).rpartition("/")[2]
    if _COCO_NAME.fullmatch(name):
        return CocoTable(split, file)
    if _FLICKR_NAME.fullmatch(name.lower()):
        first = next(iter(_first_lines(source, file)), "").partition("\t")
        is_named = file_extension(_remove_number(first[0])) in MODALITY_OF_EXTENSION
        has_header = not (is_named and first[1])
        return FlickrTable(split, file, "", has_header, _find_split_lists(source, file))
    if name.lower().removesuffix(".gz").endswith(".csv"):
        return _open_speech_table(source, media, split, file) or MetadataTable(split, file)
    return MetadataTable(split, file)


def _find_split_lists(source: SourceDirectory, file: str) -> tuple[tuple[str, str], ...]:
    """Return (split, file) of the lists of Flickr8k beside a file of captions."""
    folder = file.rpartition("/")[0]
    found = []
    for entry in [] if source.is_file else source.entries(folder):
        if named := _FLICKR_SPLIT.fullmatch(entry.name.lower()):
            found.append((str(parse_split_name(named[1])), join_path(folder, entry.name)))
    return tuple(found)


def _open_speech_table(
    source: SourceDirectory, media: SourceDirectory, split: str | None, file: str
) -> SpeechTable | None:
    """Return a table without header if its first fields name recordings, else None."""
    rows = [line.split("|") for line in _first_lines(source, file)]
    fields = {2: ("file_name", "text"), 3: ("file_name", "raw_text", "text")}
    if not rows or len(rows[0]) not in fields:
        return None
    endings = ["", *(f".{extension}" for extension in find_modality("sound").extensions)]
    for name, *_ in rows:
        for folder in _SOUND_FOLDERS:
            for ending in endings:
                is_sound = file_extension(name + ending) in find_modality("sound").extensions
                if is_sound and _exists(media, join_path(folder, name + ending)):
                    return SpeechTable(split, file, folder, fields[len(rows[0])], ending)
    return None


def _first_lines(source: SourceDirectory, file: str) -> list[str]:
    with source.open(file) as stream:
        start = peek_start(stream)
    text = "" if isinstance(start, BadRecord) else start.decode("utf-8-sig", "replace")
    return text.splitlines()[:_TRIED_ROWS]


def is_caption_file(file: str) -> bool:
    """Return whether a file has the name of an annotation file of COCO or Flickr."""
    name = file.rpartition("/")[2]
    return bool(_COCO_NAME.fullmatch(name) or _FLICKR_NAME.fullmatch(name.lower()))


def locate_media(
    table: MetadataTable, names: Sequence[str], media: SourceDirectory, option: str
) -> MetadataTable | None:
    """Return a table with the folder that holds the media of its first rows, or None.

    Args:
        table: a table; its own folder is tried first, and the folders of ``media`` last.
        names: file names of its first rows.
        media: directory of the media.
        option: name of the option for ``media``, for the message.

    Raises:
        UserError: several folders hold files of these names, such as images and masks.
    """

    def holds(folder: str) -> bool:
        return any(_exists(media, join_path(folder, name)) for name in names[:_TRIED_ROWS])

    known = dict.fromkeys((table.folder, *table.media_folders))
    folder = next(filter(holds, known), None)
    if folder is not None:
        return replace(table, folder=folder)
    others = [entry.name for entry in media.entries() if entry.is_folder][:_TRIED_FOLDERS]
    # Splits often use the same names: train/1.jpg and test/1.jpg.
    own_split = [name for name in others if table.split and parse_split_name(name) == table.split]
    no_split = [name for name in others if parse_split_name(name) is None]
    found = list(filter(holds, own_split)) or list(filter(holds, no_split))
    if len(found) > 1:
        raise UserError(
            f"{media.uri}: the folders {', '.join(found)} hold files of the same names, and "
            f"{table.file} does not decide between them. Give the folder of the media: "
            f"{option} {media.path(found[0])}"
        )
    return replace(table, folder=found[0]) if found else None


def _exists(media: SourceDirectory, name: str) -> bool:
    try:
        return media.find_form(name) is not None
    except ValueError:  # the name leads out of the directory
        return False


def _remove_number(name: str) -> str:
    """``"1000.jpg#0" -> "1000.jpg"``."""
    return re.sub(r"#\d+$", "", name)


def _coco_split(file: str) -> str | None:
    found = _COCO_NAME.fullmatch(file.rpartition("/")[2])
    return parse_split_name(found[1]) if found else None


def find_file_field(rows: list[Row], chosen: str | None = None) -> tuple[str | None, str | None]:
    """Return (field of media file names, ending of a file) of some rows; known endings first.

    Args:
        rows: some rows.
        chosen: the field, if the user names it.
    """
    if chosen is not None:
        values = (read_field(row, chosen) for row in rows)
        endings = [file_extension(str(each)) for each in values if isinstance(each, str | int)]
        known_ending = (each for each in endings if each in MODALITY_OF_EXTENSION)
        return chosen, next(known_ending, next(iter(endings), None))
    named = [found for row in rows for found in _list_file_fields(row)]
    known = next((each for each in named if each[1] in MODALITY_OF_EXTENSION), None)
    return known or next(iter(named), (None, None))


def _list_file_fields(row: Row) -> list[tuple[str, str]]:
    """Return (field, ending) of the names of media files; ``path`` can name a source file."""
    folded = {fold_name(name): name for name in reversed(row)}
    found = [(each, folded[each]) for each in FILE_FIELDS if each in folded]
    named = [(each, name, row[name]) for each, name in found]
    return [
        (name, file_extension(str(value)))
        for each, name, value in named
        if each == "file_name"
        or (isinstance(value, str) and file_extension(value) in MODALITY_OF_EXTENSION)
    ]


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
        fields = {fold_name(name) for row in first for name in row}
        if fields & set(TextFiles.text_fields) and fields & set(LABEL_FIELDS):
            return True
    return False


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
        rows = read_parquet_rows(source, self.file, unread=self._unread_columns(), part=self.part)
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
