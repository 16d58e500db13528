"""Records out of JSON, JSON lines, CSV and Parquet files, one at a time, bad ones by themselves.

A record that cannot be read comes as ``BadRecord`` in its place, and the ones after it still come:
one bad line does not cost a corpus. Memory holds a record, never a file.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from pipelines.corpora.formats.arrow_reader import read_parquet_rows
from pipelines.corpora.formats.csv_reader import read_csv_rows
from pipelines.corpora.formats.encoding import (
    DAMAGED_COMPRESSION,
    DUPLICATE_FIELD,
    TRUNCATED_LINE,
    BadRecord,
    NumberedRecord,
    peek_start,
)
from pipelines.io.directory import DAMAGE_ERRORS, OversizedInputError, SourceDirectory, iter_lines
from skillnet_platform.errors import UserError

__all__ = [
    "LONGEST_ENTRY",
    "DUPLICATE_FIELD",
    "BadRecord",
    "Decoder",
    "NumberedRecord",
    "entries",
    "json_lines",
    "records",
    "why_unread",
]

#: A single entry of a JSON array beyond this many characters is taken for damage.
MAX_ENTRY_CHARS = 64 * 2**20
#: An object over several lines, as programs print them for people.
MULTILINE_JSON = BadRecord(
    "JSON over several lines; expected one object a line (jq -c . makes it so), or one array",
    truncates_file=True,
)
_BLOCK = 1 << 18
_SOLID = re.compile(r"\S")
#: An array of objects. A line that happens to begin with a bracket is one bad line.
_ARRAY = re.compile(rb"\[\s*[{\]]")
_OPENED = re.compile(rb"\{[ \t]*\r?\n")


def read_records(place: SourceDirectory, file: str) -> Iterator[NumberedRecord]:
    """The records of a file of any of those kinds, by its name; ``.gz`` is unpacked."""
    name = _plain_name(place, file)
    if name.endswith((".csv", ".tsv")):
        return read_csv_rows(place, file, "\t" if name.endswith(".tsv") else ",")
    if name.endswith(".parquet"):
        return read_parquet_rows(place, file)
    return read_json_lines(place, file)


def describe_first_error(place: SourceDirectory, file: str) -> str:
    """Behind a message that a file has no readable row: " (reason of its first row)", or ""."""
    first = next(read_records(place, file), (1, None))[1]
    return f" ({first.reason})" if isinstance(first, BadRecord) else ""


def read_json_lines(place: SourceDirectory, file: str) -> Iterator[NumberedRecord]:
    """The objects of a file with one a line, named by the number of their line; or with all in
    one array, named by their number in it."""
    with place.open(file) as stream:
        start = peek_start(stream)
        if isinstance(start, BadRecord):
            yield 1, start
            return
        text = start.removeprefix(codecs.BOM_UTF8).lstrip()
        bracket = text[:1] == b"[" and _plain_name(place, file).endswith(".json")
        if bracket or _ARRAY.match(text):
            yield from ((number, _mapping(value)) for number, _, value in _entries(stream))
        elif _OPENED.match(text):
            yield 1, MULTILINE_JSON
        else:
            yield from _lines(stream)


def _lines(stream: IO[bytes]) -> Iterator[NumberedRecord]:
    number, decoder = 0, StrictJsonDecoder()
    try:
        for number, line in iter_lines(stream, ends=True):
            try:
                value: Any = decoder.decode(line.decode("utf-8"))
            except (ValueError, RecursionError) as problem:
                if not line.endswith(b"\n"):
                    value = TRUNCATED_LINE
                else:
                    value = BadRecord(
                        f"not {'UTF-8' if isinstance(problem, UnicodeError) else 'JSON'}"
                    )
            yield number, _mapping(value)
    except OversizedInputError as problem:
        yield number + 1, BadRecord(str(problem), truncates_file=True)
    except DAMAGE_ERRORS:
        yield number + 1, DAMAGED_COMPRESSION


def read_json_entries(place: SourceDirectory, file: str) -> Iterator[tuple[int, str | None, Any]]:
    """Entries of a JSON array, or of a JSON object of objects, as they come.

    (Number from 1, key in an object, value). After damage there is no telling where the next entry
    begins: it ends with one ``BadRecord``.
    """
    with place.open(file) as stream:
        start = peek_start(stream)
        if isinstance(start, BadRecord):
            yield 1, None, start
        else:
            yield from _entries(stream)


def _entries(stream: IO[bytes]) -> Iterator[tuple[int, str | None, Any]]:
    text = _Text(stream)
    opening = text.next_character()
    if opening not in ("[", "{"):
        yield 1, None, BadRecord("neither a JSON array nor a JSON object", truncates_file=True)
        return
    number, closing = 1, "]" if opening == "[" else "}"
    while (following := text.next_character(eat=False)) != closing:
        name = None
        try:
            if following == ",":
                text.next_character()
                continue
            if opening == "{":
                name = text.value()
                if text.next_character() != ":" or not isinstance(name, str):
                    raise ValueError("no key")
            value = text.value()
        except UserError:
            raise
        except ValueError:
            cut = " (cut short)" if text.ended else ""
            yield number, None, BadRecord(f"JSON damaged from here on{cut}", truncates_file=True)
            return
        yield number, name, value
        number += 1
    text.next_character()
    if text.next_character():
        yield (
            number,
            None,
            BadRecord("something stands behind the end of the JSON", truncates_file=True),
        )


class StrictJsonDecoder(json.JSONDecoder):
    """Python's own, which gives ``DUPLICATE_FIELD`` where an object has two values of one name."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.twice = False

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """A value and where it ends; ``decode`` calls this."""
        self.twice = False
        value, end = super().raw_decode(s, idx)
        return (DUPLICATE_FIELD if self.twice else value), end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        self.twice |= len(made) < len(pairs)
        return made


def _mapping(value: Any) -> "dict[str, Any] | BadRecord":
    if isinstance(value, dict | BadRecord):
        return value
    return BadRecord("not a JSON object")


def _plain_name(place: SourceDirectory, file: str) -> str:
    return (file or place.name).removesuffix(".gz").lower()


class _Text:
    """The text of a stream, decoded and taken value by value."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.ended = stream, False
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self.buffer, self.at = "", 0
        self.json = StrictJsonDecoder()

    def next_character(self, eat: bool = True) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            if found := _SOLID.search(self.buffer, self.at):
                self.at = found.end() if eat else found.start()
                return found[0]
            self.at = len(self.buffer)
            if not self._more(_BLOCK):
                return ""

    def value(self) -> Any:
        """The next JSON value.

        Raises:
            ValueError: it is damaged, or the text ends in it.
        """
        self.next_character(eat=False)
        block = _BLOCK
        while True:
            try:
                value, end = self.json.raw_decode(self.buffer, self.at)
                # A number at the very end of the buffer may go on.
                if end < len(self.buffer) or self.ended:
                    self.at = end
                    return value
            except RecursionError:
                raise ValueError("nested too deep") from None
            except ValueError:
                if self.ended or len(self.buffer) - self.at > MAX_ENTRY_CHARS:
                    raise
            # Twice as much each time, so that a long entry is not parsed over and over.
            self._more(block)
            block *= 2

    def _more(self, size: int) -> bool:
        try:
            data = self.stream.read(size)
        except DAMAGE_ERRORS:
            data = b""
        self.ended = not data
        self.buffer = self.buffer[self.at :] + self.decoder.decode(data, final=self.ended)
        self.at = 0
        return not self.ended
