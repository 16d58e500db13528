"""Rows of CSV and TSV files."""

import csv
import io
from collections.abc import Iterable, Iterator

from pipelines.corpora.formats.encoding import (
    DAMAGED_COMPRESSION,
    TRUNCATED_LINE,
    BadRecord,
    NumberedRecord,
    peek_start,
)
from pipelines.io.directory import (
    DAMAGE_ERRORS,
    MAX_EMPTY_LINES,
    MAX_LINE_BYTES,
    OversizedInputError,
    SourceDirectory,
)

#: The intended end of the quote is unknown, so the rows that it swallowed are unknown too.
UNCLOSED_QUOTE = BadRecord("an unclosed quote from here on", truncates_file=True)


def read_csv_rows(source: SourceDirectory, file: str, separator: str) -> Iterator[NumberedRecord]:
    """Yield the rows of a CSV file with a header line, with the number of their last line.

    Quotes are parsed strictly: a lenient parser would read everything after an unclosed quote into
    one field. In tab-separated files a quote usually belongs to the text. A quote that does not
    enclose a field of its line is kept.

    Args:
        source: the directory of the file.
        file: path of the file in ``source``, "" for ``source`` itself.
        separator: "," or a tab.
    """
    # The limit of the csv module must not be the smaller one: texts that are too long for a row
    # are rejected later, with a better reason.
    csv.field_size_limit(MAX_LINE_BYTES)
    with source.open(file) as stream:
        start = peek_start(stream)
        if isinstance(start, BadRecord):
            yield 1, start
            return
        # "replace" instead of an error: reading continues, and the replacement character marks the
        # row.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
        with text:
            yield from _read_rows(_BoundedLines(text), separator)


def _read_rows(lines: "_BoundedLines", separator: str) -> Iterator[NumberedRecord]:
    quoted = csv.reader(lines, delimiter=separator, strict=True)
    reader = _split_tabs(lines) if separator == "\t" else quoted
    names: list[str] | None = None
    while True:
        lines.start_record()
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.number > lines.first or (lines.at_end and lines.has_line_end):
                yield lines.first, UNCLOSED_QUOTE
                return
            if not lines.has_line_end:
                yield lines.number, TRUNCATED_LINE
                return
            # Without the header line the names of the fields are unknown.
            yield lines.number, BadRecord(f"not CSV ({error})", truncates_file=names is None)
            if names is None:
                return
            continue
        except OversizedInputError as error:
            yield lines.number + 1, BadRecord(str(error), truncates_file=True)
            return
        except DAMAGE_ERRORS:
            yield lines.number + 1, DAMAGED_COMPRESSION
            return
        # The csv module returns empty lines as empty rows.
        if not values:
            continue
        if names is None:
            names = values
        elif len(values) != len(names):
            if not lines.has_line_end:
                yield lines.number, TRUNCATED_LINE
                return
            yield lines.number, BadRecord("a different number of fields than the header")
        elif any("\ufffd" in value for value in values):
            yield lines.number, BadRecord("not UTF-8")
        elif any("\0" in value for value in values):
            yield lines.number, BadRecord("contains null characters")
        else:
            yield lines.number, dict(zip(names, values, strict=True))


def _split_tabs(lines: Iterable[str]) -> Iterator[list[str]]:
    for line in lines:
        try:
            yield next(csv.reader([line], delimiter="\t", strict=True))
        except csv.Error:
            yield line.rstrip("\r\n").split("\t")


class _BoundedLines:
    """Lines of a text, with limits on the size of a line, of a record and of runs of empty lines.

    Attributes:
        number: number of the last line that was returned, from 1.
        first: number of the first line of the current record.
        has_line_end: whether the last line ends with a line break.
        at_end: whether the text has no further line.
    """

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text = text
        self.number, self.first, self.has_line_end, self.at_end = 0, 1, True, False
        self._record_size = self._empty_lines = 0

    def start_record(self) -> None:
        """Count the following lines as those of a new record."""
        self.first, self._record_size = self.number + 1, 0

    def __iter__(self) -> "_BoundedLines":
        return self

    def __next__(self) -> str:
        line = self.text.readline(MAX_LINE_BYTES + 1 - self._record_size)
        if not line:
            self.at_end = True
            raise StopIteration
        self._record_size += len(line)
        self._empty_lines = 0 if line.strip() else self._empty_lines + 1
        if self._record_size > MAX_LINE_BYTES:
            raise OversizedInputError("a line or quoted field longer than 64 MiB")
        if self._empty_lines > MAX_EMPTY_LINES:
            raise OversizedInputError("a flood of empty lines")
        self.number += 1
        self.has_line_end = line.endswith(("\n", "\r"))
        return line
