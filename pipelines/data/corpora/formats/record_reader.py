"""Records of JSON, JSON lines, CSV and Parquet files, one at a time.

:func:`read_records` chooses the format by the file name. A record that cannot be read becomes a
``BadRecord`` in its place and the following records are still read, so one bad line does not cost
a corpus. Memory holds one record, never a file.

The bytes can be damaged or malicious. pyarrow trusts the content of a batch. Following an offset
that points outside of its buffer ends the process, so every batch is validated before one of its
values is read.
"""

import codecs
import contextlib
import csv
import io
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO, TYPE_CHECKING, Any

from pipelines.data.corpora.formats.encoding import (
    DAMAGED_COMPRESSION,
    DUPLICATE_FIELD,
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
    iter_lines,
)
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

#: Errors of values that Python cannot represent: dates outside its calendar, unknown time zones.
_VALUE_ERRORS = (ValueError, ArithmeticError, LookupError, TypeError, NotImplementedError)
#: Rows that are converted to Python values at once.
_ROWS_PER_SLICE = 256


#: Bytes of a part of a file: enough work for a task, and little enough for its memory.
PART_BYTES = 8 * 2**20
#: Bytes of a row group or of other lines. A file with more is not divided: a task holds a part.
MAX_PART_BYTES = 256 * 2**20


@dataclass(frozen=True)
class FilePart:
    """Consecutive records of a file.

    Args:
        before: number of lines, or of rows, before the first record.
        start: first byte, or first row group of a Parquet file.
        stop: byte after the last one, or row group after the last one.
    """

    before: int
    start: int
    stop: int


def divide_file(source: SourceDirectory, file: str) -> list[FilePart]:
    """Return the parts of a file that tasks can read one by one; none for a large one without.

    JSON has no line break inside of a value, so lines are divided before a brace. CSV is not
    divided, because a quoted field can hold lines. Compressed files cannot be read from the middle.

    Args:
        source: the directory of the file.
        file: path of the file in ``source``, "" for ``source`` itself.
    """
    name = (file or source.name).lower()
    if name.endswith(".gz"):
        return []
    with source.open(file) as stream:
        if name.endswith((".csv", ".tsv")):
            size = stream.seek(0, io.SEEK_END)
            return [FilePart(0, 0, size)] if size <= PART_BYTES else []
        if name.endswith(".parquet"):
            return _divide_row_groups(stream)
        start = peek_start(stream)
        if isinstance(start, BadRecord) or not _holds_lines(start, name):
            return []
        return _divide_lines(stream)


def _divide_lines(stream: IO[bytes]) -> list[FilePart]:
    parts: list[FilePart] = []
    offset = lines = 0
    begin = FilePart(0, 0, 0)
    while block := stream.read(1 << 20):
        while (at := block.find(b"\n{", max(begin.start + PART_BYTES - offset - 1, 0))) >= 0:
            before, stop = lines + block.count(b"\n", 0, at + 1), offset + at + 1
            parts.append(FilePart(begin.before, begin.start, stop))
            begin = FilePart(before, stop, stop)
        lines, offset = lines + block.count(b"\n"), offset + len(block)
    parts.append(FilePart(begin.before, begin.start, offset))
    return parts if all(each.stop - each.start <= MAX_PART_BYTES for each in parts) else []


def _divide_row_groups(stream: IO[bytes]) -> list[FilePart]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts: list[FilePart] = []
    rows = before = start = size = 0
    try:
        about = pq.ParquetFile(stream).metadata
        for index in range(about.num_row_groups):
            group = about.row_group(index)
            if group.total_byte_size > MAX_PART_BYTES:
                return []
            rows, size = rows + group.num_rows, size + group.total_byte_size
            if size >= PART_BYTES or index == about.num_row_groups - 1:
                parts.append(FilePart(before, start, index + 1))
                before, start, size = rows, index + 1, 0
    except (pa.ArrowException, OSError, UnicodeDecodeError):  # reading it says what is wrong
        return []
    return parts


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
    source: SourceDirectory,
    file: str,
    batch_rows: int = 256,
    unread: Collection[str] = (),
    part: FilePart | None = None,
) -> Iterator[NumberedRecord]:
    """Yield the rows of a Parquet file with their numbers from 1, a small batch at a time.

    Args:
        source: the directory of the file.
        file: path of the file in ``source``, "" for ``source`` itself.
        batch_rows: rows in memory at once.
        unread: columns that are left out.
        part: the rows to read; by default all.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 1 if part is None else part.before + 1
    with source.open(file) as stream:
        try:
            parquet = pq.ParquetFile(stream)
            names = parquet.schema_arrow.names
            if repeated := find_repeated_column(names):
                yield number, repeated
                return
            columns = [name for name in names if name not in unread] if unread else None
            groups = (0, parquet.num_row_groups) if part is None else (part.start, part.stop)
            # One by one: a damaged group costs the same rows, whichever part it is in.
            for group in range(*groups):
                for batch in parquet.iter_batches(batch_rows, row_groups=[group], columns=columns):
                    for row in iter_batch_rows(batch):
                        yield number, row
                        number += 1
        # A failing disk or store raises none of these. Column names can be invalid UTF-8 too.
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            yield number, BadRecord("Parquet damaged from here on", truncates_file=True)


__all__ = [
    "DUPLICATE_FIELD",
    "MAX_ENTRY_CHARS",
    "BadRecord",
    "JsonText",
    "NumberedRecord",
    "StrictJsonDecoder",
    "read_json_entries",
    "read_json_lines",
    "read_records",
]

#: An entry of a JSON array with more characters is treated as damage.
MAX_ENTRY_CHARS = 64 * 2**20
#: An object over several lines, as programs print it for people.
MULTILINE_JSON = BadRecord(
    "JSON over several lines; expected one object per line (convert with jq -c .) or one array",
    truncates_file=True,
)
_BLOCK_CHARS = 1 << 18
_NON_SPACE = re.compile(r"\S")
#: Start of an array of objects. Another line that starts with a bracket is one bad line.
_ARRAY_START = re.compile(rb"\[\s*[{\]]")
_MULTILINE_OBJECT_START = re.compile(rb"\{[ \t]*\r?\n")


def read_records(
    source: SourceDirectory, file: str, part: FilePart | None = None
) -> Iterator[NumberedRecord]:
    """Yield the records of a file with their numbers; the file name decides the format.

    Args:
        source: the directory of the file.
        file: path of the file in ``source``, "" for ``source`` itself. A file whose name ends in
            ``.gz`` is decompressed.
        part: one of :func:`divide_file`; by default all records.
    """
    name = _uncompressed_name(source, file)
    if name.endswith((".csv", ".tsv")):
        return read_csv_rows(source, file, "\t" if name.endswith(".tsv") else None)
    if name.endswith(".parquet"):
        return read_parquet_rows(source, file, part=part)
    return read_json_lines(source, file, part)


def read_json_lines(
    source: SourceDirectory, file: str, part: FilePart | None = None
) -> Iterator[NumberedRecord]:
    """Yield the objects of a JSON lines file with their line numbers.

    A file with one array of objects is read too; its objects have their number in the array.

    Args:
        source: the directory of the file.
        file: path of the file in ``source``, "" for ``source`` itself.
        part: the lines to read; by default all.
    """
    with source.open(file) as stream:
        if part is not None:
            stream.seek(part.start)
            yield from _lines(stream, part.before, part.stop - part.start)
            return
        start = peek_start(stream)
        if isinstance(start, BadRecord):
            yield 1, start
        elif _holds_lines(start, _uncompressed_name(source, file)):
            yield from _lines(stream)
        elif _MULTILINE_OBJECT_START.match(_skip_blanks(start)):
            yield 1, MULTILINE_JSON
        else:
            yield from ((number, _require_object(value)) for number, _, value in _entries(stream))


def _skip_blanks(start: bytes) -> bytes:
    return start.removeprefix(codecs.BOM_UTF8).lstrip()


def _holds_lines(start: bytes, name: str) -> bool:
    """Return whether a JSON file of a name holds one object per line, by its first bytes."""
    text = _skip_blanks(start)
    is_array = (text[:1] == b"[" and name.endswith(".json")) or _ARRAY_START.match(text)
    return not is_array and not _MULTILINE_OBJECT_START.match(text)


def _lines(stream: IO[bytes], before: int = 0, size: int | None = None) -> Iterator[NumberedRecord]:
    number, decoder = before, StrictJsonDecoder()
    try:
        for number, line in iter_lines(stream, True, before, size):
            try:
                value: Any = decoder.decode_line(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    value = TRUNCATED_LINE
                else:
                    value = BadRecord(
                        f"not {'UTF-8' if isinstance(error, UnicodeError) else 'JSON'}"
                    )
            yield number, _require_object(value)
    except OversizedInputError as error:
        yield number + 1, BadRecord(str(error), truncates_file=True)
    except DAMAGE_ERRORS:
        yield number + 1, DAMAGED_COMPRESSION


def read_json_entries(source: SourceDirectory, file: str) -> Iterator[tuple[int, str | None, Any]]:
    """Yield the entries of a JSON array, or of a JSON object of objects, while it is parsed.

    After damage the start of the next entry is unknown, so the last entry is one ``BadRecord``.

    Args:
        source: the directory of the file.
        file: path of the file in ``source``, "" for ``source`` itself.

    Yields:
        (number from 1, key in the object or None, value).
    """
    with source.open(file) as stream:
        start = peek_start(stream)
        if isinstance(start, BadRecord):
            yield 1, None, start
        else:
            yield from _entries(stream)


def _entries(stream: IO[bytes]) -> Iterator[tuple[int, str | None, Any]]:
    text = JsonText(stream)
    opening = text.next_character()
    if opening not in ("[", "{"):
        yield 1, None, BadRecord("neither a JSON array nor a JSON object", truncates_file=True)
        return
    number, closing = 1, "]" if opening == "[" else "}"
    while (following := text.next_character(consume=False)) != closing:
        name = None
        try:
            if following == ",":
                text.next_character()
                continue
            if opening == "{":
                name = text.next_value()
                if text.next_character() != ":" or not isinstance(name, str):
                    raise ValueError("no key")
            value = text.next_value()
        except UserError:
            raise
        except ValueError:
            cut = " (cut short)" if text.at_end else ""
            reason = f"JSON damaged from here on{cut}"
            yield number, None, BadRecord(reason, truncates_file=True)
            return
        yield number, name, value
        number += 1
    text.next_character()
    if text.next_character():
        yield number, None, BadRecord("data after the end of the JSON", truncates_file=True)


class StrictJsonDecoder(json.JSONDecoder):
    """A JSON decoder that returns ``DUPLICATE_FIELD`` for an object that repeats a name."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._build_object)
        self.has_duplicate = False

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """Return the value at ``idx`` and the index after it; ``decode`` calls this method."""
        self.has_duplicate = False
        value, end = super().raw_decode(s, idx)
        return (DUPLICATE_FIELD if self.has_duplicate else value), end

    def decode_line(self, line: str) -> Any:
        """Return the only value of a line, as ``decode`` does in half of its time.

        Raises:
            ValueError: the line is no JSON.
        """
        text = line.strip(" \t\r\n")
        self.has_duplicate = False
        try:
            value, end = self.scan_once(text, 0)  # type: ignore[attr-defined]
        except StopIteration:
            raise ValueError("no value") from None
        if end != len(text):
            raise ValueError("data after the value")
        return DUPLICATE_FIELD if self.has_duplicate else value

    def _build_object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        self.has_duplicate |= len(built) < len(pairs)
        return built


def _require_object(value: Any) -> "dict[str, Any] | BadRecord":
    if isinstance(value, dict | BadRecord):
        return value
    return BadRecord("not a JSON object")


def _uncompressed_name(source: SourceDirectory, file: str) -> str:
    return (file or source.name).removesuffix(".gz").lower()


class JsonText:
    """The decoded text of a stream, from which JSON values are parsed one by one.

    Args:
        stream: binary stream at its start.
    """

    def __init__(self, stream: Any) -> None:
        self.stream, self.at_end = stream, False
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self.buffer, self.position = "", 0
        self.json = StrictJsonDecoder()

    def next_character(self, consume: bool = True) -> str:
        """Return the next character that is not white space, or "" at the end."""
        while True:
            if found := _NON_SPACE.search(self.buffer, self.position):
                self.position = found.end() if consume else found.start()
                return found[0]
            self.position = len(self.buffer)
            if not self._read_more(_BLOCK_CHARS):
                return ""

    def next_value(self) -> Any:
        """Parse the next JSON value.

        Raises:
            ValueError: the value is damaged, or the text ends inside it.
        """
        self.next_character(consume=False)
        block = _BLOCK_CHARS
        while True:
            try:
                value, end = self.json.raw_decode(self.buffer, self.position)
                # A number at the very end of the buffer can continue in the next block.
                if end < len(self.buffer) or self.at_end:
                    self.position = end
                    return value
            except RecursionError:
                raise ValueError("nested too deep") from None
            except ValueError:
                if self.at_end or len(self.buffer) - self.position > MAX_ENTRY_CHARS:
                    raise
            # The block doubles, so that a long entry is not parsed many times.
            self._read_more(block)
            block *= 2

    def _read_more(self, size: int) -> bool:
        try:
            data = self.stream.read(size)
        except DAMAGE_ERRORS:
            data = b""
        self.at_end = not data
        self.buffer = self.buffer[self.position :] + self.decoder.decode(data, final=self.at_end)
        self.position = 0
        return not self.at_end


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
