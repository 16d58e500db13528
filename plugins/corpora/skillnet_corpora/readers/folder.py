"""Format ``folder``: media with metadata (as in "audiofolder" and "imagefolder"), or files of rows.

    metadata.jsonl                      {"file_name": "a/1.wav", "transcription": …}
    train/metadata.csv  test/…          splits by folders
    metadata.jsonl                      {"file_name": "train/1.jpg", …}: splits by media folders
    train/cat/1.jpg  train/dog/2.jpg    without metadata: the folder is the class
    cat/1.jpg  dog/2.jpg  test.txt      the same; lists of files name the splits
    rows.csv                            without media: texts with labels, functions with docstrings
    data/train-00000-of-00002.parquet   a repository of the Hugging Face Hub
    any-name.jsonl                      given as the path itself, with or without media beside it

``file_name`` is relative to its metadata file and cannot lead out of the directory. Names of splits
can be in capitals.
"""

import copy
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipelines.data.corpora.base import CorpusPart, RejectedRow, Row
from pipelines.data.corpora.formats.encoding import BadRecord
from pipelines.data.corpora.readers.base import FileRecord
from pipelines.data.corpora.readers.row_builders import UnwantedRowError, is_plain_key, make_key
from pipelines.data.io.directory import (
    DirectoryEntry,
    SourceDirectory,
    digest_listing,
    to_printable,
)
from pipelines.data.io.field_names import FILE_FIELDS, fold_name
from pipelines.data.io.key_set import KeySet
from pipelines.data.io.media import MediaRef
from skillnet.modality import find_modality, is_media_modality
from skillnet_corpora.readers.fields import (
    ALL_SPLITS,
    MODALITY_OF_EXTENSION,
    RecordCorpus,
    RecordOptions,
    file_extension,
    match_field,
    parse_split_name,
    read_field,
)
from skillnet_corpora.readers.hub_repository import CARD, SeveralConfigurationsError
from skillnet_corpora.readers.joined_captions import ITEM_FIELD
from skillnet_corpora.readers.media_names import MediaNames, ask_for_media
from skillnet_corpora.readers.metadata_tables import (
    METADATA_NAMES,
    ROW_SUFFIXES,
    CocoTable,
    MetadataTable,
    ParquetTable,
    describe_tables,
    find_file_field,
    find_tables,
    is_caption_file,
    list_row_files,
    locate_media,
)
from skillnet_corpora.readers.parquet_media import EmbeddedMedia
from skillnet_corpora.readers.schema_sample import SAMPLE_ROWS, SchemaSample
from skillnet_corpora.readers.split_lists import (
    SplitLists,
    are_storage_folders,
    find_first_media,
    find_other_annotations,
    find_split_lists,
    find_split_root,
    join_path,
)
from skillnet_corpora.readers.unread_files import (
    BOXES,
    UnreadFiles,
    describe_unread_format,
    is_annotation_name,
    missing_format_error,
    refuse_unread_layout,
    refuse_unread_table,
)
from skillnet_platform import console
from skillnet_platform.errors import UserError

#: Folders in which metadata are searched that class folders would ignore.
NEARBY_FOLDERS = 3
#: Classes that are looked at, and that a message names.
NEARBY_CLASSES = 3
#: Files of rows that a message names.
NAMED_FILES = 8
#: Rows of a table in which names of media are searched.
FIRST_ROWS = 10
#: Default name of the field with the split of each row.
SPLIT_FIELD = "split"
#: Tables of a split, which can be thousands of shards, whose rows are sampled.
SAMPLED_TABLES = 8


@dataclass
class FolderOptions(RecordOptions):
    """A directory of media or texts, or a repository of the Hugging Face Hub.

    Args:
        file: field of the name of the media file, with or without its ending; a common name by
            default.
        configuration: the configuration of a repository that is read, if it has several.
    """

    file: str | None = None
    configuration: str | None = None


class FolderCorpus(RecordCorpus):
    """Media or texts with their metadata, or media in class folders.

    Attributes:
        tables: the metadata, none for class folders.
        file_field: field with the media, or with the name of the media file, if there is one.
        media_names: all media files, if rows name them without their ending or folder.
        media_column: the same field, if the media are embedded in the rows.
        splits_by_folder: whether the folders of the media name the splits of one metadata file.
        root: without metadata, the folder that holds the split folders.
        split_lists: without metadata, the lists of the files of each split.
        unread_files: annotation files that are not read.
    """

    name = "folder"
    Options = FolderOptions
    # Version 3: sampled rows beyond the first decide the fields, more given splits are found, and
    # the file name decides a split that is made, so that rows of one file stay in one split.
    # Version 4: captions of one media file are one item, and media in Parquet files are read.
    # Version 5: the numbers of classes mean the names of their own file, lists of splits are read,
    # and folders that begin with _ are no classes.
    version = 5
    tables: list[MetadataTable]
    file_field: str | None = None
    media_names: MediaNames | None = None
    media_column: str | None = None
    splits_by_folder: bool = False
    root: str = ""
    split_lists = SplitLists()

    @classmethod
    def detect(cls, source: SourceDirectory) -> str | None:
        """Return metadata, a media file in a class folder, or a file of rows as evidence."""
        if source.is_file:
            is_table = source.name.lower().endswith(ROW_SUFFIXES) or is_caption_file(source.name)
            return "a file of rows" if is_table else None
        try:
            found = find_tables(source)
        except UserError:  # an incomplete repository, or one of several configurations
            return f"{CARD} or its files describe a repository of the Hub"
        if found:
            return f"{found[0].file} names files or holds rows"
        if media := find_first_media(source):
            return f"{media} is a media file in a folder that names its class"
        return None

    @classmethod
    def explain(cls, source: SourceDirectory) -> str:
        """Return the format of a path that no reader reads, and the remedy."""
        return describe_unread_format(source)

    def discover(self) -> None:
        """Find metadata files or class folders, and infer the schema from the first rows."""
        self.unread_files = UnreadFiles()
        refuse_unread_table(self.source)
        uri = self.source.uri
        beside = uri.rpartition("/")[0] or "/" if self.source.is_file else uri
        self.media_source = SourceDirectory(self.options.media or beside)
        tables = self._find_tables()
        self.tables, self.class_names = describe_tables(self.source, tables, self.options.modality)
        if not self.tables:
            refuse_unread_layout(self.source)
            self._discover_classes()
            return
        described = next((each for each in self.tables if isinstance(each, ParquetTable)), None)
        self.media_column = described.media_column if described else None
        sample, named = SchemaSample(), dict[MetadataTable, list[Row]]()
        first_rows = list[Row]()
        counts = Counter[str | None]()
        for table in sorted(self.tables, key=lambda each: each.split != "train"):
            named[table] = []
            counts[table.split] += 1
            rows = SAMPLE_ROWS if counts[table.split] <= SAMPLED_TABLES else 0
            for record in table.records(self.source, rows):
                sample.add(table.split, record)
                named[table].append(self._file_and_split_names(record))
                first_rows += [record] if len(named[table]) <= FIRST_ROWS else []
        names = [row for rows in named.values() for row in rows]
        if not sample.names and self.media_column is None:
            first = self.tables[0]
            bad = next((each for _, each in first.read(self.source)), None)
            cause = f" ({bad.reason})" if isinstance(bad, BadRecord) else ""
            where = f" in {first.file}" if first.file else ""
            raise UserError(f"{uri}: no readable row{where}{cause}")
        if {"images", "annotations", "categories"} <= set(sample.names):
            raise UserError(f"{uri}: COCO with boxes or masks; {BOXES}")
        chosen = self.options.file
        if chosen is not None:
            chosen = match_field(sample.names, chosen, f"options.{self.name}.file")
        self.file_field, extension = find_file_field(names, chosen)
        if described is not None and self.media_column is not None:
            self.file_field = self.media_column
            modality = described.described.media[self.media_column] or self.options.modality
            extension = find_modality(modality or "").extensions[0]
        if self.file_field is None:
            option = f"--options.{self.name}"
            ask_for_media(
                self.source,
                self.media_source,
                first_rows,
                len(names),
                option,
                self.options.modality,
            )
        if self.file_field is None and is_media_modality(self.options.modality):
            raise UserError(
                f"{uri}: no field of file names among {', '.join(sample.names)}; expected "
                f"file_name. If another field names the files, give --options.{self.name}.file"
            )
        if self.file_field is not None and self.media_column is None:
            extension = self._locate_media(named, extension)
        self.named_splits = frozenset(table.split for table in self.tables if table.split)
        filled = [name for name in sample.filled_fields if name != self.file_field]
        self.infer_schema(sample.names, extension, filled, sample)
        if any(table.split is None for table in self.tables):
            self._find_named_splits(names, sample)
        self.resolve_test_split(sample)
        if self.named_splits - ALL_SPLITS:
            self.allow_unlabelled_rows()

    def _file_and_split_names(self, record: Row) -> Row:
        """Return the fields that can name a media file or a split, without embedded media."""
        chosen = fold_name(self.options.file or "")
        found = Row()
        for name, value in record.items():
            folded = fold_name(name)
            if folded in (*FILE_FIELDS, SPLIT_FIELD, chosen):
                # Only the field that the user names can hold numbers.
                is_name = isinstance(value, str) or (folded == chosen and isinstance(value, int))
                found[name] = value if is_name else None
        return found

    def _find_tables(self) -> list[MetadataTable]:
        try:
            chosen, warn = self.options.configuration, console.print_warning
            found = find_tables(self.source, self.media_source, chosen, warn)
        except SeveralConfigurationsError as error:
            option = f"--options.{self.name}.configuration"
            raise UserError(f"{error}. Give one of them: {option} {error.names[0]}") from None
        # The option says that rows name the media: the only file of rows can have any name.
        if not found and self.options.file is not None:
            rows = list_row_files(self.source)
            if len(rows) != 1:
                listed = ", ".join(rows[:NAMED_FILES]) or "none"
                raise UserError(
                    f"options.{self.name}.file: a field of rows, but {self.source.uri} has no "
                    f"single file of rows ({listed}). Give the file: folder:PATH"
                )
            return [MetadataTable(None, rows[0])]
        return found

    def _locate_media(
        self, named: dict[MetadataTable, list[Row]], extension: str | None
    ) -> str | None:
        """Find the folder of each table's media, and return the ending of a media file.

        Often only one of COCO's image folders was downloaded. Then the others are not read.
        """
        located = list[MetadataTable]()
        missing = list[MetadataTable]()
        for table in self.tables:
            first = replace(table, folder="") if self.options.media else table
            tried = (
                self._try_relative_name(read_field(row, self.file_field)) for row in named[table]
            )
            names = [name for name in tried if name]
            option = f"--options.{self.name}.media"
            found = locate_media(first, names, self.media_source, option)
            located.append(found or first)
            missing += [first] if names and not found else []
        is_partial = len(missing) < len(located)
        skipped = [t for t in missing if is_partial and isinstance(t, CocoTable)]
        self.tables = [table for table in located if table not in skipped]
        has_ending = extension in MODALITY_OF_EXTENSION
        if has_ending and (is_partial or self.options.file is None):
            return extension
        values = [
            (table.split, read_field(row, self.file_field))
            for table in named
            for row in named[table]
        ]
        media_names = MediaNames(self.media_source)
        files = (media_names.find(value, split) for split, value in values)
        first_file = next((each[0] for each in files if each), None)
        if first_file is None:
            return extension
        self.media_names = media_names
        return file_extension(first_file)

    def _try_relative_name(self, name: object) -> str | None:
        try:
            return self._relative_name(name)
        except ValueError:
            return None

    def _find_named_splits(self, names: list[Row], sample: SchemaSample) -> None:
        """Find the splits that the rows of one metadata file name, by a field or by folders.

        A split can occur in the last row only. All rows are read until nothing can be added.
        """
        by_field = [parse_split_name(read_field(row, SPLIT_FIELD)) for row in names]
        if self.split_field is None and _are_split_names(by_field):
            self.split_field = SPLIT_FIELD
        if self.split_field is None:
            by_folder = [self._split_by_folder(record) for record in names]
            self.splits_by_folder = _are_split_names(by_folder)
        if self.split_field is None and not self.splits_by_folder:
            return
        for table in self.tables:
            for record in table.records(self.source):
                if self.splits_by_folder:
                    split = self._split_by_folder(record)
                else:
                    split = parse_split_name(read_field(record, self.split_field))
                if split is None:
                    continue
                sample.add(split, record)
                self.named_splits |= {split}
                fields = [field for field in (self.text_field, self.label_field) if field]
                is_labelled = any(sample.has_value("test", field) for field in fields)
                if self.named_splits >= ALL_SPLITS and is_labelled:
                    return

    def _split_by_folder(self, record: Row) -> str | None:
        """Return the split that the first folder of a row's media file names, or None."""
        value = read_field(record, self.file_field)
        if self.media_names is not None:
            files = self.media_names.find(value)
            name = files[0] if len(files) == 1 else None
        else:
            name = self._try_relative_name(value)
        first, inside, _ = (name or "").partition("/")
        return parse_split_name(first) if inside else None

    def _relative_name(self, name: object) -> str:
        """Return a file name relative to the media directory; it can be given as absolute path.

        Raises:
            ValueError: there is no name, or it leads out of the directory.
        """
        if not isinstance(name, str) or not name:
            raise ValueError("no file name")
        if name.startswith("/") and not self.media_source.remote:
            path = os.path.normpath(name)
            root = self.media_source.uri
            # Metadata can name the directory itself or the target of a link to it.
            for directory in (root, os.path.realpath(root)):
                if path.startswith(f"{directory}/"):
                    name = path[len(directory) + 1 :]
                    break
        # Checked before it is joined: behind "train/" an absolute path would look relative.
        self.media_source.path(name)
        return name

    def _discover_classes(self) -> None:
        """Find split folders, and infer whether the last folder of a file is its class."""
        source = self.source
        first = find_first_media(source)
        folders = [e for e in source.entries() if e.is_folder and to_printable(e.name) == e.name]
        # Tables beside the folders of the media describe them, and are no corpus by themselves.
        nearby = [e for e in folders if first is None or first.startswith(f"{e.name}/")]
        for entry in nearby[:NEARBY_FOLDERS]:
            for table in find_tables(SourceDirectory(source.path(entry.name))):
                raise UserError(
                    f"{source.uri}: contains no metadata file, but {entry.name}/{table.file}; give "
                    f"{source.path(entry.name)}"
                )
        if first is None and len(rows := list_row_files(source)) > 1:
            names = ", ".join(rows[:NAMED_FILES])
            raise UserError(
                f"{source.uri}: several files of rows: {names}. Give one of them: "
                f"{source.path(rows[0])}; or name them train, validation and test"
            )
        if first is None:
            raise missing_format_error(
                source,
                f"neither a metadata file ({', '.join(METADATA_NAMES[:4])} …) nor media in folders "
                "named by class in it",
            )
        self.root, self.has_class_names = find_split_root(source), True
        tests = []
        for entry in source.entries(self.root):
            if entry.is_folder and (split := parse_split_name(entry.name)):
                self.named_splits |= {split}
                if split == "test":
                    tests.append(join_path(self.root, entry.name))
        if not self.named_splits:
            self._read_split_lists()
        # An explicit modality overrides the ending.
        extension = (self.options.modality and "") or file_extension(first)
        self.infer_schema(["label"], extension)
        if not self._has_classes():
            self.infer_schema([], extension)
            self._ask_for_annotations("no folder is a class")
        elif tests and not any(e.is_folder for test in tests for e in source.entries(test)):
            self.mark_test_unlabelled()

    def _read_split_lists(self) -> None:
        """Read the lists of the files of each split, unless folders name the splits.

        Raises:
            UserError: a list has a format that is not read, or two lists disagree.
        """
        self.split_lists = found = find_split_lists(self.source)
        self.named_splits = found.named
        if found.closed and not found.named and self.options.task is None:
            raise UserError(
                f"{self.source.path(found.closed[0])}: this list of a split is not read. Write its "
                f"file names to a text file, one per line, such as train.txt and test.txt; or, to "
                f"make splits by a hash, give --options.{self.name}.task labels"
            )
        if found.files:
            unused = (
                f". Further divisions are not used: {found.unused[0]} …" if found.unused else ""
            )
            console.print_note(
                f"{self.source.uri}: splits are those of {', '.join(found.files[:4])}{unused}"
            )

    def _ask_for_annotations(self, classes: str) -> None:
        """Raise UserError if files describe the media, unless the user has chosen the classes."""
        if self.options.task is not None:
            return
        known = self.split_lists.files + self.split_lists.unused + self.split_lists.closed
        found = find_other_annotations(
            self.source, known, lambda path: self._split_and_class(path)[1]
        )
        if found is not None:
            described, media = found
            paired = find_modality(self.modality).paired_annotation
            field = "transcription" if paired == "transcripts" else "label or caption"
            raise UserError(
                f"{self.source.path(described)}: describes {media}, but {classes}. Give this file "
                f"if it is a table with a column of file names, with --options.{self.name}.media; "
                f'or write metadata.jsonl with a line {{"file_name": {json.dumps(media)}, …}} and '
                f"the {field} of each file; or, to take the folders as classes, give "
                f"--options.{self.name}.task labels"
            )

    def _has_classes(self) -> bool:
        """Return whether media lie in folders of two classes.

        A single folder, such as ``audio``, is not a class.

        Raises:
            UserError: the folders may be no classes.
        """
        found = self._find_classes()
        if len(found) < 2:
            return False
        listed = ", ".join(sorted(found))
        if self.options.task is None and are_storage_folders(found):
            raise UserError(
                f"{self.source.uri}: the names of the folders {listed} say how files are stored, "
                "and not what they show. Sort the files into folders of classes, or write "
                "metadata.jsonl with file_name and label; or, if the folders are classes, give "
                f"--options.{self.name}.task labels"
            )
        self._ask_for_annotations(f"the folders {listed} … may be no classes")
        return True

    def _find_classes(self) -> set[str]:
        """Return the first classes that folders name."""
        found: set[str] = set()
        for entry in self.source.walk(self.root):
            if self._is_media(entry.name):
                _, label = self._split_and_class(entry.name)
                found |= {label} if label is not None else set()
                if len(found) > NEARBY_CLASSES:
                    break
        return found

    def _is_media(self, name: str) -> bool:
        return MODALITY_OF_EXTENSION.get(file_extension(name)) == self.modality

    def _split_and_class(self, path: str) -> tuple[str | None, str | None]:
        """Return (split, class) of a media file by its folders."""
        folders = path.removeprefix(f"{self.root}/" if self.root else "").split("/")[:-1]
        split = parse_split_name(folders[0]) if folders else None
        classes = folders[1:] if split else folders
        if any(name.startswith("_") for name in classes):
            return split, None
        if split == "validation" and "train" not in self.named_splits:
            split = "train" if folders[0].lower().startswith("dev") else split
        if self.split_lists.files:
            split = self.split_lists.find(path)
        return split, classes[-1] if classes else None

    def annotation_files(self) -> list[str]:
        """Return the metadata files; those with media inside are too large to hash."""
        if self.media_column:
            return []
        return [f for table in self.tables for f in table.files] + self.split_lists.files

    def find_record(self) -> Row:
        """Return the first record of the metadata, or the fields of the first row."""
        if not self.tables or self.media_column:
            return self.find_row_fields()
        return next(self.tables[0].records(self.source, 1), {})

    def num_source_files(self) -> int:
        """Return the number of metadata files."""
        return len(self.tables) or 1

    def note_unread(self, entry: DirectoryEntry) -> DirectoryEntry:
        """Return a file, added to ``unread_files`` if it has the name of annotations."""
        file = entry.name
        is_annotation = is_annotation_name(file) and not self._is_media(file)
        if is_annotation and file not in self.annotation_files():
            self.unread_files.add(to_printable(file))
        return entry

    def describe_unread(self) -> str:
        """Return the annotation files that are not read, with remedies."""
        return self.unread_files.describe()

    def read_records(self) -> Iterator[FileRecord | RejectedRow]:
        """Yield records in the order of the metadata, then media that no row refers to."""
        if not self.tables:
            for entry in self.source.walk():
                if file_extension(entry.name) in MODALITY_OF_EXTENSION:
                    yield FileRecord(entry.name, None, None, key=make_key(entry.name))
            return
        with KeySet() as referenced:
            for table in self.tables:
                name = table.file or self.source.name
                for number, value in table.read(self.source):
                    yield FileRecord(name, number, value, origin=(table, referenced))
            # After all tables, because several of them can name files of one folder.
            is_named = self.file_field is not None and self.media_column is None
            if is_named and not self.source.is_file:
                yield from self._unreferenced_media(referenced)

    def divide(self) -> list[CorpusPart]:
        """Return the parts of the files of texts or code; media are compared with all rows."""
        if not self.tables or not self._reads_strings or self.file_field is not None:
            return []
        parts = []
        for table in self.tables:
            name = table.file or self.source.name
            if not is_plain_key(name):
                return []
            for each in table.divide(self.source):
                part = copy.copy(self)
                part.tables = [each]
                parts.append(CorpusPart(name, part, each.part is not None))
        return parts

    def build_record(self, found: FileRecord) -> Row:
        """Return the row of a record of metadata, or of a media file in the folder of a class."""
        key, record = found.key, found.value
        if found.origin is None:
            return self._class_row(found.file, key)
        table, referenced = found.origin
        if self.file_field is None:
            return self.build_row(key, record, None, table.split)
        value = read_field(record, self.file_field)
        if isinstance(value, EmbeddedMedia):
            del record[self.file_field]
            item = value.item or key
            row = self.build_row(key, record, value.reference, table.split, item)
            return row | {ITEM_FIELD: item}
        if value is None and self.media_column is not None:
            raise ValueError("no media file")
        if self.media_names is not None:
            inside = self.media_names.choose(value, table.split)
        else:
            inside = join_path(table.folder, self._relative_name(value))
        # A query per row would be slow in a store. There, a missing file is found when it is read.
        stored = inside if self.media_source.remote else self.media_source.find_form(inside)
        path = self.media_source.path(stored or inside)
        referenced.add(path)
        split = table.split or (self._split_by_folder(record) if self.splits_by_folder else None)
        if self.splits_by_folder and split is None:
            raise ValueError("a file in no folder that names a split")
        # The file name decides, not the row: all rows of one file must stay in one split.
        split_key = path.removeprefix(f"{self.media_source.uri}/")
        row = self.build_row(key, record, MediaRef(path), split, split_key)
        if stored is None:
            raise ValueError("the media file is missing")
        return row | {ITEM_FIELD: path}

    def extra_sources(self) -> list[dict[str, str]]:
        """Return the sources of every reader, and the media beside a single file of rows."""
        self.unread_files = UnreadFiles()
        found = super().extra_sources()
        has_media = self.file_field is not None and self.media_column is None
        if self.source.is_file and has_media and not self.options.media:
            entries = self.media_source.walk()
            media = (e for e in entries if file_extension(e.name) in MODALITY_OF_EXTENSION)
            files, size, digest = digest_listing(media)
            found.append({"file": f"media: {files} files, {size} bytes", "sha256": digest})
        return found

    def _unreferenced_media(self, referenced: KeySet) -> Iterator[RejectedRow]:
        """Yield media files that no row refers to."""
        for entry in self.media_source.walk():
            is_media = file_extension(entry.name) in MODALITY_OF_EXTENSION
            if is_media and self.media_source.path(entry.name) not in referenced:
                reason = "a media file that no row refers to"
                yield RejectedRow(make_key(entry.name), reason, entry.name)

    def _class_row(self, file: str, key: str) -> Row:
        kind = MODALITY_OF_EXTENSION[file_extension(file)]
        if kind != self.modality:
            article = "an" if kind[0] in "aeiou" else "a"
            reason = f"{article} {kind} file in folders of {self.modality} files"
            raise UnwantedRowError(f"{reason}; the option modality chooses")
        split, label = self._split_and_class(file)
        if any(name.startswith("_") for name in file.split("/")[:-1]):
            raise UnwantedRowError("in a folder whose name begins with _, which is no class")
        if split is None and self.split_lists.files:
            raise UnwantedRowError("a media file that no list of splits names")
        is_unlabelled = self.test_unlabelled and split == "test"
        if label is None and "labels" in self.annotations_present and not is_unlabelled:
            raise ValueError("not in a folder that names a class")
        return self.build_row(key, {"label": label}, MediaRef(self.source.path(file)), split)


def _are_split_names(found: list[str | None]) -> bool:
    """Return whether rows name splits: all of them do, or they name more than one split."""
    named = set(found) - {None}
    return bool(named) and (None not in found or len(named) > 1)
