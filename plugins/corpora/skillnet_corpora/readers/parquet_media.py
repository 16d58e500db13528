"""Images, audio and videos that are embedded in Parquet files, as on the Hugging Face Hub.

The files of the Hub describe their columns in the schema metadata, under the key ``huggingface``.
Other files hold media as ``struct<bytes, path>`` or as bytes; their content shows the modality.
:func:`read_parquet_description` finds the columns, and :func:`read_embedded_rows` reads the rows.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import pyarrow as pa

from pipelines.data.corpora.formats.encoding import BadRecord, NumberedRecord
from pipelines.data.corpora.formats.record_reader import read_parquet_rows
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.io.media import BYTES_PART, CELLS_PER_BATCH, MediaRef, find_signature
from skillnet.modality import is_string_modality
from skillnet_corpora.readers.class_names import FileClasses, find_class_names
from skillnet_platform import console
from skillnet_platform.errors import UserError

#: Features of the Hub that hold media -> modality.
MEDIA_FEATURES = {"Image": "image", "Audio": "sound", "Video": "video"}
#: Rows that are searched for a media, which shows the modality of its column.
SEARCHED_ROWS = 1000


@dataclass(frozen=True)
class EmbeddedMedia:
    """A media inside a file of rows.

    Attributes:
        reference: where its bytes are.
        item: digest of its bytes, or its path: rows with the same value have the same media. ""
            for media without bytes, of which no two are the same.
    """

    reference: MediaRef
    item: str


@dataclass(frozen=True)
class ParquetDescription:
    """Columns of a Parquet file that its schema or its content describes.

    Attributes:
        media: column -> modality of the media in it, "" for media of an unknown format.
        class_names: column of class numbers, or of lists of them -> names of the classes.
        nested: columns with lists of media, or with media in parts of their values.
    """

    media: Mapping[str, str] = field(default_factory=dict)
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    nested: frozenset[str] = frozenset()


def read_parquet_description(source: SourceDirectory, file: str) -> ParquetDescription:
    """Return the media and classes of a Parquet file; none if it is damaged.

    Args:
        source: the directory of the file.
        file: path of the file in ``source``, "" for ``source`` itself.
    """
    import pyarrow.parquet as pq

    with source.open(file) as stream:
        try:
            parquet = pq.ParquetFile(stream)
            schema = parquet.schema_arrow
            features = parse_features(schema.metadata)
            media = {name: kind for name in schema.names if (kind := features.media.get(name))}
            nested = set(features.nested)
            for column in schema:
                is_single = _can_hold_media(column.type)
                is_known = column.name in media or column.name in nested
                if is_known or not (is_single or _can_nest_media(column.type)):
                    continue
                batches = parquet.iter_batches(CELLS_PER_BATCH, columns=[column.name])
                modality = _search_modality(batches)
                # Bytes alone can be anything; a struct has the form of media.
                if is_single and (modality or pa.types.is_struct(column.type)):
                    media[column.name] = modality
                elif modality:
                    nested.add(column.name)
        # A failing disk or store raises none of these.
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            return ParquetDescription()
    return ParquetDescription(media, features.class_names, frozenset(nested))


def parse_features(metadata: Mapping[bytes, bytes] | None) -> ParquetDescription:
    """Return the columns that the schema metadata of the Hub describe; none if they are damaged.

    Args:
        metadata: metadata of an Arrow schema.
    """
    try:
        return describe_features(json.loads((metadata or {})[b"huggingface"])["info"]["features"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return ParquetDescription()


def describe_features(features: Any) -> ParquetDescription:
    """Return the columns of media and classes.

    Args:
        features: column -> its description by the library ``datasets``.
    """
    media, class_names, nested = {}, {}, set()
    for name, feature in features.items() if isinstance(features, dict) else ():
        kind = feature.get("_type") if isinstance(feature, dict) else None
        if isinstance(kind, str) and kind in MEDIA_FEATURES:
            media[name] = MEDIA_FEATURES[kind]
        elif names := find_class_names(feature):
            class_names[name] = names
        elif _nests_media(feature):
            nested.add(name)
    return ParquetDescription(media, class_names, frozenset(nested))


def _nests_media(feature: Any) -> bool:
    """Return whether the description of a column contains that of media, at any depth."""
    if isinstance(feature, dict):
        kind = feature.get("_type")
        is_media = isinstance(kind, str) and kind in MEDIA_FEATURES
        return is_media or any(map(_nests_media, feature.values()))
    return isinstance(feature, list) and any(map(_nests_media, feature))


def describe_classes(schema: pa.Schema, file: str) -> FileClasses:
    """Return the columns of classes, and of whole numbers without names, of a file.

    Args:
        schema: schema of the file.
        file: path or URI of the file, for messages.

    Raises:
        UnicodeDecodeError: the name of a column is damaged.
    """
    names = parse_features(schema.metadata).class_names
    unnamed = (column.name for column in schema if _can_number_classes(column.type))
    return FileClasses(file, names, frozenset(unnamed) - names.keys())


def read_parquet_classes(source: SourceDirectory, file: str) -> FileClasses:
    """Return the columns of classes of a Parquet file; none if it is damaged.

    Args:
        source: the directory of the file.
        file: path of the file in ``source``, "" for ``source`` itself.
    """
    import pyarrow.parquet as pq

    with source.open(file) as stream:
        try:
            return describe_classes(pq.ParquetFile(stream).schema_arrow, source.path(file))
        # A failing disk or store raises none of these.
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            return FileClasses(source.path(file))


def read_embedded_rows(
    source: SourceDirectory, file: str, media: str, unread: Collection[str] = ()
) -> Iterator[NumberedRecord]:
    """Yield the rows of a Parquet file; the media column holds an ``EmbeddedMedia``.

    A value with a path and no bytes becomes the path. A value without both becomes None.

    Args:
        source: the directory of the file.
        file: path of the file in ``source``, "" for ``source`` itself.
        media: column of the media.
        unread: columns that are not read.
    """
    path = source.path(file)
    for number, row in read_parquet_rows(source, file, CELLS_PER_BATCH, unread):
        if not isinstance(row, BadRecord):
            cell = row.get(media)
            data = cell.get(BYTES_PART) if isinstance(cell, dict) else cell
            if isinstance(data, str):  # a column of paths, or bytes that were declared as text
                data = data.encode() if isinstance(cell, dict) else None
            if isinstance(data, bytes):
                reference = MediaRef(path, member=media, row_number=number - 1)
                row[media] = EmbeddedMedia(reference, digest_media(data))
            elif isinstance(cell, dict):
                row[media] = cell.get("path")
        yield number, row


def digest_media(data: bytes | memoryview) -> str:
    """Return a digest of the bytes of a media, "" for none; see :class:`EmbeddedMedia`."""
    return blake2b(data, digest_size=16).hexdigest() if len(data) else ""


def _can_number_classes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _can_number_classes(kind.value_type)
    return bool(pa.types.is_integer(kind))


def _can_hold_media(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index(BYTES_PART)
        return index >= 0 and _can_hold_media(kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _can_nest_media(kind: pa.DataType) -> bool:
    """Return whether lists or parts of a type are bytes."""
    parts = [kind.field(index).type for index in range(kind.num_fields)]
    is_bytes = (pa.types.is_binary(part) or pa.types.is_large_binary(part) for part in parts)
    return any(is_bytes) or any(map(_can_nest_media, parts))


def _find_bytes(cell: Any) -> bytes:
    """Return the first bytes in a value, at any depth, or no bytes."""
    if isinstance(cell, bytes):
        return cell
    parts = cell.values() if isinstance(cell, dict) else cell
    found = map(_find_bytes, parts if isinstance(cell, dict | list | tuple) else ())
    return next(filter(None, found), b"")


def _search_modality(batches: Iterator[pa.RecordBatch]) -> str:
    """Return the modality of the first value of a column, "" if it is not known."""
    searched = 0
    for batch in batches:
        batch.validate(full=True)
        for cell in batch.column(0).to_pylist():
            if data := _find_bytes(cell):
                return detect_modality(data)
        if (searched := searched + batch.num_rows) >= SEARCHED_ROWS:
            break
    return ""


def check_unread_media(
    path: str, described: ParquetDescription, column: str | None, modality: str | None
) -> None:
    """Warn of media that are not read, and refuse to read rows with media as texts.

    Args:
        path: path or URI of the rows.
        described: columns of media.
        column: the column that is read, if there is one.
        modality: the modality that the user chose, if any.

    Raises:
        UserError: only columns with several media in a row hold media, and nobody chose texts.
    """
    if described.nested and column is None and not is_string_modality(modality):
        name = min(described.nested)
        raise UserError(
            f"{path}: the column {name} holds lists of media, or media in parts of its values, and "
            "a row can have one media file. Write one row per media file, or give the option "
            "modality text to read the texts without them"
        )
    others = [name for name in (*described.media, *sorted(described.nested)) if name != column]
    if others:
        read = f"; those in the column {column} are" if column is not None else ""
        console.print_warning(
            f"{path}: the media in the column {', '.join(others)} are not read{read}"
        )


def detect_modality(data: bytes) -> str:
    """Return the modality of a media file by its first bytes, "" if they are not known."""
    found = find_signature(data)
    return found[0] if found else ""
