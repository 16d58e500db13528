"""Format ``hf_dataset``: Hugging Face datasets of ``save_to_disk``, read without their library.

    dataset_dict.json  train/  test/        or the folder of a single split
    train/state.json  train/dataset_info.json  train/data-00000-of-00002.arrow

Rows refer to images and audio inside the Arrow files by their byte range. Media that only have a
path are read from below the directory. On a disk the files are mapped into memory, not loaded. In a
store they are read front to back, one batch at a time (the library writes 1,000 rows or fewer).
Each pass over the rows transfers the media too, and decoding transfers them once more.
"""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from pipelines.data.corpora.base import Row
from pipelines.data.corpora.formats.class_names import FileClasses, name_classes, unify_class_names
from pipelines.data.corpora.formats.encoding import find_repeated_column
from pipelines.data.corpora.formats.packed_archives import missing_format_error
from pipelines.data.corpora.formats.parquet_media import (
    check_unread_media,
    describe_classes,
    describe_features,
)
from pipelines.data.corpora.formats.record_reader import MAX_ENTRY_CHARS, BadRecord
from pipelines.data.corpora.formats.schema_sample import SAMPLE_ROWS, SchemaSample
from pipelines.data.corpora.readers.arrow_media import (
    iter_mapped_batches,
    iter_media_rows,
    iter_streamed_batches,
    media_column_error,
    read_stream_schema,
)
from pipelines.data.corpora.readers.base import FileRecord
from pipelines.data.corpora.readers.fields import (
    ALL_SPLITS,
    RecordCorpus,
    parse_split_name,
    parse_split_prefix,
)
from pipelines.data.corpora.readers.joined_captions import ITEM_FIELD
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.io.source_file import make_read_error
from skillnet.modality import is_string_modality
from skillnet_platform.errors import UserError, first_line

DAMAGED_ARROW = BadRecord("an Arrow file that is cut short or damaged", truncates_file=True)

#: Rows in which texts are searched that stay unread.
TEXT_ROWS = 100


class HfDatasetCorpus(RecordCorpus):
    """Rows of a saved Hugging Face dataset.

    Attributes:
        folders: (split, folder with a slash at its end, or "").
        file_classes: Arrow file -> column -> names of its classes, as the file numbers them.
        media_field: column of the media, if there is one.
    """

    name = "hf_dataset"
    # Version 4: rows of one media file are one item, and stay in one split.
    # Version 5: the numbers of classes mean the names of their own file.
    version = 5

    @classmethod
    def detect(cls, source: SourceDirectory) -> str | None:
        """Return a file that ``save_to_disk`` writes as evidence."""
        if source.is_file:
            return None
        for name in ("dataset_dict.json", "state.json"):
            if source.exists(name):
                return f"{name} is written by save_to_disk"
        return None

    def discover(self) -> None:
        """Find its splits, and infer the schema from its features."""
        media = self.options.media
        self.media_source = SourceDirectory(media) if media else self.source
        self.folders = _list_splits(self.source)
        if not self.folders:
            raise missing_format_error(
                self.source,
                "neither dataset_dict.json nor state.json in it; save_to_disk writes them",
            )
        self.named_splits = frozenset(split for split, _ in self.folders if split)
        if self.options.split is not None and not self.named_splits:
            self.named_splits = ALL_SPLITS
        features = _read_features(self.source, self.folders[0][1])
        described = describe_features(features)
        classes = self._read_classes()
        self.class_names = unify_class_names(classes.values())
        self.file_classes = {
            file: {**self.class_names, **each.names} for file, each in classes.items()
        }
        self.media_field = next(iter(described.media), None)
        chosen = None if is_string_modality(self.options.modality) else self.media_field
        check_unread_media(self.source.uri, described, chosen, self.options.modality)
        fields = [name for name in features if name != self.media_field]
        if self.media_field is not None and self.options.modality is None:
            self.options.modality = described.media[self.media_field]
        first = SchemaSample()
        # In a store the first batch would be transferred with its media.
        is_light = not self.source.remote or self.media_field is None
        for split, folder in self.folders[:1] if is_light else ():
            for file in _list_files(self.source, folder)[:1]:
                found = (row for row in self._records(file) if isinstance(row, dict))
                for record in islice(found, TEXT_ROWS):
                    record.pop(self.media_field or "", None)
                    first.add(split, record)
        self.infer_schema(fields, "" if self.media_field is not None else None, None, first)
        if "test" in self.named_splits and self.options.split is None:
            self.resolve_test_split(self._sample_test())

    def _read_classes(self) -> dict[str, FileClasses]:
        """Return the classes of each Arrow file: of its own schema, else of its split."""
        found = dict[str, FileClasses]()
        for _, folder in sorted(self.folders, key=lambda each: each[0] != "train"):
            info = self.source.path(f"{folder}dataset_info.json")
            stated = describe_features(_read_features(self.source, folder)).class_names
            found[info] = FileClasses(info, stated)
            for file in _list_files(self.source, folder):
                own = self._read_schema_classes(file)
                found[file] = FileClasses(
                    own.file, {**stated, **own.names}, own.unnamed - stated.keys()
                )
        return found

    def _read_schema_classes(self, file: str) -> FileClasses:
        path = self.source.path(file)
        try:
            return describe_classes(read_stream_schema(path), path)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{path}: state.json lists it, and it is missing. Copy the whole dataset again"
            ) from None
        except OSError as error:
            if error.errno is not None:
                raise make_read_error(path, error) from None
        except (pa.ArrowException, UnicodeDecodeError):
            pass
        # Its rows say why it cannot be read.
        return FileClasses(path)

    def _sample_test(self) -> SchemaSample:
        """Return a sample of the test, whose labels can all be -1 for "no label".

        The training rows are sampled too, unless the classes have names.
        """
        sample = SchemaSample()
        sampled_splits = {"test"} if self.labels else {"test", "train"}
        for split, folder in self.folders if self.annotations_present else ():
            for file in _list_files(self.source, folder)[:1] if split in sampled_splits else ():
                found = (row for row in self._records(file) if isinstance(row, dict))
                for record in islice(found, SAMPLE_ROWS):
                    sample.add(split, record)
        return sample

    def num_source_files(self) -> int:
        """Return the number of Arrow files."""
        return sum(len(_list_files(self.source, folder)) for _, folder in self.folders) or 1

    def read_records(self) -> Iterator[FileRecord]:
        """Yield records in the order of splits and files."""
        for split, folder in self.folders:
            for file in _list_files(self.source, folder):
                for number, value in enumerate(self._records(file), start=1):
                    yield FileRecord(file, number, value, split)

    def build_record(self, record: FileRecord) -> Row:
        """Return the row of a record, with the media inside or beside its Arrow file."""
        fields, key = record.value, record.key
        media = fields.pop(self.media_field) if self.media_field else None
        item = (media.item if media else "") or key
        name_classes(self.file_classes[record.file], fields)
        reference = media.reference if media else None
        return self.build_row(key, fields, reference, record.split, item) | {ITEM_FIELD: item}

    def _records(self, file: str) -> Iterator[dict[str, Any] | BadRecord]:
        """Yield the rows of an Arrow file; the media field holds a reference."""
        path = self.source.path(file)
        iter_batches = iter_streamed_batches if self.source.remote else iter_mapped_batches
        try:
            for batch, body in iter_batches(path):
                if repeated := find_repeated_column(batch.schema.names):
                    yield repeated
                    return
                if reason := media_column_error(batch.schema, self.media_field):
                    yield BadRecord(reason, truncates_file=True)
                    return
                yield from iter_media_rows(batch, self.media_field, path, body, self.media_source)
        except FileNotFoundError:
            yield BadRecord("the Arrow file is missing", truncates_file=True)
        except OSError as error:
            # pyarrow raises OSError without a number for damaged content.
            if error.errno is not None:
                raise make_read_error(path, error) from None
            yield DAMAGED_ARROW
        except (pa.ArrowException, UnicodeDecodeError):  # column names can be invalid UTF-8
            yield DAMAGED_ARROW


def _list_splits(source: SourceDirectory) -> list[tuple[str | None, str]]:
    """Return (split, folder with a slash at its end, or "")."""
    if source.is_file:
        return []
    if source.exists("state.json"):
        return [(None, "")]
    if not source.exists("dataset_dict.json"):
        return []
    names = _read_object(source, "dataset_dict.json").get("splits") or []
    _require(_are_texts(names), source, "dataset_dict.json", "splits is not a list of names")
    for name in names:
        _require_inside(source, "dataset_dict.json", name)
    found = [(parse_split_name(name), name) for name in names]
    if not any(split == "train" for split, _ in found):  # "train.clean.100"
        found = [(parse_split_prefix(name), name) for _, name in found]
    return [(split or name, f"{name}/") for split, name in found]


def _list_files(source: SourceDirectory, folder: str) -> list[str]:
    state = f"{folder}state.json"
    listed = _read_object(source, state).get("_data_files")
    valid = isinstance(listed, list) and all(isinstance(entry, dict) for entry in listed)
    names = [entry.get("filename") for entry in listed] if valid and listed else []
    valid = valid and _are_texts(names)
    _require(valid, source, state, "_data_files is not a list of file names")
    # The metadata are not trusted, so no name may lead out of the directory.
    for name in names:
        _require_inside(source, state, name)
    return [f"{folder}{name}" for name in names]


def _read_features(source: SourceDirectory, folder: str) -> dict[str, Any]:
    """Return column -> its description by the library."""
    info = f"{folder}dataset_info.json"
    features = _read_object(source, info).get("features") or {}
    _require(isinstance(features, dict), source, info, "features is not an object of columns")
    for feature in features.values():
        names = feature.get("names") if isinstance(feature, dict) else None
        valid = not names or _are_texts(names)
        _require(valid, source, info, "names of classes are not a list of texts")
    return features


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _require(valid: bool, source: SourceDirectory, file: str, problem: str) -> None:
    if not valid:
        raise UserError(f"{source.path(file)}: {problem}; save_to_disk does not write this")


def _require_inside(source: SourceDirectory, file: str, name: str) -> None:
    try:
        source.path(name)
    except ValueError as error:
        raise UserError(f"{source.path(file)}: names {name!r}, {error}") from None


def _read_object(source: SourceDirectory, file: str) -> dict[str, Any]:
    with source.open(file) as stream:
        data = stream.read(MAX_ENTRY_CHARS + 1)
    try:
        # A longer file is not metadata of the library.
        value: Any = json.loads(data.decode("utf-8")) if len(data) <= MAX_ENTRY_CHARS else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source.path(file)}: not JSON ({first_line(error)})") from None
    _require(isinstance(value, dict), source, file, "not a JSON object")
    return dict(value)
