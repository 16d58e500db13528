"""Files of answers: the columns of the input and those of the predictions, in the input's format.

:func:`merge_answer` makes a row, and :func:`open_answer_file` writes rows as JSON lines, CSV or
Parquet. A file appears whole or not at all.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.io.source_file import format_json_line
from pipelines.serving.inputs import TABLE_FORMATS
from skillnet_platform.errors import UserError
from skillnet_platform.storage import open_output

#: Columns of a prediction in a table, in their order.
ANSWER_FIELDS: dict[str, pa.DataType] = {
    "source": pa.string(),
    "line": pa.int64(),
    "input": pa.string(),
    "task": pa.string(),
    "answer": pa.string(),
    "score": pa.float64(),
    "confidence": pa.float64(),
    "alternatives": pa.list_(pa.struct({"answer": pa.string(), "score": pa.float64()})),
    "embedding": pa.list_(pa.float32()),
}
#: Put before the name of a column of the input that a prediction has, too.
RENAMED = "input_"
#: Rows, and bytes of their media, of a group of a Parquet file.
GROUP_ROWS, GROUP_BYTES = 1000, 64 * 2**20


class AnswerFile(Protocol):
    """An open file of answers."""

    def write_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, column -> value."""

    def finish(self) -> None:
        """Write what is left."""


def choose_format(output: str | Path, default: str | None) -> str | None:
    """Return the format of a file of answers: that of its suffix, else of the input.

    Args:
        output: file to write.
        default: format of the input.

    Raises:
        UserError: the suffix asks for a compressed file.
    """
    name = Path(output).name.lower()
    if name.endswith(".gz"):
        raise UserError(f"{output}: answers are written uncompressed; leave out .gz")
    return TABLE_FORMATS.get(Path(name).suffix, default)


def merge_answer(values: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a table: the columns of the input, then those of its prediction.

    Args:
        values: columns of the row of the input.
        document: fields of the prediction.
    """
    return {rename_column(name): value for name, value in values.items()} | dict(document)


def rename_column(name: str) -> str:
    """Return the name of an input's column in the output; a prediction's ``task`` is the row's.

    Args:
        name: column of the input.
    """
    return f"{RENAMED}{name}" if name in ANSWER_FIELDS and name != "task" else name


def extend_schema(schema: pa.Schema, answers: Sequence[str]) -> pa.Schema:
    """Return the columns of an output.

    Args:
        schema: columns of the input.
        answers: names of the columns of the predictions.
    """
    columns = [(rename_column(each.name), each.type) for each in schema if each.name != "task"]
    return pa.schema([*columns, *((name, ANSWER_FIELDS[name]) for name in answers)])


def infer_schema(
    rows: Sequence[Mapping[str, Any]], types: Mapping[str, pa.DataType] | None = None
) -> pa.Schema:
    """Return the columns of rows in the order in which they occur.

    Args:
        rows: column -> value.
        types: column -> its type, of known columns.

    Raises:
        ArrowException: a column mixes kinds of values.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    known = types or {}
    return pa.schema(
        [(n, known.get(n) or pa.array([row.get(n) for row in rows]).type) for n in names]
    )


@contextmanager
def open_answer_file(path: str | Path, kind: str, schema: pa.Schema | None) -> Iterator[AnswerFile]:
    """Open a file of answers; it appears when the block ends without an error.

    Args:
        path: file to write.
        kind: jsonl, csv, tsv or parquet.
        schema: columns of the file; JSON lines need none.

    Raises:
        UserError: the disk is full, or the path cannot be written.
    """
    with open_output(path, "wb") as stream:
        if kind == "parquet":
            assert schema is not None
            with pq.ParquetWriter(stream, schema) as writer:
                table = _ParquetRows(writer, schema, str(path))
                yield table
                table.finish()
            return
        if kind == "jsonl":
            yield _JsonRows(stream)
            return
        assert schema is not None
        yield _CsvRows(stream, schema.names, "\t" if kind == "tsv" else ",")


class _JsonRows:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._stream.write(format_json_line(_make_plain(row)).encode())

    def finish(self) -> None: ...


class _CsvRows:
    def __init__(self, stream: Any, names: Sequence[str], separator: str) -> None:
        self._stream, self._names = stream, names
        self._text = io.StringIO(newline="")
        self._writer = csv.writer(self._text, delimiter=separator, lineterminator="\n")
        self._write([names])

    def write_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._write([[_format_cell(row.get(name)) for name in self._names] for row in rows])

    def _write(self, rows: Sequence[Sequence[str]]) -> None:
        self._writer.writerows(rows)
        self._stream.write(self._text.getvalue().encode("utf-8", "backslashreplace"))
        self._text.seek(0)
        self._text.truncate()

    def finish(self) -> None: ...


class _ParquetRows:
    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema, name: str) -> None:
        self._writer, self._schema, self._name = writer, schema, name
        self._rows: list[Mapping[str, Any]] = []
        self._bytes = 0

    def write_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._rows.append(row)
            self._bytes += sum(map(_count_bytes, row.values()))
            # The same rows give the same groups, also if a prediction was interrupted.
            if len(self._rows) == GROUP_ROWS or self._bytes >= GROUP_BYTES:
                self.finish()

    def finish(self) -> None:
        if not self._rows:
            return
        try:
            table = pa.Table.from_pylist(self._rows, self._schema)
        except (pa.ArrowException, OverflowError) as error:
            raise UserError(
                f"{self._name}: a Parquet file cannot hold the rows ({error}). Write JSON lines: "
                "--output NAME.jsonl"
            ) from None
        self._writer.write_table(table, row_group_size=GROUP_ROWS)
        self._rows, self._bytes = [], 0


def _count_bytes(value: Any) -> int:
    if isinstance(value, Mapping):
        value = value.get("bytes")
    return len(value) if isinstance(value, bytes) else 0


def _make_plain(value: Any) -> Any:
    """Return a value of a table as JSON holds it; of media their name without their bytes."""
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return value.get("path")
    if isinstance(value, Mapping):
        return {str(name): _make_plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_make_plain(each) for each in value]
    if isinstance(value, bytes):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Decimal):
        return float(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def _format_cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    value = _make_plain(value)
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)
