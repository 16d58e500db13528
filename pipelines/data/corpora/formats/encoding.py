"""Detection of text files that are not UTF-8, and the record type for unreadable records.

Windows with Chinese settings saves GBK, and its "Unicode" is UTF-16. If such a file were read as
UTF-8, every row would be rejected for itself, and no message would say how to fix the file.
"""

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from pipelines.data.io.directory import DAMAGE_ERRORS


@dataclass(frozen=True)
class BadRecord:
    """Placeholder of a record that cannot be read.

    Attributes:
        reason: short text; rejected rows are counted by it.
        truncates_file: whether the rest of the file cannot be read either. The number of lost
            records is then unknown.
    """

    reason: str
    truncates_file: bool = False


#: A bad line without a line end can only be the last line of a truncated file.
TRUNCATED_LINE = BadRecord("the file is cut short in the middle of a line", truncates_file=True)
#: A compressed file that ends early or is damaged.
DAMAGED_COMPRESSION = BadRecord("the compressed file is cut short or damaged", truncates_file=True)
#: Most parsers keep the last value of a repeated field. Nobody knows which value is meant.
DUPLICATE_FIELD = BadRecord("a field occurs twice in the record")


def find_repeated_column(names: Sequence[str]) -> BadRecord | None:
    """Return the record of a table with two columns of one name, or None.

    Args:
        names: names of the columns in their order; columns without a name may repeat.
    """
    for position, name in enumerate(names):
        if name.strip() and name in names[:position]:
            first = names.index(name) + 1
            return BadRecord(
                f"the columns {first} and {position + 1} are both called {name}; rename one of "
                "them",
                truncates_file=True,
            )
    return None


#: (Number of the line or record in its file, from 1; the record).
NumberedRecord = tuple[int, "dict[str, Any] | BadRecord"]


#: Bytes at the start of a file that decide its encoding.
_SAMPLE_BYTES = 1 << 16


def peek_start(stream: IO[bytes]) -> bytes | BadRecord:
    """Return the first bytes of a stream without consuming them, or why it cannot be read.

    Args:
        stream: a buffered stream at its start.

    Returns:
        Up to 64 KiB; or a ``BadRecord`` if the file has another encoding than UTF-8, or is
        compressed and damaged from its first byte.
    """
    try:
        start: bytes = stream.peek(_SAMPLE_BYTES)[:_SAMPLE_BYTES]  # type: ignore[attr-defined]
    except DAMAGE_ERRORS:
        return DAMAGED_COMPRESSION
    return _wrong_encoding(start) or start


def _wrong_encoding(start: bytes) -> BadRecord | None:
    # ``detect_encoding`` looks at the byte order mark and at the zero bytes of the first
    # characters.
    name = json.detect_encoding(start)
    if not name.startswith("utf-8"):
        # A crash can leave blocks of zeros in a file. Such zeros are not UTF-16 text.
        text = _decode_start(start, name)
        if text and "\0" not in text:
            return _encoding_record(name.upper().replace("-LE", "LE").replace("-BE", "BE"))
    text = start.decode("utf-8", "replace")
    undecodable = text.count("\ufffd")
    decoded = sum(character > "\x7f" for character in text) - undecodable
    # A single damaged row among valid rows is rejected for itself, not with its file.
    mostly_undecodable = undecodable > decoded and 10 * undecodable > len(text)
    if mostly_undecodable and _decode_start(start, "gb18030"):
        return _encoding_record("GB18030", "probably GBK")
    return None


def _decode_start(data: bytes, encoding: str) -> str | None:
    try:
        # Incremental, because the sample can end inside a character.
        return codecs.getincrementaldecoder(encoding)().decode(data)
    except UnicodeError:
        return None


def _encoding_record(name: str, description: str = "") -> BadRecord:
    return BadRecord(
        f"{description or name}, not UTF-8; convert it: iconv -f {name} -t UTF-8",
        truncates_file=True,
    )
