"""Functions that build rows: keys, splits, cleaned texts and rejected rows.

Readers call them for every row, so they never read media.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from pipelines.data.corpora.base import RejectedRow, Row, stable_hash
from pipelines.data.io.directory import to_printable
from pipelines.data.io.media import MediaRef

#: Captions of one row. Usual corpora have five to twenty.
MAX_CAPTIONS = 1_000
_MAX_KEY_CHARS = 512
#: Characters kept of a longer key; a hash follows.
_KEPT_KEY_CHARS = 400
_CHINESE = r"\u2e80-\u303f\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_SPACE_BESIDE_CHINESE = re.compile(rf"(?<=[{_CHINESE}])\s+|\s+(?=[{_CHINESE}])")


def media_row(
    split: str,
    key: str,
    reference: MediaRef,
    captions: Sequence[str] = (),
    text: str | None = None,
    label: str | None = None,
    unit: str | None = None,
) -> Row:
    """Return the raw row of an image, audio or video file.

    Args:
        split: split of the row.
        key: key of the row, unique in the corpus.
        reference: the media file.
        captions: texts that describe the row; empty without any.
        text: its transcript.
        label: name of its class.
        unit: name of the speaker, film or file that it shares with other rows, if there is one.
    """
    return {
        "split": split,
        "key": key,
        "group": hash_caption_group(captions),
        "unit": unit,
        "media": reference.row(),
        "text": text,
        "label": label,
        "captions": list(captions),
        "file": str(reference),
    }


def error_row(
    key: str,
    reason: str,
    file: str | None = None,
    row: int | None = None,
    truncates_file: bool = False,
) -> RejectedRow:
    """Return a rejected row that counts towards ``max_error_rate``.

    Args:
        key: key of the row.
        reason: short text; rejected rows are counted by it.
        file: the file that holds the row.
        row: number of the row in the file, from 1.
        truncates_file: whether the rest of the file cannot be read.
    """
    return RejectedRow(key, reason, file, row, counts_as_error=True, truncates_file=truncates_file)


class UnwantedRowError(ValueError):
    """A row that is rejected by choice, such as a media file without a caption."""


def hash_caption_group(captions: Sequence[str]) -> int:
    """Return a group id that rows with the same first caption share, or -1 without captions.

    All rows of a group are correct answers to the caption.
    """
    return stable_hash("caption", captions[0]) >> 2 if captions else -1


def hash_split(key: str, options: Any) -> str:
    """Return the split of a key by a hash, so that it does not depend on other rows.

    Args:
        key: key of the row, or another value whose rows must stay in one split.
        options: ``SplitOptions`` with the shares of test and validation.
    """
    share = stable_hash("split", key) / 2**64
    if share < options.test:
        return "test"
    return "validation" if share < options.test + options.validation else "train"


def val_or_test(key: str) -> str:
    """Return "validation" or "test" with equal probability, by a hash of the key."""
    return "test" if stable_hash("half", key) % 2 else "validation"


def clean_text(value: Any) -> str:
    """Return a text without surrounding white space.

    Raises:
        ValueError: the value is not a text, is empty, or is not valid Unicode.
    """
    if not isinstance(value, str):
        raise ValueError("a text is missing")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("not UTF-8") from None
        if "\ufffd" in value:
            raise ValueError("not UTF-8")
    value = value.strip()
    if not value:
        raise ValueError("an empty text")
    return value


def clean_captions(value: Any) -> list[str]:
    """Return the usable captions of a list (or of one caption), without duplicates.

    Raises:
        ValueError: no caption is usable, one is not UTF-8, or there are too many.
    """
    captions = value if isinstance(value, list | tuple) else [value]
    if len(captions) > MAX_CAPTIONS:
        raise ValueError(f"more than {MAX_CAPTIONS} captions")
    cleaned = []
    for caption in captions:
        try:
            cleaned.append(clean_text(caption))
        except ValueError as error:
            # A missing or empty caption is skipped; a damaged one rejects the row.
            if str(error) == "not UTF-8":
                raise
    if not cleaned:
        raise ValueError("no caption")
    return list(dict.fromkeys(cleaned))


def normalize_transcript(transcript: str) -> str:
    """Return a transcript for CTC: no white space beside Chinese characters, else single spaces."""
    return _SPACE_BESIDE_CHINESE.sub("", " ".join(transcript.split()))


def is_plain_key(name: str) -> bool:
    """Return whether :func:`make_key` keeps the name of a file and a number of a row as they are.

    Keys of two rows of such files differ.
    """
    return len(name) <= _KEPT_KEY_CHARS and to_printable(name) == name


def make_key(*parts: object) -> str:
    """Return a printable row key of at most 512 characters."""
    key = to_printable("/".join(str(part) for part in parts))
    if len(key) <= _MAX_KEY_CHARS:
        return key
    return f"{key[:_KEPT_KEY_CHARS]}…{hashlib.sha256(key.encode()).hexdigest()[:16]}"
