"""Rows of Arrow batches and Parquet files, of which any byte may be damaged or made up.

pyarrow believes what stands in a batch: an offset that leads astray ends the process when it is
followed. So each batch is validated before a value of it is looked at.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipelines.corpora.formats.encoding import BadRecord, NumberedRecord
from pipelines.io.directory import SourceDirectory

if TYPE_CHECKING:
    import pyarrow as pa

#: What a value raises that Python has no words for: dates beyond its calendar, unknown zones.
_NO_VALUE = (ValueError, ArithmeticError, LookupError, TypeError, NotImplementedError)
#: Rows that are turned into Python's values at once.
_TOGETHER = 256


def iter_batch_rows(batch: "pa.RecordBatch") -> Iterator[dict[str, Any] | BadRecord]:
    """The rows of a batch; those that hold what cannot be read are broken by themselves.

    Raises:
        ArrowInvalid: the batch's parts do not fit each other, so that no row of it is to be had.
    """
    batch.validate()
    for start in range(0, batch.num_rows, _TOGETHER):
        some = batch.slice(start, _TOGETHER)
        if isinstance(found := _values(some), list):
            yield from found
        else:
            for place in range(some.num_rows):
                one = _values(some.slice(place, 1))
                yield one if isinstance(one, BadRecord) else one[0]


def _values(batch: "pa.RecordBatch") -> list[dict[str, Any]] | BadRecord:
    """All rows, or why one of them cannot be had."""
    try:
        batch.validate(full=True)
    except _NO_VALUE as problem:
        return BadRecord("not UTF-8" if "UTF8" in str(problem) else "a damaged value")
    try:
        found: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeError:
        return BadRecord("not UTF-8")
    except _NO_VALUE:
        return BadRecord("a date or time that cannot be read")
    return found


def read_parquet_rows(place: SourceDirectory, file: str) -> Iterator[NumberedRecord]:
    """Rows of a Parquet file, a small batch at a time; named by their number from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 1
    with place.open(file) as stream:
        try:
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=256):
                for row in iter_batch_rows(batch):
                    yield number, row
                    number += 1
        # A disk or store that fails raises none of these. Names of columns may be no UTF-8, too.
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            yield number, BadRecord("Parquet damaged from here on", truncates_file=True)
