"""Rows of CSV and TSV files."""

import contextlib
import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from pipelines.data.corpora.formats.encoding import (
    DAMAGED_COMPRESSION,
    TRUNCATED_LINE,
    BadRecord,
    NumberedRecord,
    find_repeated_column,
    peek_start,
)
from pipelines.data.io.directory import (
    DAMAGE_ERRORS,
    MAX_EMPTY_LINES,
    MAX_LINE_BYTES,
    OversizedInputError,
    SourceDirectory,
)

#: Separators of CSV files, the usual one first.
SEPARATORS = (",", ";", "\t", "|")
#: Rows that decide the separator.
_SAMPLE_ROWS = 100
#: The intended end of the quote is unknown, so the rows that it swallowed are unknown too.
UNCLOSED_QUOTE = BadRecord("an unclosed quote from here on", truncates_file=True)


def read_csv_rows(
    source: SourceDirectory,
    file: str,
    separator: str | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[NumberedRecord]:
    """Yield the rows of a CSV file, with the number of their last line.

    Quotes are parsed strictly: a lenient parser would read everything after an unclosed quote into
    one field. In tab-separated files a quote usually belongs to the text. A quote that does not
    enclose a field of its line is kept. Files without a header have no quoted fields.

    Args:
        source: the directory of the file.
        file: path of the file in ``source``, "" for ``source`` itself.
        separator: separator of the fields; by default the one that header and first rows share.
        names: names of the fields of a file without a header line.
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
            chosen = separator or detect_separator(start)
            yield from _read_rows(_BoundedLines(text), chosen, names)


def detect_separator(start: bytes) -> str:
    """Return the separator that divides the header and most rows into as many fields.

    Args:
        start: the first bytes of a file.
    """
    text = start.decode("utf-8", "replace")
    complete = text.rpartition("\n")[0] or text
    # ``max`` returns the first of equal ones, so a comma wins.
    return max(SEPARATORS, key=lambda each: _rate_separator(complete, each))


def _rate_separator(text: str, separator: str) -> float:
    """Return the fraction of the first rows that have as many fields as the header; 0 for one."""
    counts: list[int] = []
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    with contextlib.suppress(csv.Error):  # the rows before the error decide
        for row in islice(rows, _SAMPLE_ROWS):
            counts += [len(row)] if row else []
    return counts.count(counts[0]) / len(counts) if counts and counts[0] > 1 else 0.0


def _read_rows(
    lines: "_BoundedLines", separator: str, names: Sequence[str] | None = None
) -> Iterator[NumberedRecord]:
    reader: Iterator[list[str]] = csv.reader(lines, delimiter=separator, strict=True)
    if names is not None:
        reader = (line.rstrip("\r\n").split(separator) for line in lines if line.strip())
    elif separator == "\t":
        reader = _split_tabs(lines)
    has_header = names is None
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
            names = [value.strip() for value in values]
            if repeated := find_repeated_column(names):
                yield lines.number, repeated
                return
        elif len(values) != len(names):
            if not lines.has_line_end:
                yield lines.number, TRUNCATED_LINE
                return
            first = "header" if has_header else "first row"
            yield lines.number, BadRecord(f"a different number of fields than the {first}")
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
