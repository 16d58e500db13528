"""A Hugging Face dataset that was saved with ``save_to_disk``; the library is not needed.

    dataset_dict.json  train/  test/        or the folder of one split alone
    train/state.json  train/dataset_info.json  train/data-00000-of-00002.arrow

Pictures and recordings whose bytes stand in its Arrow files are referred to by their place there;
those that only have a path are read from below the folder. On a disk the files are mapped, not
loaded. In a store they are read front to back, a batch of the library's (1,000 rows or fewer) in
memory at a time: media pass along whenever rows are read, and again to be decoded.
"""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from pipelines.corpora.base import RejectedRow, Row, SourceArchives
from pipelines.corpora.formats.packed import missing_format_error
from pipelines.corpora.formats.record_reader import MAX_ENTRY_CHARS, BadRecord
from pipelines.corpora.formats.schema_sample import SAMPLE_ROWS, SchemaSample
from pipelines.corpora.readers.arrow_media import (
    iter_mapped_batches,
    iter_media_rows,
    iter_streamed_batches,
    media_column_error,
)
from pipelines.corpora.readers.base import error_row, make_key, rejected_row
from pipelines.corpora.readers.fields import (
    ALL_SPLITS,
    RecordCorpus,
    parse_split_name,
    parse_split_prefix,
)
from pipelines.io.directory import SourceDirectory
from pipelines.io.source_file import make_read_error
from skillnet_platform.errors import UserError, first_line

#: Features of the library that hold media.
MEDIA_FEATURES = {"Image": "image", "Audio": "sound", "Video": "video"}
DAMAGED = BadRecord("an Arrow file that is cut short or damaged", truncates_file=True)


class HfDatasetCorpus(RecordCorpus):
    """Rows of a saved dataset."""

    name = "hf_dataset"
    version = 3  # a test without labels is for prediction; a field for splits is heeded

    @classmethod
    def detect(cls, place: SourceDirectory) -> str | None:
        """The files that ``save_to_disk`` writes."""
        if place.is_file:
            return None
        for name in ("dataset_dict.json", "state.json"):
            if place.exists(name):
                return f"{name} is written by save_to_disk"
        return None

    def discover(self) -> None:
        """Find its splits; see what its features are."""
        self.media_source = (
            SourceDirectory(self.options.media) if self.options.media else self.source
        )
        self.folders = _splits(self.source)
        if not self.folders:
            raise missing_format_error(
                self.source,
                "neither dataset_dict.json nor state.json in it; it is made by save_to_disk",
            )
        self.named_splits = frozenset(split for split, _ in self.folders if split)
        if self.options.split is not None and not self.named_splits:
            self.named_splits = ALL_SPLITS
        features = _features(self.source, self.folders[0][1])
        types = {n: a.get("_type") for n, a in features.items() if isinstance(a, dict)}
        kinds = {
            name: MEDIA_FEATURES[kind]
            for name, kind in types.items()
            if isinstance(kind, str) and kind in MEDIA_FEATURES
        }
        self.media_field = next(iter(kinds), None)
        fields = [name for name in features if name != self.media_field]
        if self.media_field is not None and self.options.modality is None:
            self.options.modality = kinds[self.media_field]
        self.infer_schema(fields, "" if self.media_field is not None else None)
        named = features.get(self.label_field or "", {})
        if "labels" in self.annotations_present and isinstance(named, dict) and named.get("names"):
            self.labels = tuple(named["names"])
        if "test" in self.named_splits and self.options.split is None:
            self.resolve_test_split(self._look())

    def _look(self) -> SchemaSample:
        """At the first rows of the test: its labels may all be -1, for none. Of the training rows'
        it is known what they are, unless they have no names."""
        glance = SchemaSample()
        looked_at = {"test"} if self.labels else {"test", "train"}
        for split, folder in self.folders if self.annotations_present else ():
            for file in _files(self.source, folder)[:1] if split in looked_at else ():
                found = (row for row in self._records(file) if isinstance(row, dict))
                for record in islice(found, SAMPLE_ROWS):
                    glance.add(split, record)
        return glance

    def num_source_files(self) -> int:
        """The Arrow files."""
        return sum(len(_files(self.source, folder)) for _, folder in self.folders) or 1

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Rows in the order of splits and files."""
        for split, folder in self.folders:
            for file in _files(self.source, folder):
                for number, record in enumerate(self._records(file), start=1):
                    key = make_key(f"{file}:{number}")
                    if isinstance(record, BadRecord):
                        yield error_row(key, record.reason, file, number, record.truncates_file)
                        continue
                    try:
                        media = record.pop(self.media_field) if self.media_field else None
                        row = self.build_row(key, self._named(record), media, split)
                    except ValueError as problem:
                        yield rejected_row(key, problem, file, number)
                        continue
                    yield row | {"file": file, "row": number}

    def _records(self, file: str) -> Iterator[dict[str, Any] | BadRecord]:
        """Rows of a file; the media field holds a reference."""
        path = self.source.path(file)
        try:
            for batch, body in (
                iter_streamed_batches if self.source.remote else iter_mapped_batches
            )(path):
                if why := media_column_error(batch.schema, self.media_field):
                    yield BadRecord(why, truncates_file=True)
                    return
                yield from iter_media_rows(batch, self.media_field, path, body, self.media_source)
        except FileNotFoundError:
            yield BadRecord("the Arrow file is missing", truncates_file=True)
        except OSError as problem:
            if problem.errno is not None:
                raise make_read_error(path, problem) from None
            yield DAMAGED
        except (pa.ArrowException, UnicodeDecodeError):  # names of columns may be no UTF-8
            yield DAMAGED

    def _named(self, record: dict[str, Any]) -> dict[str, Any]:
        """Class numbers by their names."""
        value = record.get(self.label_field or "")
        if self.labels and isinstance(value, int) and 0 <= value < len(self.labels):
            record[self.label_field or ""] = self.labels[value]
        return record


def _splits(place: SourceDirectory) -> list[tuple[str | None, str]]:
    """(Split, folder with a slash behind it or "")."""
    if place.is_file:
        return []
    if place.exists("state.json"):
        return [(None, "")]
    if not place.exists("dataset_dict.json"):
        return []
    names = _json(place, "dataset_dict.json").get("splits") or []
    _check(_are_texts(names), place, "dataset_dict.json", "splits are no list of names")
    for name in names:
        _inside(place, "dataset_dict.json", name)
    found = [(parse_split_name(name), name) for name in names]
    if not any(split == "train" for split, _ in found):  # "train.clean.100"
        found = [(parse_split_prefix(name), name) for _, name in found]
    return [(split or name, f"{name}/") for split, name in found]


def _files(place: SourceDirectory, folder: str) -> list[str]:
    told = f"{folder}state.json"
    listed = _json(place, told).get("_data_files")
    right = isinstance(listed, list) and all(isinstance(entry, dict) for entry in listed)
    names = [entry.get("filename") for entry in listed] if right and listed else []
    _check(right and _are_texts(names), place, told, "_data_files is no list of file names")
    for name in names:
        _inside(place, told, name)
    return [f"{folder}{name}" for name in names]


def _features(place: SourceDirectory, folder: str) -> dict[str, Any]:
    """Column -> what the library says of it."""
    told = f"{folder}dataset_info.json"
    features = _json(place, told).get("features") or {}
    _check(isinstance(features, dict), place, told, "features is no object of columns")
    for about in features.values():
        names = about.get("names") if isinstance(about, dict) else None
        _check(not names or _are_texts(names), place, told, "names of classes are no list of texts")
    return features


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _check(right: bool, place: SourceDirectory, file: str, wrong: str) -> None:
    if not right:
        raise UserError(f"{place.path(file)}: {wrong}; save_to_disk does not write this")


def _inside(place: SourceDirectory, file: str, name: str) -> None:
    try:
        place.path(name)
    except ValueError as problem:
        raise UserError(f"{place.path(file)}: names {name!r}, {problem}") from None


def _json(place: SourceDirectory, file: str) -> dict[str, Any]:
    with place.open(file) as stream:
        data = stream.read(MAX_ENTRY_CHARS + 1)
    try:
        value: Any = json.loads(data.decode("utf-8")) if len(data) <= MAX_ENTRY_CHARS else None
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{place.path(file)}: not JSON ({first_line(problem)})") from None
    _check(isinstance(value, dict), place, file, "no JSON object")
    return dict(value)
