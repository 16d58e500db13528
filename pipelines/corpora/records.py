"""Records out of JSON, JSON lines, CSV and Parquet files, one at a time, bad ones by themselves.

A record that cannot be read comes as ``Broken`` in its place, and the ones after it still come:
one bad line does not cost a corpus. Memory holds a record, never a file.
"""

import codecs
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.places import DAMAGED, Place
from skillnet_platform.errors import UserError

#: A single entry of a JSON array beyond this many characters is taken for damage.
LONGEST_ENTRY = 64 * 2**20
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Broken:
    """Stands for a record that cannot be read.

    Args:
        reason: short; rows are counted by it.
        rest: the file cannot be read on: nobody knows how many records are lost with this one.
    """

    reason: str
    rest: bool = False


#: A bad line without an end can only be the last one of its file.
CUT = Broken("the file is cut short in the midst of a line", rest=True)
#: Of what such a record says nobody knows which is meant; most readers take the last.
TWICE = Broken("a field that stands twice in its record")
#: (Number of the line or record in its file, from 1; the record).
Found = tuple[int, "dict[str, Any] | Broken"]


def records(place: Place, file: str) -> Iterator[Found]:
    """The records of a file of any of those kinds, by its name; ``.gz`` is unpacked."""
    name = (file or place.name).removesuffix(".gz").lower()
    if name.endswith((".csv", ".tsv")):
        return csv_rows(place, file, "\t" if name.endswith(".tsv") else ",")
    if name.endswith(".parquet"):
        return parquet_rows(place, file)
    if name.endswith(".json") and _starts_with(place, file, b"["):
        return ((number, _mapping(value)) for number, _, value in entries(place, file))
    return json_lines(place, file)


def json_lines(place: Place, file: str) -> Iterator[Found]:
    """The objects of a file with one a line; named by the number of their line."""
    number, decoder = 0, Decoder()
    try:
        for number, line in place.lines(file, ends=True):
            try:
                value: Any = decoder.decode(line.decode("utf-8"))
            except (ValueError, RecursionError) as problem:
                if not line.endswith(b"\n"):
                    value = CUT
                else:
                    value = Broken(
                        f"not {'UTF-8' if isinstance(problem, UnicodeError) else 'JSON'}"
                    )
            yield number, _mapping(value)
    except DAMAGED:
        yield number + 1, Broken("the compressed file is cut short or damaged", rest=True)


def entries(place: Place, file: str) -> Iterator[tuple[int, str | None, Any]]:
    """Entries of a JSON array, or of a JSON object of objects, as they come.

    (Number from 1, key in an object, value). After damage there is no telling where the next entry
    begins: it ends with one ``Broken``.
    """
    with place.open(file) as stream:
        text = _Text(stream)
        opening = text.next_character()
        if opening not in ("[", "{"):
            yield 1, None, Broken("neither a JSON array nor a JSON object", rest=True)
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
                yield number, None, Broken(f"JSON damaged from here on{cut}", rest=True)
                return
            yield number, name, value
            number += 1


def csv_rows(place: Place, file: str, separator: str) -> Iterator[Found]:
    """Rows of a CSV file with a head line; named by the number of their last line."""
    with (
        place.open(file) as stream,
        # "replace" and not an error: the reader goes on, and the row is told by the mark.
        io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="") as text,
    ):
        lines = _Lines(text)
        reader = csv.DictReader(lines, delimiter=separator)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as problem:
                yield reader.line_num, Broken(f"not CSV ({problem})")
                continue
            except DAMAGED:
                why = "the compressed file is cut short or damaged"
                yield reader.line_num + 1, Broken(why, rest=True)
                return
            where = reader.line_num
            if None in row or None in row.values():
                if not lines.last.endswith(("\n", "\r")):
                    yield where, CUT
                    return
                yield where, Broken("another number of fields than the head line")
            elif any("\ufffd" in value for value in row.values()):
                yield where, Broken("not UTF-8")
            else:
                yield where, dict(row)


def parquet_rows(place: Place, file: str) -> Iterator[Found]:
    """Rows of a Parquet file, a small batch at a time; named by their number from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 1
    with place.open(file) as stream:
        try:
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
        except (pa.ArrowInvalid, OSError):  # a disk or store that fails raises neither
            yield number, Broken("Parquet damaged from here on", rest=True)


class Decoder(json.JSONDecoder):
    """Python's own, which gives ``TWICE`` where an object has two values of one name."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.twice = False

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """A value and where it ends; ``decode`` calls this."""
        self.twice = False
        value, end = super().raw_decode(s, idx)
        return (TWICE if self.twice else value), end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        self.twice |= len(made) < len(pairs)
        return made


def _mapping(value: Any) -> "dict[str, Any] | Broken":
    if isinstance(value, dict | Broken):
        return value
    return Broken("not a JSON object")


def _starts_with(place: Place, file: str, mark: bytes) -> bool:
    with place.open(file) as stream:
        try:
            return stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == mark
        except DAMAGED:
            return False


class _Lines:
    """Lines of a text, of which the last one that was given is kept."""

    def __init__(self, text: Iterator[str]) -> None:
        self.text, self.last = text, ""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self.last = next(self.text)
        return self.last


class _Text:
    """The text of a stream, decoded and taken value by value."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.ended = stream, False
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self.buffer, self.at = "", 0
        self.json = Decoder()

    def next_character(self, eat: bool = True) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at].isspace():
                self.at += 1
            if self.at < len(self.buffer):
                found = self.buffer[self.at]
                self.at += eat
                return found
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
                if self.ended or len(self.buffer) - self.at > LONGEST_ENTRY:
                    raise
            # Twice as much each time, so that a long entry is not parsed over and over.
            self._more(block)
            block *= 2

    def _more(self, size: int) -> bool:
        try:
            data = self.stream.read(size)
        except DAMAGED:
            data = b""
        self.ended = not data
        self.buffer = self.buffer[self.at :] + self.decoder.decode(data, final=self.ended)
        self.at = 0
        return not self.ended
