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

from pipelines.corpora.base import Rejected, Row, Sources
from pipelines.corpora.formats.packed import lacking
from pipelines.corpora.formats.record_reader import Broken, records, why_unread
from pipelines.corpora.formats.schema_sample import LOOKED_AT, Glance
from pipelines.corpora.readers.base import aside, bad, key_of
from pipelines.corpora.readers.fields import (
    ALL,
    LABEL,
    MODALITY_OF,
    TEXT,
    FieldedCorpus,
    ending_of,
    split_named,
)
from pipelines.io.directory import Place, listing_digest, printable
from pipelines.io.key_set import Seen
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


class Folder(FieldedCorpus):
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
    def guess(cls, place: Place) -> str | None:
        """Metadata, or folders of media, or one file of rows."""
        if place.is_file:
            return "a file of rows" if place.name.lower().endswith(ROWS) else None
        found = list(_metadata(place))
        if found:
            return f"{found[0][1]} names files or holds rows"
        if media := _first_media(place):
            return f"{media} is a media file in a folder that names its class"
        return None

    def locate(self) -> None:
        """Find metadata files, else classes by folders; see what the first rows have."""
        self.files = [(None, "")] if self.place.is_file else list(_metadata(self.place))
        beside = self.place.uri.rpartition("/")[0] or "/" if self.place.is_file else self.place.uri
        self.home = Place(self.options.media or beside)
        if not self.files:
            self._locate_classes()
            return
        self.given = frozenset(split for split, _ in self.files if split)
        glance, named = Glance(), list[Row]()
        for split, file in sorted(self.files, key=lambda each: each[0] != "train"):
            for record in self._records(file, LOOKED_AT):
                glance.add(split, record)
                named.append(_names_of(record))
        if not glance.names:
            why = why_unread(self.place, self.files[0][1])
            raise UserError(f"{self.place.uri}: no readable row in {self.files[0][1] or 'it'}{why}")
        self.file_field, ending = _file_field(named)
        if self.file_field is None and self.options.modality in ("sound", "image", "video"):
            raise UserError(
                f"{self.place.uri}: no field of file names among {', '.join(glance.names)}; "
                "expected file_name"
            )
        held = [name for name in glance.held if name != self.file_field]
        self.decide(glance.names, ending, held)
        if any(split is None for split, _ in self.files):
            self._find_splits(named, glance)
        self.settle_test(glance)

    def _find_splits(self, named: list[Row], glance: Glance) -> None:
        """Which splits the rows of one metadata file name: in a field, or by their media's folders.

        Nobody knows before the last row which there are: rows are read until nothing can be added.
        """
        if self.split_field is None and _name_splits([split_named(r.get(SPLIT)) for r in named]):
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
                    split = split_named(record.get(self.split_field or ""))
                if split is None:
                    continue
                glance.add(split, record)
                self.given |= {split}
                if self.given >= ALL and any(
                    glance.says("test", field) for field in (self.field, self.label) if field
                ):
                    return

    def _folder_split(self, record: Row) -> str | None:
        """The split that the first folder of a row's media file names."""
        try:
            first, inside, _ = self._inside(record.get(self.file_field or "")).partition("/")
        except ValueError:
            return None
        return split_named(first) if inside else None

    def _inside(self, name: object) -> str:
        """A file name relative to the folder of the media, of an absolute one, too.

        Raises:
            ValueError: there is none, or it leads out of the folder.
        """
        if not isinstance(name, str) or not name:
            raise ValueError("no file name")
        if name.startswith("/") and not self.home.remote:
            path = os.path.normpath(name)
            for home in (self.home.uri, os.path.realpath(self.home.uri)):
                if path.startswith(f"{home}/"):
                    name = path[len(home) + 1 :]
                    break
        self.home.path(name)  # checked alone: "train/" before it would hide an absolute path
        return name

    def _records(self, file: str, limit: int | None = None) -> Iterator[Row]:
        """The first readable records of a metadata file, or all."""
        found = (row for _, row in records(self.place, file) if isinstance(row, dict))
        return islice(found, limit)

    def _locate_classes(self) -> None:
        """Find the folders of splits; the last folder of a file is its class, if there are several
        of them."""
        first = _first_media(self.place)
        folders = [e for e in self.place.entries() if e.is_folder and printable(e.name) == e.name]
        for entry in folders[:NEAR]:
            for _, file in _metadata(Place(self.place.path(entry.name))):
                raise UserError(
                    f"{self.place.uri}: no metadata file in it, but {entry.name}/{file}; give "
                    f"{self.place.path(entry.name)}"
                )
        if first is None:
            raise lacking(
                self.place,
                f"neither a metadata file ({', '.join(NAMES[:4])} …) nor media in folders named by "
                "class in it",
            )
        self.root = _root_of_splits(self.place)
        tests = []
        for entry in self.place.entries(self.root):
            if entry.is_folder and (split := split_named(entry.name)):
                self.given |= {split}
                if split == "test":
                    tests.append(_below(self.root, entry.name))
        ending = (self.options.modality and "") or ending_of(first)
        self.decide(["label"], ending)
        if not self._has_classes():
            self.decide([], ending)
        elif tests and not any(e.is_folder for test in tests for e in self.place.entries(test)):
            self.take_no_test()

    def _has_classes(self) -> bool:
        """Whether media are in folders of two classes: one for all, like ``audio``, is none."""
        found: set[str] = set()
        for entry in self.place.walk(self.root):
            if MODALITY_OF.get(ending_of(entry.name)) == self.modality:
                _, label = self._class_of(entry.name)
                found |= {label} if label is not None else set()
                if len(found) > 1:
                    return True
        return False

    def _class_of(self, path: str) -> tuple[str | None, str | None]:
        """(Split, class) of a media file by the folders that it is in."""
        folders = path.removeprefix(f"{self.root}/" if self.root else "").split("/")[:-1]
        split = split_named(folders[0]) if folders else None
        classes = folders[1:] if split else folders
        return split, classes[-1] if classes else None

    def annotations(self) -> list[str]:
        """The metadata files."""
        return [file for _, file in self.files]

    def rows(self, sources: Sources) -> Iterator[Row | Rejected]:
        """Rows in the order of the metadata, then media that they do not name."""
        if not self.files:
            yield from self._classes()
            return
        for split, file in self.files:
            folder = file.rpartition("/")[0]
            with Seen() as named:
                told = file or self.place.name
                for number, record in records(self.place, file):
                    key = key_of(f"{told}:{number}")
                    if isinstance(record, Broken):
                        yield bad(key, record.reason, told, number, record.rest)
                        continue
                    try:
                        row = self._row(key, split, folder, record, named)
                    except ValueError as problem:
                        yield aside(key, problem, told, number)
                        continue
                    yield row | {"file": told, "row": number}
                if self.file_field is not None and not self.place.is_file:
                    yield from self._unnamed(folder, named)

    def _row(self, key: str, split: str | None, folder: str, record: Row, named: Seen) -> Row:
        if self.file_field is None:
            return self.row(key, record, None, split)
        name = self._inside(record.get(self.file_field))
        inside = f"{folder}/{name}" if folder and not self.options.media else name
        path = self.home.path(inside)
        named.add(path)
        split = split or (self._folder_split(record) if self.by_folder else None)
        if self.by_folder and split is None:
            raise ValueError("a file in no folder that names a split")
        # By its name and not its row: several rows may name one file, and it must be on one side.
        by = path.removeprefix(f"{self.home.uri}/")
        row = self.row(key, record, MediaRef(path), split, drawn_by=by)
        # A store is not asked for each row one after the other: whoever reads the medium sees.
        if not self.home.remote and not self.home.exists(inside):
            raise ValueError("the media file is missing")
        return row

    def other_sources(self) -> list[dict[str, str]]:
        """As of any; with one file of rows also the media beside it."""
        found = super().other_sources()
        if self.place.is_file and self.file_field is not None and not self.options.media:
            media = (e for e in self.home.walk() if ending_of(e.name) in MODALITY_OF)
            files, size, digest = listing_digest(media)
            found.append({"file": f"media: {files} files, {size} bytes", "sha256": digest})
        return found

    def _unnamed(self, folder: str, named: Seen) -> Iterator[Rejected]:
        """Media files below a metadata file that it does not name."""
        others = {file.rpartition("/")[0] for _, file in self.files} - {folder}
        for entry in self.home.walk(folder if not self.options.media else ""):
            if MODALITY_OF.get(ending_of(entry.name)) != self.modality:
                continue
            if any(other and entry.name.startswith(f"{other}/") for other in others):
                continue
            if self.home.path(entry.name) not in named:
                yield Rejected(key_of(entry.name), "a media file that no row names", entry.name)

    def _classes(self) -> Iterator[Row | Rejected]:
        for entry in self.place.walk():
            if MODALITY_OF.get(ending_of(entry.name)) != self.modality:
                continue
            split, label = self._class_of(entry.name)
            key = key_of(entry.name)
            untold = self.silent and split == "test"
            if label is None and "labels" in self.has and not untold:
                yield bad(key, "not in a folder that names a class", entry.name)
                continue
            reference = MediaRef(self.place.path(entry.name))
            try:
                yield self.row(key, {"label": label}, reference, split)
            except ValueError as problem:  # a name that is not UTF-8
                yield aside(key, problem, entry.name, None)


def _names_of(record: Row) -> Row:
    """What a record may name files and splits by; a picture that stands in it is no name."""
    found = {name: record[name] for name in (*FILE_FIELDS, SPLIT) if name in record}
    return {name: value if isinstance(value, str) else None for name, value in found.items()}


def _file_field(rows: list[Row]) -> tuple[str | None, str | None]:
    """(Field that names media files, ending of one of them) by some rows; a known ending first."""
    found = ((n, r) for r in rows for n in FILE_FIELDS if _names_media(n, r))
    named = [(name, ending_of(str(row[name]))) for name, row in found]
    known = next((each for each in named if each[1] in MODALITY_OF), None)
    return known or next(iter(named), (None, None))


def _name_splits(found: list[str | None]) -> bool:
    """Whether rows name splits: all of them do, or more than one split is named."""
    named = set(found) - {None}
    return bool(named) and (None not in found or len(named) > 1)


def _root_of_splits(place: Place) -> str:
    """The folder that the folders of splits stand in: the place itself, or one that stands in it
    alone, as unpacking makes it; the place where there are no splits.

    Raises:
        UserError: splits are named further down, in folders side by side.
    """
    root, folders = "", list[str]()
    for _ in range(3):
        folders = [e.name for e in place.entries(root) if e.is_folder and e.name != "__MACOSX"]
        if any(split_named(name) for name in folders):
            return root
        if len(folders) != 1:
            break
        root = _below(root, folders[0])
    for name in folders[:3]:
        inside = [e.name for e in place.entries(_below(root, name)) if e.is_folder]
        named = [each for each in inside if split_named(each)]
        if len({split_named(each) for each in named}) > 1:
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
    known = isinstance(value, str) and ending_of(value) in MODALITY_OF
    return known or (field == "file_name" and field in row)


def holds_rows(place: Place) -> bool:
    """Whether metadata name media or hold labelled texts: tars beside them are leftovers."""
    if place.is_file:
        return False
    for _, file in _metadata(place):
        first = [row for _, row in islice(records(place, file), 100) if isinstance(row, dict)]
        if _file_field(first)[0] is not None:
            return True
        fields = {name for row in first for name in row}
        if fields & set(TEXT) and fields & set(LABEL):
            return True
    return False


def _metadata(place: Place) -> Iterator[tuple[str | None, str]]:
    """(Split, file) of the metadata files: in the folder itself, or in folders named by splits."""
    for name in NAMES:
        if place.exists(name):
            yield None, name
            return
    for entry in place.entries():
        split = split_named(entry.name.split(".")[0])
        if split is None:
            continue
        if entry.is_folder:
            found = next((n for n in NAMES if place.exists(f"{entry.name}/{n}")), None)
            if found:
                yield split, f"{entry.name}/{found}"
        elif entry.name.lower().endswith(ROWS):
            yield split, entry.name


def _first_media(place: Place) -> str | None:
    """The first media file that stands in a folder below the place."""
    for entry in place.walk(depth=5):
        if "/" in entry.name and ending_of(entry.name) in MODALITY_OF:
            return entry.name
    return None
