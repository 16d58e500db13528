"""A folder of one's own: media beside ``metadata.jsonl``, CSV or Parquet, as "audiofolder" and
"imagefolder" have it.

    metadata.jsonl                      {"file_name": "a/1.wav", "transcription": …}
    train/metadata.csv  test/…          splits given by folders
    metadata.jsonl                      {"file_name": "train/1.jpg", …}: by the folders of media
    train/cat/1.jpg  train/dog/2.jpg    no metadata: the folder is the class
    rows.csv                            no media: texts with labels, functions with docstrings
    any-name.jsonl                      given as the place itself, media beside it or none

``file_name`` is relative to its metadata file and cannot lead out of the folder. Names of splits
may be in capitals.
"""

import os
from collections.abc import Iterator
from itertools import islice

from pipelines.corpora.base import RejectedRow, Row, SourceArchives
from pipelines.corpora.formats.packed import missing_format_error
from pipelines.corpora.formats.record_reader import BadRecord, describe_first_error, read_records
from pipelines.corpora.formats.schema_sample import SAMPLE_ROWS, SchemaSample
from pipelines.corpora.readers.base import error_row, make_key, rejected_row
from pipelines.corpora.readers.fields import (
    ALL_SPLITS,
    LABEL_FIELDS,
    MODALITY_OF_EXTENSION,
    TEXT_FIELDS,
    RecordCorpus,
    file_extension,
    parse_split_name,
)
from pipelines.io.directory import SourceDirectory, digest_listing, to_printable
from pipelines.io.key_set import KeySet
from pipelines.io.media import MediaRef
from skillnet_platform.errors import UserError

NAMES = tuple(
    f"metadata{ending}{packed}"
    for ending in (".jsonl", ".json", ".csv", ".tsv", ".parquet")
    for packed in ("", ".gz")
    if not (ending == ".parquet" and packed)
)
FILE_FIELDS = ("file_name", "file", "filename", "path", "audio", "image", "video", "wav")
#: In so many folders metadata are looked for that would be passed over.
NEAR = 3
#: A field that names the split of each row.
SPLIT = "split"
ROWS = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".csv", ".csv.gz", ".tsv", ".parquet")


class FolderCorpus(RecordCorpus):
    """Media or texts with what their metadata say."""

    name = "folder"
    # Rows beyond the first decide the fields, more splits that are given are found, and those that
    # are made hang on the names of media files, so that no file is on two sides.
    version = 3
    file_field: str | None = None
    #: Splits of the rows of one metadata file are named by the folders that their media are in.
    by_folder: bool = False
    #: Without metadata: the folder that the folders of splits stand in.
    root: str = ""

    @classmethod
    def detect(cls, place: SourceDirectory) -> str | None:
        """Metadata, or folders of media, or one file of rows."""
        if place.is_file:
            return "a file of rows" if place.name.lower().endswith(ROWS) else None
        found = list(_metadata(place))
        if found:
            return f"{found[0][1]} names files or holds rows"
        if media := _first_media(place):
            return f"{media} is a media file in a folder that names its class"
        return None

    def discover(self) -> None:
        """Find metadata files, else classes by folders; see what the first rows have."""
        self.files = [(None, "")] if self.source.is_file else list(_metadata(self.source))
        beside = (
            self.source.uri.rpartition("/")[0] or "/" if self.source.is_file else self.source.uri
        )
        self.media_source = SourceDirectory(self.options.media or beside)
        if not self.files:
            self._locate_classes()
            return
        self.named_splits = frozenset(split for split, _ in self.files if split)
        glance, named = SchemaSample(), list[Row]()
        for split, file in sorted(self.files, key=lambda each: each[0] != "train"):
            for record in self._records(file, SAMPLE_ROWS):
                glance.add(split, record)
                named.append(_names_of(record))
        if not glance.names:
            why = describe_first_error(self.source, self.files[0][1])
            raise UserError(
                f"{self.source.uri}: no readable row in {self.files[0][1] or 'it'}{why}"
            )
        self.file_field, ending = _file_field(named)
        if self.file_field is None and self.options.modality in ("sound", "image", "video"):
            raise UserError(
                f"{self.source.uri}: no field of file names among {', '.join(glance.names)}; "
                "expected file_name"
            )
        held = [name for name in glance.filled_fields if name != self.file_field]
        self.infer_schema(glance.names, ending, held)
        if any(split is None for split, _ in self.files):
            self._find_splits(named, glance)
        self.resolve_test_split(glance)

    def _find_splits(self, named: list[Row], glance: SchemaSample) -> None:
        """Which splits the rows of one metadata file name: in a field, or by their media's folders.

        Nobody knows before the last row which there are: rows are read until nothing can be added.
        """
        if self.split_field is None and _name_splits(
            [parse_split_name(r.get(SPLIT)) for r in named]
        ):
            self.split_field = SPLIT
        if self.split_field is None:
            self.by_folder = _name_splits([self._folder_split(record) for record in named])
        if self.split_field is None and not self.by_folder:
            return
        for _, file in self.files:
            for record in self._records(file):
                if self.by_folder:
                    split = self._folder_split(record)
                else:
                    split = parse_split_name(record.get(self.split_field or ""))
                if split is None:
                    continue
                glance.add(split, record)
                self.named_splits |= {split}
                if self.named_splits >= ALL_SPLITS and any(
                    glance.has_value("test", field)
                    for field in (self.text_field, self.label_field)
                    if field
                ):
                    return

    def _folder_split(self, record: Row) -> str | None:
        """The split that the first folder of a row's media file names."""
        try:
            first, inside, _ = self._inside(record.get(self.file_field or "")).partition("/")
        except ValueError:
            return None
        return parse_split_name(first) if inside else None

    def _inside(self, name: object) -> str:
        """A file name relative to the folder of the media, of an absolute one, too.

        Raises:
            ValueError: there is none, or it leads out of the folder.
        """
        if not isinstance(name, str) or not name:
            raise ValueError("no file name")
        if name.startswith("/") and not self.media_source.remote:
            path = os.path.normpath(name)
            for home in (self.media_source.uri, os.path.realpath(self.media_source.uri)):
                if path.startswith(f"{home}/"):
                    name = path[len(home) + 1 :]
                    break
        self.media_source.path(
            name
        )  # checked alone: "train/" before it would hide an absolute path
        return name

    def _records(self, file: str, limit: int | None = None) -> Iterator[Row]:
        """The first readable records of a metadata file, or all."""
        found = (row for _, row in read_records(self.source, file) if isinstance(row, dict))
        return islice(found, limit)

    def _locate_classes(self) -> None:
        """Find the folders of splits; the last folder of a file is its class, if there are several
        of them."""
        first = _first_media(self.source)
        folders = [
            e for e in self.source.entries() if e.is_folder and to_printable(e.name) == e.name
        ]
        for entry in folders[:NEAR]:
            for _, file in _metadata(SourceDirectory(self.source.path(entry.name))):
                raise UserError(
                    f"{self.source.uri}: no metadata file in it, but {entry.name}/{file}; give "
                    f"{self.source.path(entry.name)}"
                )
        if first is None:
            raise missing_format_error(
                self.source,
                f"neither a metadata file ({', '.join(NAMES[:4])} …) nor media in folders named by "
                "class in it",
            )
        self.root = _root_of_splits(self.source)
        tests = []
        for entry in self.source.entries(self.root):
            if entry.is_folder and (split := parse_split_name(entry.name)):
                self.named_splits |= {split}
                if split == "test":
                    tests.append(_below(self.root, entry.name))
        ending = (self.options.modality and "") or file_extension(first)
        self.infer_schema(["label"], ending)
        if not self._has_classes():
            self.infer_schema([], ending)
        elif tests and not any(e.is_folder for test in tests for e in self.source.entries(test)):
            self.mark_test_unlabelled()

    def _has_classes(self) -> bool:
        """Whether media are in folders of two classes: one for all, like ``audio``, is none."""
        found: set[str] = set()
        for entry in self.source.walk(self.root):
            if MODALITY_OF_EXTENSION.get(file_extension(entry.name)) == self.modality:
                _, label = self._class_of(entry.name)
                found |= {label} if label is not None else set()
                if len(found) > 1:
                    return True
        return False

    def _class_of(self, path: str) -> tuple[str | None, str | None]:
        """(Split, class) of a media file by the folders that it is in."""
        folders = path.removeprefix(f"{self.root}/" if self.root else "").split("/")[:-1]
        split = parse_split_name(folders[0]) if folders else None
        classes = folders[1:] if split else folders
        return split, classes[-1] if classes else None

    def annotation_files(self) -> list[str]:
        """The metadata files."""
        return [file for _, file in self.files]

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Rows in the order of the metadata, then media that they do not name."""
        if not self.files:
            yield from self._classes()
            return
        for split, file in self.files:
            folder = file.rpartition("/")[0]
            with KeySet() as named:
                told = file or self.source.name
                for number, record in read_records(self.source, file):
                    key = make_key(f"{told}:{number}")
                    if isinstance(record, BadRecord):
                        yield error_row(key, record.reason, told, number, record.truncates_file)
                        continue
                    try:
                        row = self._row(key, split, folder, record, named)
                    except ValueError as problem:
                        yield rejected_row(key, problem, told, number)
                        continue
                    yield row | {"file": told, "row": number}
                if self.file_field is not None and not self.source.is_file:
                    yield from self._unnamed(folder, named)

    def _row(self, key: str, split: str | None, folder: str, record: Row, named: KeySet) -> Row:
        if self.file_field is None:
            return self.build_row(key, record, None, split)
        name = self._inside(record.get(self.file_field))
        inside = f"{folder}/{name}" if folder and not self.options.media else name
        path = self.media_source.path(inside)
        named.add(path)
        split = split or (self._folder_split(record) if self.by_folder else None)
        if self.by_folder and split is None:
            raise ValueError("a file in no folder that names a split")
        # By its name and not its row: several rows may name one file, and it must be on one side.
        by = path.removeprefix(f"{self.media_source.uri}/")
        row = self.build_row(key, record, MediaRef(path), split, drawn_by=by)
        # A store is not asked for each row one after the other: whoever reads the medium sees.
        if not self.media_source.remote and not self.media_source.exists(inside):
            raise ValueError("the media file is missing")
        return row

    def extra_sources(self) -> list[dict[str, str]]:
        """As of any; with one file of rows also the media beside it."""
        found = super().extra_sources()
        if self.source.is_file and self.file_field is not None and not self.options.media:
            media = (
                e
                for e in self.media_source.walk()
                if file_extension(e.name) in MODALITY_OF_EXTENSION
            )
            files, size, digest = digest_listing(media)
            found.append({"file": f"media: {files} files, {size} bytes", "sha256": digest})
        return found

    def _unnamed(self, folder: str, named: KeySet) -> Iterator[RejectedRow]:
        """Media files below a metadata file that it does not name."""
        others = {file.rpartition("/")[0] for _, file in self.files} - {folder}
        for entry in self.media_source.walk(folder if not self.options.media else ""):
            if MODALITY_OF_EXTENSION.get(file_extension(entry.name)) != self.modality:
                continue
            if any(other and entry.name.startswith(f"{other}/") for other in others):
                continue
            if self.media_source.path(entry.name) not in named:
                yield RejectedRow(
                    make_key(entry.name), "a media file that no row names", entry.name
                )

    def _classes(self) -> Iterator[Row | RejectedRow]:
        for entry in self.source.walk():
            if MODALITY_OF_EXTENSION.get(file_extension(entry.name)) != self.modality:
                continue
            split, label = self._class_of(entry.name)
            key = make_key(entry.name)
            untold = self.test_unlabelled and split == "test"
            if label is None and "labels" in self.annotations_present and not untold:
                yield error_row(key, "not in a folder that names a class", entry.name)
                continue
            reference = MediaRef(self.source.path(entry.name))
            try:
                yield self.build_row(key, {"label": label}, reference, split)
            except ValueError as problem:  # a name that is not UTF-8
                yield rejected_row(key, problem, entry.name, None)


def _names_of(record: Row) -> Row:
    """What a record may name files and splits by; a picture that stands in it is no name."""
    found = {name: record[name] for name in (*FILE_FIELDS, SPLIT) if name in record}
    return {name: value if isinstance(value, str) else None for name, value in found.items()}


def _file_field(rows: list[Row]) -> tuple[str | None, str | None]:
    """(Field that names media files, ending of one of them) by some rows; a known ending first."""
    found = ((n, r) for r in rows for n in FILE_FIELDS if _names_media(n, r))
    named = [(name, file_extension(str(row[name]))) for name, row in found]
    known = next((each for each in named if each[1] in MODALITY_OF_EXTENSION), None)
    return known or next(iter(named), (None, None))


def _name_splits(found: list[str | None]) -> bool:
    """Whether rows name splits: all of them do, or more than one split is named."""
    named = set(found) - {None}
    return bool(named) and (None not in found or len(named) > 1)


def _root_of_splits(place: SourceDirectory) -> str:
    """The folder that the folders of splits stand in: the place itself, or one that stands in it
    alone, as unpacking makes it; the place where there are no splits.

    Raises:
        UserError: splits are named further down, in folders side by side.
    """
    root, folders = "", list[str]()
    for _ in range(3):
        folders = [e.name for e in place.entries(root) if e.is_folder and e.name != "__MACOSX"]
        if any(parse_split_name(name) for name in folders):
            return root
        if len(folders) != 1:
            break
        root = _below(root, folders[0])
    for name in folders[:3]:
        inside = [e.name for e in place.entries(_below(root, name)) if e.is_folder]
        named = [each for each in inside if parse_split_name(each)]
        if len({parse_split_name(each) for each in named}) > 1:
            here = _below(root, name)
            raise UserError(
                f"{place.uri}: {here}/{named[0]} and {here}/{named[1]} name splits, but not for "
                f"all that is in it. Give the folder {here}; or sort the files as "
                f"{named[0]}/CLASS/… and {named[1]}/CLASS/…"
            )
    return ""


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _names_media(field: str, row: Row) -> bool:
    """Whether a field holds the name of a media file: ``path`` may be that of a source file."""
    value = row.get(field)
    known = isinstance(value, str) and file_extension(value) in MODALITY_OF_EXTENSION
    return known or (field == "file_name" and field in row)


def has_metadata_rows(place: SourceDirectory) -> bool:
    """Whether metadata name media or hold labelled texts: tars beside them are leftovers."""
    if place.is_file:
        return False
    for _, file in _metadata(place):
        first = [row for _, row in islice(read_records(place, file), 100) if isinstance(row, dict)]
        if _file_field(first)[0] is not None:
            return True
        fields = {name for row in first for name in row}
        if fields & set(TEXT_FIELDS) and fields & set(LABEL_FIELDS):
            return True
    return False


def _metadata(place: SourceDirectory) -> Iterator[tuple[str | None, str]]:
    """(Split, file) of the metadata files: in the folder itself, or in folders named by splits."""
    for name in NAMES:
        if place.exists(name):
            yield None, name
            return
    for entry in place.entries():
        split = parse_split_name(entry.name.split(".")[0])
        if split is None:
            continue
        if entry.is_folder:
            found = next((n for n in NAMES if place.exists(f"{entry.name}/{n}")), None)
            if found:
                yield split, f"{entry.name}/{found}"
        elif entry.name.lower().endswith(ROWS):
            yield split, entry.name


def _first_media(place: SourceDirectory) -> str | None:
    """The first media file that stands in a folder below the place."""
    for entry in place.walk(depth=5):
        if "/" in entry.name and file_extension(entry.name) in MODALITY_OF_EXTENSION:
            return entry.name
    return None
