"""A folder of one's own: media beside ``metadata.jsonl``, CSV or Parquet, as "audiofolder" and
"imagefolder" have it.

    metadata.jsonl                      {"file_name": "a/1.wav", "transcription": …}
    train/metadata.csv  test/…          splits given by folders
    train/cat/1.jpg  train/dog/2.jpg    no metadata: the folder is the class
    rows.csv                            no media: texts with labels, functions with docstrings
    any-name.jsonl                      given as the place itself, media beside it or none

``file_name`` is relative to its metadata file and cannot lead out of the folder.
"""

from collections.abc import Iterator
from itertools import islice

from pipelines.corpora.base import Rejected, Row, Sources
from pipelines.corpora.fielded import (
    LABEL,
    MODALITY_OF,
    SPLIT_NAMES,
    TEXT,
    FieldedCorpus,
    ending_of,
)
from pipelines.corpora.placed import aside, bad, key_of
from pipelines.corpora.records import Broken, records
from pipelines.media import MediaRef
from pipelines.places import Place, listing_digest
from pipelines.seen import Seen
from skillnet_platform.errors import UserError

NAMES = tuple(
    f"metadata{ending}{packed}"
    for ending in (".jsonl", ".json", ".csv", ".tsv", ".parquet")
    for packed in ("", ".gz")
    if not (ending == ".parquet" and packed)
)
FILE_FIELDS = ("file_name", "file", "filename", "path", "audio", "image", "video", "wav")
ROWS = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".csv", ".csv.gz", ".tsv", ".parquet")


class Folder(FieldedCorpus):
    """Media or texts with what their metadata say."""

    name = "folder"
    version = 2  # rows of Parquet files and JSON arrays are counted from 1

    @classmethod
    def guess(cls, place: Place) -> str | None:
        """Metadata, or folders of media, or one file of rows."""
        if place.is_file:
            return "a file of rows" if place.name.endswith(ROWS) else None
        found = list(_metadata(place))
        if found:
            return f"{found[0][1]} names files or holds rows"
        if media := _first_media(place):
            return f"{media} is a media file in a folder that names its class"
        return None

    def locate(self) -> None:
        """Find metadata files, else classes by folders; see what the first row has."""
        self.files = [(None, "")] if self.place.is_file else list(_metadata(self.place))
        beside = self.place.uri.rpartition("/")[0] or "/" if self.place.is_file else self.place.uri
        self.home = Place(self.options.media or beside)
        self.file_field: str | None = None
        if not self.files:
            first = _first_media(self.place)
            if first is None:
                raise UserError(
                    f"{self.place.uri}: neither a metadata file ({', '.join(NAMES[:4])} …) nor "
                    "media in folders named by class in it"
                )
            self.given = frozenset(
                SPLIT_NAMES[e.name] for e in self.place.entries() if e.name in SPLIT_NAMES
            )
            self.decide(["label"], (self.options.modality and "") or ending_of(first))
            return
        self.given = frozenset(split for split, _ in self.files if split)
        if self.options.split is not None:
            self.given = frozenset(SPLIT_NAMES.values())
        first_row = self._first_row()
        self.file_field = next((n for n in FILE_FIELDS if _names_media(n, first_row)), None)
        if self.file_field is None and self.options.modality in ("sound", "image", "video"):
            raise UserError(
                f"{self.place.uri}: no field of file names among {', '.join(first_row)}; expected "
                "file_name"
            )
        ending = ending_of(str(first_row[self.file_field])) if self.file_field else None
        fields = [name for name in first_row if name != self.file_field]
        self.decide(fields, ending)

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
        name = record.get(self.file_field)
        if not isinstance(name, str) or not name:
            raise ValueError("no file name")
        inside = f"{folder}/{name}" if folder and not self.options.media else name
        self.home.path(name)  # checked alone: "train/" before it would hide an absolute path
        path = self.home.path(inside)
        named.add(path)
        row = self.row(key, record, MediaRef(path), split)
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
            parts = entry.name.split("/")
            split = SPLIT_NAMES.get(parts[0])
            key = key_of(entry.name)
            if len(parts) < 2 or (split and len(parts) < 3):
                yield bad(key, "not in a folder that names a class", entry.name)
                continue
            reference = MediaRef(self.place.path(entry.name))
            yield self.row(key, {"label": parts[-2]}, reference, split)

    def _first_row(self) -> Row:
        for _, file in self.files:
            for _, record in records(self.place, file):
                if isinstance(record, dict):
                    return record
        raise UserError(f"{self.place.uri}: no readable row in {self.files[0][1] or 'it'}")


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
        first = islice(records(place, file), 100)
        row: Row = next((record for _, record in first if isinstance(record, dict)), {})
        if any(_names_media(name, row) for name in FILE_FIELDS):
            return True
        if row.keys() & set(TEXT) and row.keys() & set(LABEL):
            return True
    return False


def _metadata(place: Place) -> Iterator[tuple[str | None, str]]:
    """(Split, file) of the metadata files: in the folder itself, or in folders named by splits."""
    for name in NAMES:
        if place.exists(name):
            yield None, name
            return
    for entry in place.entries():
        split = SPLIT_NAMES.get(entry.name.split(".")[0].lower())
        if split is None:
            continue
        if entry.is_folder:
            found = next((n for n in NAMES if place.exists(f"{entry.name}/{n}")), None)
            if found:
                yield split, f"{entry.name}/{found}"
        elif entry.name.endswith(ROWS):
            yield split, entry.name


def _first_media(place: Place) -> str | None:
    """The first media file that stands in a folder below the place."""
    for entry in place.walk(depth=3):
        if "/" in entry.name and ending_of(entry.name) in MODALITY_OF:
            return entry.name
    return None
