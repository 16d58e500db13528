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

#: Where the quote was meant to end nobody knows, so nobody knows which rows it took in.
UNCLOSED_QUOTE = BadRecord("a quote that is not closed, from here on", truncates_file=True)


def read_csv_rows(place: SourceDirectory, file: str, separator: str) -> Iterator[NumberedRecord]:
    """Rows of a CSV file with a head line; named by the number of their last line.

    Quotes are read strictly: a lenient reader takes whatever follows a quote that is not closed
    into one field, row after row. Between tabs a quote mostly is one of the text: where it does
    not enclose a field of its line, it is kept as it stands.
    """
    csv.field_size_limit(MAX_LINE_BYTES)  # texts too long for a row are told further on
    with place.open(file) as stream:
        start = peek_start(stream)
        if isinstance(start, BadRecord):
            yield 1, start
            return
        # "replace" and not an error: the reader goes on, and the row is told by the mark.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
        with text:
            yield from _rows(_Lines(text), separator)


def _rows(lines: "_Lines", separator: str) -> Iterator[NumberedRecord]:
    quoted = csv.reader(lines, delimiter=separator, strict=True)
    reader = _tab_separated(lines) if separator == "\t" else quoted
    names: list[str] | None = None
    while True:
        lines.begin()
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as problem:
            if lines.number > lines.first or (lines.ended and lines.whole):
                yield lines.first, UNCLOSED_QUOTE
                return
            if not lines.whole:
                yield lines.number, TRUNCATED_LINE
                return
            # Without its head line nobody knows what the fields are.
            yield lines.number, BadRecord(f"not CSV ({problem})", truncates_file=names is None)
            if names is None:
                return
            continue
        except OversizedInputError as problem:
            yield lines.number + 1, BadRecord(str(problem), truncates_file=True)
            return
        except DAMAGE_ERRORS:
            yield lines.number + 1, DAMAGED_COMPRESSION
            return
        if not values:
            continue
        if names is None:
            names = values
        elif len(values) != len(names):
            if not lines.whole:
                yield lines.number, TRUNCATED_LINE
                return
            yield lines.number, BadRecord("another number of fields than the head line")
        elif any("\ufffd" in value for value in values):
            yield lines.number, BadRecord("not UTF-8")
        elif any("\0" in value for value in values):
            yield lines.number, BadRecord("null characters in it")
        else:
            yield lines.number, dict(zip(names, values, strict=True))


def _tab_separated(lines: Iterable[str]) -> Iterator[list[str]]:
    for line in lines:
        try:
            yield next(csv.reader([line], delimiter="\t", strict=True))
        except csv.Error:
            yield line.rstrip("\r\n").split("\t")


class _Lines:
    """Lines of a text, none of them and no record of any size.

    Attributes:
        number: of the line that was given last, from 1.
        first: of the first line of the record at hand.
        whole: that line has an end.
        ended: there is none behind it.
    """

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text = text
        self.number, self.first, self.whole, self.ended = 0, 1, True, False
        self._taken = self._empty = 0

    def begin(self) -> None:
        """From here on lines are those of another record."""
        self.first, self._taken = self.number + 1, 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.text.readline(MAX_LINE_BYTES + 1 - self._taken)
        if not line:
            self.ended = True
            raise StopIteration
        self._taken += len(line)
        self._empty = 0 if line.strip() else self._empty + 1
        if self._taken > MAX_LINE_BYTES:
            raise OversizedInputError("a line or a quoted field beyond 64 MiB")
        if self._empty > MAX_EMPTY_LINES:
            raise OversizedInputError("a flood of empty lines")
        self.number += 1
        self.whole = line.endswith(("\n", "\r"))
        return line
