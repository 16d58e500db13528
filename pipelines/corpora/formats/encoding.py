"""Whether a file of texts is written in another encoding than UTF-8, and in which.

Chinese Windows saves GBK, and "Unicode" there is UTF-16. Read as UTF-8 every row of such a file
would be set aside by itself, and none of them would say what is to be done.
"""

import codecs
import json
from dataclasses import dataclass
from typing import IO, Any

from pipelines.io.directory import DAMAGE_ERRORS


@dataclass(frozen=True)
class BadRecord:
    """Stands for a record that cannot be read.

    Args:
        reason: short; rows are counted by it.
        rest: the file cannot be read on: nobody knows how many records are lost with this one.
    """

    reason: str
    truncates_file: bool = False


#: A bad line without an end can only be the last one of its file.
TRUNCATED_LINE = BadRecord("the file is cut short in the midst of a line", truncates_file=True)
#: A compressed file that ends or breaks.
DAMAGED_COMPRESSION = BadRecord("the compressed file is cut short or damaged", truncates_file=True)
#: Of what such a record says nobody knows which is meant; most readers take the last.
DUPLICATE_FIELD = BadRecord("a field that stands twice in its record")
#: (Number of the line or record in its file, from 1; the record).
NumberedRecord = tuple[int, "dict[str, Any] | BadRecord"]


#: Of a file's start, bytes that are looked at.
_SAMPLE = 1 << 16


def peek_start(stream: IO[bytes]) -> bytes | BadRecord:
    """The first bytes of a stream, which then is read from its start all the same; or why it
    cannot be read: it is in another encoding, or compressed and damaged from its first byte on."""
    try:
        start: bytes = stream.peek(_SAMPLE)[:_SAMPLE]  # type: ignore[attr-defined]
    except DAMAGE_ERRORS:
        return DAMAGED_COMPRESSION
    return _misencoded(start) or start


def _misencoded(start: bytes) -> BadRecord | None:
    # Tells by a mark at the start, or by where the zero bytes of the first characters are.
    name = json.detect_encoding(start)
    if not name.startswith("utf-8"):
        # Zeros that a crash left in place of a file's blocks are no text.
        text = _decoded(start, name)
        if text and "\0" not in text:
            return _told(name.upper().replace("-LE", "LE").replace("-BE", "BE"))
    text = start.decode("utf-8", "replace")
    lost = text.count("\ufffd")
    kept = sum(character > "\x7f" for character in text) - lost
    # A row that is damaged among good ones is set aside by itself.
    if lost > kept and 10 * lost > len(text) and _decoded(start, "gb18030"):
        return _told("GB18030", "GBK by its look")
    return None


def _decoded(data: bytes, encoding: str) -> str | None:
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data)  # its end may be cut
    except UnicodeError:
        return None


def _told(name: str, look: str = "") -> BadRecord:
    return BadRecord(
        f"{look or name}, not UTF-8; convert it: iconv -f {name} -t UTF-8", truncates_file=True
    )
