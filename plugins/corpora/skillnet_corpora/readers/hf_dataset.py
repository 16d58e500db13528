"""Format ``hf_dataset``: Hugging Face datasets of ``save_to_disk``, read without their library.

    dataset_dict.json  train/  test/        or the folder of a single split
    train/state.json  train/dataset_info.json  train/data-00000-of-00002.arrow

Rows refer to images and audio inside the Arrow files by their byte range. Media that only have a
path are read from below the directory. On a disk the files are mapped into memory, not loaded. In a
store they are read front to back, one batch at a time (the library writes 1,000 rows or fewer).
Each pass over the rows transfers the media too, and decoding transfers them once more.
The bytes of a file are not trusted: no offset is followed before it is known to lie in the file.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.corpora.base import Row
from pipelines.data.corpora.formats.encoding import BadRecord, find_repeated_column
from pipelines.data.corpora.formats.record_reader import MAX_ENTRY_CHARS, iter_batch_rows
from pipelines.data.corpora.readers.base import FileRecord
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.io.media import MediaRef
from pipelines.data.io.source_file import check_regular_file, make_read_error, open_stream
from skillnet.modality import is_string_modality
from skillnet_corpora.readers.class_names import FileClasses, name_classes, unify_class_names
from skillnet_corpora.readers.fields import (
    ALL_SPLITS,
    MODALITY_OF_EXTENSION,
    RecordCorpus,
    file_extension,
    parse_split_name,
    parse_split_prefix,
)
from skillnet_corpora.readers.joined_captions import ITEM_FIELD
from skillnet_corpora.readers.parquet_media import (
    EmbeddedMedia,
    check_unread_media,
    describe_classes,
    describe_features,
    digest_media,
)
from skillnet_corpora.readers.schema_sample import SAMPLE_ROWS, SchemaSample
from skillnet_corpora.readers.unread_files import missing_format_error
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


#: Allowed types of the parts of a media column. A missing part counts as null.
PART_TYPES = {
    "bytes": {pa.binary(), pa.large_binary(), pa.string(), pa.large_string(), pa.null()},
    "path": {pa.string(), pa.large_string(), pa.null()},
}


@dataclass(frozen=True)
class BatchBody:
    """The bytes of a file, in memory, that contain the buffers of a batch.

    Attributes:
        address: memory address of the first byte.
        size: number of bytes.
        offset: position of the first byte in the file.
        data: the bytes.
    """

    address: int
    size: int
    offset: int
    data: memoryview


def iter_mapped_batches(path: str) -> Iterator[tuple[pa.RecordBatch, BatchBody]]:
    """Yield the batches of an Arrow file on a disk, mapped into memory."""
    check_regular_file(path)
    with pa.memory_map(path) as file:
        body = file.read_buffer()
        for batch in pa.ipc.open_stream(pa.BufferReader(body)):
            yield batch, BatchBody(body.address, body.size, 0, memoryview(body))


def read_stream_schema(path: str) -> pa.Schema:
    """Return the schema of an Arrow file, from its first bytes.

    Raises:
        ArrowException, OSError: the file is damaged, or there is none.
    """
    with open_stream(path) as stream:
        return _read_schema(iter(pa.ipc.MessageReader.open_stream(stream)))


def _read_schema(messages: Iterator[pa.Message]) -> pa.Schema:
    first = next(messages, None)
    if first is None:
        raise pa.ArrowInvalid("an empty file")
    return pa.ipc.read_schema(first)


def iter_streamed_batches(path: str) -> Iterator[tuple[pa.RecordBatch, BatchBody]]:
    """Yield the batches of an Arrow file in a store, one in memory at a time."""
    with open_stream(path) as stream:
        messages = iter(pa.ipc.MessageReader.open_stream(stream))
        schema = _read_schema(messages)
        for message in messages:
            if message.type != "record batch":
                raise UserError(
                    f"{path}: dictionary-encoded columns can only be read from a disk; copy the "
                    "dataset to a disk"
                )
            body = message.body
            batch = pa.ipc.read_record_batch(message, schema)
            start = stream.tell() - body.size
            yield batch, BatchBody(body.address, body.size, start, memoryview(body))


def iter_media_rows(
    batch: pa.RecordBatch,
    media: str | None,
    path: str,
    body: BatchBody,
    media_source: SourceDirectory,
) -> Iterator[dict[str, Any] | BadRecord]:
    """Yield the rows of a batch, with an ``EmbeddedMedia`` in the media column.

    Args:
        batch: a batch of the file ``path``, which came with ``body``.
        media: name of a column for which :func:`media_column_error` returns "", or None.
        path: path or URI of the Arrow file.
        body: bytes of the file that contain the batch.
        media_source: directory of media that have a path and no bytes.

    Raises:
        ArrowInvalid: no row of the batch can be read.
    """
    batch.validate()
    # Columns of nulls have no buffers, so a damaged batch can claim any length.
    if batch.num_rows > 8 * body.size:
        raise pa.ArrowInvalid("more rows than bits")
    names = batch.schema.names
    plain = iter_batch_rows(batch.select([n for n, name in enumerate(names) if name != media]))
    if media is None:
        yield from plain
        return
    column = batch.column(names.index(media))
    for row, found in zip(plain, _references(column, path, body, media_source), strict=True):
        if isinstance(row, BadRecord):
            yield row
        else:
            yield found if isinstance(found, BadRecord) else row | {media: found}


def _references(
    column: pa.Array, path: str, body: BatchBody, media_source: SourceDirectory
) -> Iterator[EmbeddedMedia | BadRecord | None]:
    """Yield a reference to the bytes of each value of ``struct<bytes, path>``."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    files = iter_batch_rows(pa.record_batch({"path": _struct_part(column, "path")}))
    data = _struct_part(column, "bytes")
    # Not value by value: to find out whether a value is null, pyarrow would follow its offsets.
    is_present, has_bytes = column.is_valid().to_pylist(), data.is_valid().to_pylist()
    spans = list(_byte_spans(data, body)) if any(has_bytes) else []
    for index, file in enumerate(files):
        if not is_present[index]:
            yield None
        elif has_bytes[index]:
            start, end = spans[index]
            if 0 <= start <= end <= body.size:
                reference = MediaRef(path, body.offset + start, end - start)
                yield EmbeddedMedia(reference, digest_media(body.data[start:end]))
            else:
                # Also reached for compressed buffers, which the library never writes.
                yield BadRecord("media outside of their Arrow file")
        elif isinstance(file, BadRecord):
            yield file
        else:
            yield _file_reference(media_source, file["path"])


def _byte_spans(data: pa.Array, body: BatchBody) -> Iterator[tuple[int, int]]:
    """Yield start and end of each value of a binary column, relative to ``body``."""
    _, ends, values = data.buffers()
    wide = pa.types.is_large_binary(data.type) or pa.types.is_large_string(data.type)
    count = data.offset + len(data) + 1
    numbers = np.frombuffer(ends, np.int64 if wide else np.int32, count)[data.offset :].tolist()
    start = 0 if values is None else values.address - body.address
    return ((start + a, start + b) for a, b in pairwise(numbers))


def media_column_error(schema: pa.Schema, media: str | None) -> str:
    """Return why the media column of a file cannot be read, or "".

    Args:
        schema: schema of the file.
        media: name of the media column, None without media.
    """
    if media is None:
        return ""
    if schema.names.count(media) != 1:
        return "no single media column of the name in dataset_info.json"
    kind = schema.field(media).type
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    parts = {part.name: part.type for part in kind} if pa.types.is_struct(kind) else {}
    known = all(parts.get(name, pa.null()) in types for name, types in PART_TYPES.items())
    if pa.types.is_null(kind) or (parts and known):
        return ""
    return "media of an unsupported type; expected struct<bytes: binary, path: string>"


def _file_reference(media_source: SourceDirectory, file: str | None) -> EmbeddedMedia | None:
    """Return the reference to a file that the dataset only names, or None."""
    try:
        if file and file_extension(file) in MODALITY_OF_EXTENSION:
            place = media_source.path(file)
            return EmbeddedMedia(MediaRef(place), place)
    except ValueError:
        pass  # it leads out of the directory: a saved dataset is not trusted
    return None


def _struct_part(column: pa.Array, name: str) -> pa.Array:
    if pa.types.is_null(column.type) or column.type.get_field_index(name) < 0:
        return pa.nulls(len(column))
    return column.field(name)
