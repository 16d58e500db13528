"""Inputs of predictions: texts, files and decoded media, and their modality.

:class:`PredictionItem` is the main entry point; :mod:`pipelines.serving.predictor` reads it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data.io.file_signature import find_signature
from pipelines.data.io.media import MAX_MEDIA_BYTES
from pipelines.data.io.source_file import read_bounded
from skillnet.modality import CAPTION_MODALITY, find_modality, list_modalities, modality_names
from skillnet_platform.errors import UserError

#: Largest file that a prediction reads: that of prepare.
MAX_FILE_BYTES = MAX_MEDIA_BYTES
#: Largest file with rows of predictions.
MAX_ROWS_BYTES = 2**30


@dataclass(frozen=True)
class PredictionItem:
    """Input of a prediction: a text, the bytes of a media file, or decoded media.

    Args:
        name: name in the result: a path, or the text itself.
        text: the text, or None.
        data: the bytes, or None.
        task: task to run; None selects the only task that reads the modality.
        keywords: keywords of the text, for corpora that were prepared with them.
        where: position of the input in error messages; "" uses the name.
        may_be_empty: whether an empty text is accepted.
        content: decoded media instead of bytes: a Pillow image, (samples, rate) of audio, or
            frames (N, H, W, C).
        modality: medium of the input; None guesses it by the name and the first bytes.
    """

    name: str
    text: str | None = None
    data: bytes | None = None
    task: str | None = None
    keywords: str | None = None
    where: str = ""
    may_be_empty: bool = False
    content: Any = None
    modality: str | None = None


def read_input_item(path: str | Path, task: str | None = None) -> PredictionItem:
    """Return a file as an item.

    Args:
        path: file to read.
        task: task to run; None selects one by modality.

    Raises:
        UserError: the file is missing, unreadable or empty.
    """
    data = read_file_bytes(Path(path), "; use --text for a text")
    if not data:
        raise UserError(f"{path}: the file is empty")
    return PredictionItem(str(path), None, data, task)


def printable_name(name: str) -> str:
    """Return a name that every output can encode; file names may be no Unicode."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def read_file_bytes(
    path: Path, hint: str = "", max_bytes: int = MAX_FILE_BYTES, allow_pipe: bool = False
) -> bytes:
    """Return the content of a file.

    Args:
        path: file to read.
        hint: appended to the message if the file is missing.
        max_bytes: a longer file is rejected.
        allow_pipe: also read a pipe, which the user names on purpose.

    Raises:
        UserError: the file is missing, unreadable, too large or not a regular file.
    """
    try:
        return read_bounded(path, max_bytes, allow_pipe)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{hint}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def find_suffix_modality(name: str) -> str | None:
    """Return the modality of a file name by its suffix; None for an unknown suffix.

    Args:
        name: file name, or a text that may be one.
    """
    suffix = Path(name).suffix.lower().removeprefix(".")
    known = (each.name for each in list_modalities() if suffix in each.extensions)
    return next(known, None)


def list_suffixes(modality: str) -> list[str]:
    """Return the suffixes of the files of a modality, with their dots."""
    return [f".{extension}" for extension in find_modality(modality).extensions]


def guess_modality(name: str, data: bytes) -> str:
    """Return the modality of a file by its suffix, or else by its first bytes.

    Args:
        name: file name.
        data: content.

    Raises:
        UserError: the modality is unknown.
    """
    # The suffix decides first: texts and Python code have no magic bytes.
    if (named := find_suffix_modality(name)) is not None:
        return named
    # SVG is text and may start with white space.
    found = find_signature(data) or find_signature(data[:64].lstrip())
    if found is not None:
        return found[0]
    known = ", ".join(suffix for each in modality_names() for suffix in list_suffixes(each))
    raise UserError(f"{name}: unknown file type; use a name with one of {known}")


def find_item_modality(item: PredictionItem) -> str:
    """Return the modality of an input: the given one, text, or that of the file.

    Args:
        item: the input.

    Raises:
        UserError: it is a file of an unknown type.
    """
    if item.modality is not None:
        return item.modality
    return CAPTION_MODALITY if item.data is None else guess_modality(item.name, item.data)
