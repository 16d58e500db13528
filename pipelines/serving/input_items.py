"""Inputs of predictions: texts, files and decoded media, and their modality.

:class:`PredictionItem` is the main entry point; :mod:`pipelines.serving.predictor` reads it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data.io.media import MAX_MEDIA_BYTES
from pipelines.data.io.source_file import read_bounded
from skillnet_platform.errors import UserError

MODALITY_SUFFIXES = {
    "sound": (".mp3", ".wav", ".flac", ".ogg", ".opus", ".m4a", ".aac"),
    "image": (".png", ".jpg", ".jpeg", ".svg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "video": (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"),
    "code": (".py", ".pyi"),
    "text": (".txt",),
}

#: Largest file that a prediction reads: that of prepare.
MAX_FILE_BYTES = MAX_MEDIA_BYTES
#: Largest file with rows of predictions.
MAX_ROWS_BYTES = 2**30

#: First bytes of common formats, for data without a file name.
MAGIC_BYTES = (
    (b"\x89PNG", "image"),
    (b"\xff\xd8\xff", "image"),
    (b"GIF8", "image"),
    (b"<svg", "image"),
    (b"ID3", "sound"),
    # An MP3 file without an ID3 tag starts with the sync bits of a frame.
    (b"\xff\xfb", "sound"),
    (b"\xff\xf3", "sound"),
    (b"fLaC", "sound"),
    (b"OggS", "sound"),
    # EBML, the container of Matroska and WebM.
    (b"\x1aE\xdf\xa3", "video"),
)


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
    suffix = Path(name).suffix.lower()
    for modality, suffixes in MODALITY_SUFFIXES.items():
        if suffix in suffixes:
            return modality
    return None


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
    head = data[:64].lstrip()
    for magic, modality in MAGIC_BYTES:
        if head.startswith(magic):
            return modality
    # WAV, WebP and AVI are RIFF files; their form type follows the size.
    if head[:4] == b"RIFF":
        return {b"WAVE": "sound", b"WEBP": "image"}.get(head[8:12], "video")
    # MP4 and MOV start with the size of their first box; its type comes second.
    if head[4:8] == b"ftyp":
        return "video"
    known = ", ".join(suffix for suffixes in MODALITY_SUFFIXES.values() for suffix in suffixes)
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
    return "text" if item.data is None else guess_modality(item.name, item.data)


def decode_text(data: bytes) -> str:
    """Return the text of a file in UTF-8, without a byte order mark and outer white space.

    Raises:
        ValueError: the bytes are not UTF-8.
    """
    try:
        # utf-8-sig also removes the byte order mark that editors on Windows write.
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError("the text is not UTF-8") from None
