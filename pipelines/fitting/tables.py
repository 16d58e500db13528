"""Rows in memory as a file that the reader of folders reads.

Media are stored as the bytes of a file in a Parquet table: images as PNG, recordings as WAV.
Files are linked, not copied.
"""

import io
import json
import wave
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.serving.inputs import find_suffix_modality
from pipelines.serving.memory_tables import is_missing, list_records
from skillnet_platform.errors import UserError

#: Rows of a group of a Parquet file, so that readers hold few media at once.
GROUP_ROWS = 256
#: Name of the field with the path of a media file.
FILE_FIELD = "file_name"


def write_table(rows: Any, folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """Write rows to a file; return it with the options that its reader needs.

    Args:
        rows: a data frame, an Arrow table, a list of mappings, or split -> one of them. A value is
            a text, number or list of texts, or media: bytes of a file, a Pillow image, uint8 pixels
            (H, W, 3), (samples, rate in Hz), or a ``Path``.
        folder: existing directory.
        name: stem of the file; names the data in messages.

    Raises:
        UserError: there is no row, a value cannot be stored, or a column mixes kinds of values.
    """
    records = list_records(rows, name)
    if not records:
        raise UserError(f"{name}: no rows. Give at least one row of each class")
    columns = list(dict.fromkeys(key for row in records for key in row))
    for key in columns:
        if not isinstance(key, str):
            raise UserError(f"{name}: a column is named {key!r}; expected a text")
    paths = [key for key in columns if _holds_files(records, key)]
    if len(paths) > 1:
        raise UserError(f"{name}: the columns {paths[0]} and {paths[1]} both name files; give one")
    if paths:
        return _write_lines(records, paths[0], folder / f"{name}.jsonl", name)
    cells = {
        key: [_store_value(row.get(key), key, i, name) for i, row in enumerate(records)]
        for key in columns
    }
    arrays = {}
    for key, values in cells.items():
        try:
            arrays[key] = pa.array(values)
        except (pa.ArrowException, OverflowError, TypeError) as error:
            raise UserError(
                f"{name}: the column {key} mixes kinds of values ({error}). Give texts, numbers, "
                "or media of one kind"
            ) from None
    path = folder / f"{name}.parquet"
    pq.write_table(pa.table(arrays), path, row_group_size=GROUP_ROWS)
    return path, {}


def _holds_files(records: Iterable[Mapping[str, Any]], key: str) -> bool:
    """Return whether the values of a column are paths of media, of ``Path`` or by their suffix."""
    values = [row[key] for row in records if not is_missing(row.get(key))]
    return bool(values) and all(
        isinstance(value, Path)
        or (isinstance(value, str) and find_suffix_modality(value) and Path(value).is_file())
        for value in values
    )


def _write_lines(
    records: Sequence[Mapping[str, Any]], key: str, path: Path, name: str
) -> tuple[Path, dict[str, Any]]:
    """Write rows that name files as JSON lines, beside links to the files."""
    if key != FILE_FIELD and any(FILE_FIELD in row for row in records):
        raise UserError(f"{name}: {key} names the files, so rename the column {FILE_FIELD}")
    media = path.with_suffix("")
    media.mkdir()
    links: dict[Path, str] = {}
    with path.open("w", encoding="utf-8") as stream:
        for number, row in enumerate(records):
            fields = {
                column: _store_value(value, column, number, name)
                for column, value in row.items()
                if column != key and not is_missing(value)
            }
            if not is_missing(row.get(key)):
                file = Path(row[key]).absolute()
                # A file of several rows is one item.
                if file not in links:
                    links[file] = f"{len(links)}-{file.name}"
                    (media / links[file]).symlink_to(file)
                fields[FILE_FIELD] = links[file]
            try:
                stream.write(json.dumps(fields, ensure_ascii=False) + "\n")
            except TypeError as error:
                raise UserError(f"{name}, row {number}: {error}; expected texts, numbers") from None
    return path, {"media": str(media), "file": FILE_FIELD}


def _store_value(value: Any, column: str, row: int, name: str) -> Any:
    """Return a value as a Parquet file holds it, media as the bytes of a file."""
    if is_missing(value):
        return None
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    data = _encode_media(value)
    if data is None:
        raise UserError(
            f"{name}, row {row}: {column} is {type(value).__name__}; expected a text, a number, a "
            "list of texts, bytes of a file, a Pillow image, uint8 pixels (H, W, 3), or (samples, "
            "rate). Give a video as a path or as bytes"
        )
    return {"bytes": data, "path": None}


def _encode_media(value: Any) -> bytes | None:
    """Return the bytes of a media file; None for another value."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, Path):
        return value.read_bytes()
    # Columns of saved datasets.
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return bytes(value["bytes"])
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
        value = Image.fromarray(value)
    if isinstance(value, Image.Image):
        stream = io.BytesIO()
        value.save(stream, "PNG")
        return stream.getvalue()
    if isinstance(value, tuple) and len(value) == 2:
        return _encode_wave(np.asarray(value[0]), value[1])
    return None


def _encode_wave(samples: np.ndarray, rate: Any) -> bytes | None:
    if samples.ndim not in (1, 2) or not isinstance(rate, int) or rate < 1:
        return None
    if samples.dtype.kind == "f":
        samples = np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)
    if samples.dtype != np.int16:
        return None
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return stream.getvalue()
