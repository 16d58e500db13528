"""References to media inside Arrow files, by their byte range.

On a disk a file is mapped into memory, not loaded. In a store it is read front to back, one batch
in memory at a time. The bytes of the file are not trusted: no offset is followed before it is known
to lie in the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.corpora.formats.arrow_reader import iter_batch_rows
from pipelines.data.corpora.formats.encoding import BadRecord
from pipelines.data.corpora.formats.parquet_media import EmbeddedMedia, digest_media
from pipelines.data.corpora.readers.fields import MODALITY_OF_EXTENSION, file_extension
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.io.media import MediaRef
from pipelines.data.io.source_file import check_regular_file, open_stream
from skillnet_platform.errors import UserError

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
