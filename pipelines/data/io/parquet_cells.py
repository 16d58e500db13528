"""Single media of Parquet files, in which datasets of the Hugging Face Hub embed them.

The columns of a Parquet file are compressed in row groups, so its media have no byte ranges.
:func:`pipelines.data.io.media.read_media` reads them by column and row with :class:`ParquetCells`.
"""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import IO, Any

import pyarrow as pa

from pipelines.data.io.source_file import PER_FILE_ERRORS, identify_source, open_stream

#: Rows in memory at once. Each can hold a video, and one dictionary entry can fill all of them.
CELLS_PER_BATCH = 4
#: Part of ``struct<bytes, path>`` that holds the content of the file.
BYTES_PART = "bytes"


class CellReadError(ValueError):
    """A media of a Parquet file cannot be read; rows are counted by the text."""


class ParquetCells:
    """Reader of the media in one column that keeps its Parquet file open.

    Rows in ascending order are read front to back, a few at a time. An earlier row is found from
    the start of its row group.
    """

    def __init__(self) -> None:
        self._stream: IO[bytes] | None = None
        self.close()

    def read(self, path: str, column: str, row: int) -> bytes:
        """Return the bytes of one media.

        Args:
            path: path or URI of the Parquet file.
            column: column of the media: binary, or a struct with the part ``bytes``.
            row: number of its row in the file, from 0.

        Raises:
            CellReadError: the file is damaged, or has no such row or value.
            SourceReadError, StoreUnavailableError: the disk or the store fails.
        """
        try:
            if (path, column) != self._opened:
                self._open(path, column)
            cell = self._find(row)
        except PER_FILE_ERRORS as error:
            self.close()
            raise CellReadError(f"the Parquet file cannot be opened ({error.strerror})") from None
        # A failing disk or store raises neither of these.
        except (pa.ArrowException, OSError, UnicodeDecodeError, LookupError):
            self.close()
            raise CellReadError("the Parquet file is damaged") from None
        if cell is None:
            raise CellReadError("no media file")
        return cell

    def is_current(self) -> bool:
        """Return whether the open file is still the file of its path; assumed for stores."""
        return self._file is not None and self._state == identify_source(self._opened[0])

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        self._opened: tuple[str, str] = ("", "")
        self._state: tuple[int, ...] = ()
        self._file: Any = None
        # Number of the first row of each row group, and of the row after the last group.
        self._starts: list[int] = []
        # The row group that is read, the number of the first cell in memory, and the cells.
        self._group, self._start = -1, 0
        self._cells: list[bytes | None] = []
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def _open(self, path: str, column: str) -> None:
        import pyarrow.parquet as pq

        self.close()
        self._state, self._stream = identify_source(path), open_stream(path)
        self._file, self._opened = pq.ParquetFile(self._stream), (path, column)
        groups = range(self._file.metadata.num_row_groups)
        sizes = (self._file.metadata.row_group(group).num_rows for group in groups)
        self._starts = list(accumulate(sizes, initial=0))

    def _find(self, row: int) -> bytes | None:
        group = bisect_right(self._starts, row) - 1
        if group != self._group or row < self._start:
            column = self._opened[1]
            nested = pa.types.is_struct(self._file.schema_arrow.field(column).type)
            leaf = f"{column}.{BYTES_PART}" if nested else column
            self._batches = self._file.iter_batches(CELLS_PER_BATCH, [group], [leaf])
            self._group, self._start, self._cells = group, self._starts[group], []
        while row >= self._start + len(self._cells):
            self._start += len(self._cells)
            batch = next(self._batches, None)
            if batch is None:
                raise LookupError(row)
            # The full check reads every offset; following a damaged one ends the process.
            batch.validate(full=True)
            (values,) = batch.columns
            is_nested = pa.types.is_struct(values.type)
            self._cells = (values.field(BYTES_PART) if is_nested else values).to_pylist()
        return self._cells[row - self._start]
