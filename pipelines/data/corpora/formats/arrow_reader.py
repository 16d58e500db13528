"""Rows of Arrow batches and Parquet files whose bytes can be damaged or malicious.

pyarrow trusts the content of a batch. Following an offset that points outside of its buffer ends
the process, so every batch is validated before one of its values is read.
"""

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from pipelines.data.corpora.formats.encoding import BadRecord, NumberedRecord, find_repeated_column
from pipelines.data.io.directory import SourceDirectory

if TYPE_CHECKING:
    import pyarrow as pa

#: Errors of values that Python cannot represent: dates outside its calendar, unknown time zones.
_VALUE_ERRORS = (ValueError, ArithmeticError, LookupError, TypeError, NotImplementedError)
#: Rows that are converted to Python values at once.
_ROWS_PER_SLICE = 256


def iter_batch_rows(batch: "pa.RecordBatch") -> Iterator[dict[str, Any] | BadRecord]:
    """Yield the rows of a batch as dictionaries; a row that cannot be read as a ``BadRecord``.

    Raises:
        ArrowInvalid: the columns of the batch are inconsistent, so that no row can be read.
    """
    batch.validate()
    for start in range(0, batch.num_rows, _ROWS_PER_SLICE):
        some = batch.slice(start, _ROWS_PER_SLICE)
        if isinstance(rows := _to_rows(some), list):
            yield from rows
        else:
            # Row by row, so that only the damaged row is lost.
            for index in range(some.num_rows):
                single = _to_rows(some.slice(index, 1))
                yield single if isinstance(single, BadRecord) else single[0]


def _to_rows(batch: "pa.RecordBatch") -> list[dict[str, Any]] | BadRecord:
    """Return all rows, or why one of them cannot be read."""
    try:
        # The full check reads every offset, which the short check does not.
        batch.validate(full=True)
    except _VALUE_ERRORS as error:
        return BadRecord("not UTF-8" if "UTF8" in str(error) else "a damaged value")
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeError:
        return BadRecord("not UTF-8")
    except _VALUE_ERRORS:
        return BadRecord("a date or time that cannot be read")
    return rows


def read_parquet_rows(
    source: SourceDirectory, file: str, batch_rows: int = 256, unread: Collection[str] = ()
) -> Iterator[NumberedRecord]:
    """Yield the rows of a Parquet file with their numbers from 1, a small batch at a time.

    Args:
        source: the directory of the file.
        file: path of the file in ``source``, "" for ``source`` itself.
        batch_rows: rows in memory at once.
        unread: columns that are left out.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 1
    with source.open(file) as stream:
        try:
            parquet = pq.ParquetFile(stream)
            names = parquet.schema_arrow.names
            if repeated := find_repeated_column(names):
                yield number, repeated
                return
            columns = [name for name in names if name not in unread]
            for batch in parquet.iter_batches(batch_rows, columns=columns if unread else None):
                for row in iter_batch_rows(batch):
                    yield number, row
                    number += 1
        # A failing disk or store raises none of these. Column names can be invalid UTF-8 too.
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            yield number, BadRecord("Parquet damaged from here on", truncates_file=True)
