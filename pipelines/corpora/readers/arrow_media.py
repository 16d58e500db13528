"""Media that stand in Arrow files, referred to by their place there.

On a disk a file is mapped, not loaded. In a store it is read front to back, a batch in memory at
a time. Its bytes are anyone's: no offset is followed before it is known to lie in the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.corpora.formats.arrow_reader import iter_batch_rows
from pipelines.corpora.formats.encoding import BadRecord
from pipelines.corpora.readers.fields import MODALITY_OF_EXTENSION, file_extension
from pipelines.io.directory import SourceDirectory
from pipelines.io.media import MediaRef
from pipelines.io.source_file import check_regular_file, open_stream
from skillnet_platform.errors import UserError

#: What the parts of a media column may be; one that is not there counts as null.
PARTS = {
    "bytes": {pa.binary(), pa.large_binary(), pa.string(), pa.large_string(), pa.null()},
    "path": {pa.string(), pa.large_string(), pa.null()},
}


@dataclass(frozen=True)
class BatchBody:
    """Bytes of a file that a batch's buffers lie in, in memory.

    Args:
        address: of their first byte.
        size: their number.
        offset: of the first one in the file.
    """

    address: int
    size: int
    offset: int


def iter_mapped_batches(path: str) -> Iterator[tuple[pa.RecordBatch, BatchBody]]:
    """Batches of a file on a disk."""
    check_regular_file(path)
    with pa.memory_map(path) as file:
        whole = file.read_buffer()
        for batch in pa.ipc.open_stream(pa.BufferReader(whole)):
            yield batch, BatchBody(whole.address, whole.size, 0)


def iter_streamed_batches(path: str) -> Iterator[tuple[pa.RecordBatch, BatchBody]]:
    """The same of a file in a store, one batch at a time."""
    with open_stream(path) as stream:
        messages = iter(pa.ipc.MessageReader.open_stream(stream))
        first = next(messages, None)
        if first is None:
            raise pa.ArrowInvalid("an empty file")
        schema = pa.ipc.read_schema(first)
        for message in messages:
            if message.type != "record batch":
                raise UserError(
                    f"{path}: columns with a dictionary of their own, which are read from a disk "
                    "alone; copy the dataset there"
                )
            body = message.body
            batch = pa.ipc.read_record_batch(message, schema)
            yield batch, BatchBody(body.address, body.size, stream.tell() - body.size)


def iter_media_rows(
    batch: pa.RecordBatch, media: str | None, path: str, body: BatchBody, home: SourceDirectory
) -> Iterator[dict[str, Any] | BadRecord]:
    """Rows of a batch, of which the column ``media`` holds references.

    Args:
        batch: of the file ``path``, as it came with ``body``.
        media: name of a column that :func:`media_column_error` finds nothing wrong with, if there is one.
        home: the folder of media that have a path and no bytes.

    Raises:
        ArrowInvalid: the batch is damaged as a whole.
    """
    batch.validate()
    if batch.num_rows > 8 * body.size:  # columns of nulls alone may have any length
        raise pa.ArrowInvalid("more rows than bits")
    names = batch.schema.names
    plain = iter_batch_rows(batch.select([n for n, name in enumerate(names) if name != media]))
    if media is None:
        yield from plain
        return
    column = batch.column(names.index(media))
    for row, found in zip(plain, _references(column, path, body, home), strict=True):
        if isinstance(row, BadRecord):
            yield row
        else:
            yield found if isinstance(found, BadRecord) else row | {media: found}


def _references(
    column: pa.Array, path: str, body: BatchBody, home: SourceDirectory
) -> Iterator[MediaRef | BadRecord | None]:
    """Where the bytes of each value of ``struct<bytes, path>`` stand in the file."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    files = iter_batch_rows(pa.record_batch({"path": _part(column, "path")}))
    data = _part(column, "bytes")
    # Not value by value: to look whether one is there, pyarrow would follow its offsets.
    given, filled = column.is_valid().to_pylist(), data.is_valid().to_pylist()
    spans = list(_spans(data, body)) if any(filled) else []
    for place, file in enumerate(files):
        if not given[place]:
            yield None
        elif filled[place]:
            start, end = spans[place]
            if 0 <= start <= end <= body.size:
                yield MediaRef(path, body.offset + start, end - start)
            else:  # so it is, too, where buffers are compressed, which the library never does
                yield BadRecord("media that do not lie in their Arrow file")
        elif isinstance(file, BadRecord):
            yield file
        else:
            yield _beside(home, file["path"])


def _spans(data: pa.Array, body: BatchBody) -> Iterator[tuple[int, int]]:
    """First and last byte of each value of a binary column, from the start of ``body``."""
    _, ends, values = data.buffers()
    wide = pa.types.is_large_binary(data.type) or pa.types.is_large_string(data.type)
    count = data.offset + len(data) + 1
    numbers = np.frombuffer(ends, np.int64 if wide else np.int32, count)[data.offset :].tolist()
    start = 0 if values is None else values.address - body.address
    return ((start + a, start + b) for a, b in pairwise(numbers))


def media_column_error(schema: pa.Schema, media: str | None) -> str:
    """Why media cannot be found in a file of that schema; "" if they can."""
    if media is None:
        return ""
    if schema.names.count(media) != 1:
        return "not one column of media as dataset_info.json names it"
    kind = schema.field(media).type
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    parts = {part.name: part.type for part in kind} if pa.types.is_struct(kind) else {}
    known = all(parts.get(name, pa.null()) in types for name, types in PARTS.items())
    if pa.types.is_null(kind) or (parts and known):
        return ""
    return "media of a type that is not read; expected struct<bytes: binary, path: string>"


def _beside(home: SourceDirectory, file: str | None) -> MediaRef | None:
    """A file that the dataset only names: below its folder, or below ``media``."""
    try:
        if file and file_extension(file) in MODALITY_OF_EXTENSION:
            return MediaRef(home.path(file))
    except ValueError:
        pass  # it leads out of the folder: a saved dataset may come from anywhere
    return None


def _part(column: pa.Array, name: str) -> pa.Array:
    if pa.types.is_null(column.type) or column.type.get_field_index(name) < 0:
        return pa.nulls(len(column))
    return column.field(name)
