"""Inputs of predictions: rows of files and requests, files of a command line, values of Python.

:class:`PredictionItem` is a text or a medium; :class:`InputRow` is the row that names it. Every
entry makes rows here, by one rule (:func:`parse_row`), so an unusable row has one sentence
everywhere. :mod:`pipelines.serving.predictor` reads them.

CLUE scores a prediction of every line, so in its format a line with an empty sentence is predicted
as well: from the empty text, or from its keywords.
"""

import base64
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.data.io.field_names import FILE_FIELDS, fold_name
from pipelines.data.io.media import MAX_MEDIA_BYTES, find_signature
from pipelines.data.io.source_file import is_remote, open_stream, read_bounded, strip_file_scheme
from pipelines.data.transforms.text import check_unicode
from skillnet.modality import CAPTION_MODALITY, find_modality, list_modalities, modality_names
from skillnet_platform import console
from skillnet_platform.errors import UserError, suggest_name
from skillnet_platform.storage import human_bytes

#: Largest file that a prediction reads: that of prepare.
MAX_FILE_BYTES = MAX_MEDIA_BYTES
#: Largest file with rows of predictions.
MAX_ROWS_BYTES = 2**30
ROW_SUFFIXES = (".jsonl", ".ndjson")
#: Suffix of a file of rows -> format of the file; those of ``prepare``.
TABLE_FORMATS = {
    **dict.fromkeys(ROW_SUFFIXES, "jsonl"),
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
#: Maximum number of rows that are reported individually.
MAX_REPORTED = 20
#: Keys of rows that are read. Rows of files may have others, such as an id; requests may not.
TEXT_KEYS = ("text", "sentence")
FILE_ROW_KEYS = (*TEXT_KEYS, "file", "task", "keywords")
REQUEST_ROW_KEYS = ("text", "file", "name", "task", "keywords")
EXPECTED_ROW = 'expected {"text": …} or {"file": …}'
NONE_USABLE = "none of the rows is usable"
#: Returns the content of a file that a row names, or holds in base64.
FileReader = Callable[[str], bytes]


@dataclass(frozen=True)
class PredictionItem:
    """Input of a prediction: a text, the bytes of a media file, or decoded media.

    Args:
        name: name in the result: a path, or the text itself.
        text: the text, or None.
        data: the bytes, or None.
        task: task to run; None selects one that reads the modality.
        keywords: keywords of the text, for corpora that were prepared with them.
        where: position of the input in error messages; "" uses the name.
        may_be_empty: whether an empty text is accepted.
        content: decoded media instead of bytes: a Pillow image, (samples, rate) of audio, or
            frames (N, H, W, C).
        modality: medium of the input; None guesses it by the name and the first bytes.
        among: tasks of which one is selected; () means all.
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
    among: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Name of the input in error messages."""
        return self.where or self.name


@dataclass(frozen=True)
class InputRow:
    """Row that an entry asks a prediction for: usable, or rejected with a reason.

    Args:
        where: position in messages, such as ``rows.jsonl, line 3``, ``row 0`` or ``--text``.
        place: fields that join an answer with its row: id, source and line, or row.
        item: to predict for; None if the row is rejected.
        reason: cause of the rejection; "" if the row is usable.
        is_required: whether the row must not be skipped, as the inputs of a command line.
        values: columns of the row, which its answers repeat; None for an input without columns.
        number: index of the row among those that are answered together.
    """

    where: str
    place: dict[str, Any] = field(default_factory=dict)
    item: PredictionItem | None = None
    reason: str = ""
    is_required: bool = False
    values: Mapping[str, Any] | None = None
    number: int = 0


@dataclass(frozen=True)
class InputFields:
    """Columns that hold the inputs of a table; None takes those that ``prepare`` reads.

    Args:
        text: column of the text.
        file: column of the file, or of the media themselves.
    """

    text: str | None = None
    file: str | None = None


@contextlib.contextmanager
def named_errors(where: str) -> Iterator[None]:
    """Raise errors of a block with the place of the input before their reason.

    Args:
        where: position of the input in messages.

    Raises:
        UserError: the block raised ValueError.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


# -- files and their modality ----------------------------------------------------------------


def read_input_item(path: str | Path, task: str | None = None) -> PredictionItem:
    """Return a file as an item.

    Args:
        path: file to read.
        task: task to run; None selects one by modality.

    Raises:
        UserError: the file is missing, unreadable or empty.
    """
    data = read_file_bytes(path, "; use --text for a text")
    if not data:
        raise UserError(f"{path}: the file is empty")
    return PredictionItem(str(path), None, data, task)


def printable_name(name: str) -> str:
    """Return a name that every output can encode; file names may be no Unicode."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def read_file_bytes(
    path: str | Path, hint: str = "", max_bytes: int = MAX_FILE_BYTES, allow_pipe: bool = False
) -> bytes:
    """Return the content of a file of a disk or store.

    Args:
        path: file or URI to read.
        hint: appended to the message if the file is missing.
        max_bytes: a longer file is rejected.
        allow_pipe: also read a pipe, which the user names on purpose.

    Raises:
        UserError: the file is missing, unreadable, too large or not a regular file.
    """
    try:
        if not is_remote(str(path)):
            return read_bounded(strip_file_scheme(str(path)), max_bytes, allow_pipe)
        with open_stream(str(path)) as stream:
            data = stream.read(max_bytes + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{hint}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > max_bytes:
        raise UserError(f"{path}: larger than {human_bytes(max_bytes)}; give a smaller file")
    return data


def has_rows(name: str) -> bool:
    """Return whether a file of this name holds rows as JSON lines."""
    return name.lower().endswith(ROW_SUFFIXES)


def find_table_format(name: str) -> str | None:
    """Return the format of a file of rows by its suffix, None for another file.

    Args:
        name: name of a file; ``.gz`` after the suffix is ignored.
    """
    # Another package's modality can read such files as media.
    if find_suffix_modality(name) is not None:
        return None
    return TABLE_FORMATS.get(Path(name.lower().removesuffix(".gz")).suffix)


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
    raise UserError(f"unknown file type; use a name with one of {known}")


def find_item_modality(item: PredictionItem) -> str:
    """Return the modality of an input: the given one, text, or that of the file.

    Args:
        item: the input.

    Raises:
        UserError: it is a file of an unknown type; the message does not name it.
    """
    if item.modality is not None:
        return item.modality
    return CAPTION_MODALITY if item.data is None else guess_modality(item.name, item.data)


def make_item(value: Any, modality: str, name: str, task: str) -> PredictionItem:
    """Return a value of Python as an item. A string is a text or code where those are read.

    Args:
        value: a text, a path, bytes of a file, or media in memory.
        modality: medium of the tower that reads it.
        name: identifier of the input in messages.
        task: task that the tower belongs to.

    Raises:
        UserError: a file is missing, unreadable, or of another kind.
    """
    found = find_modality(modality)
    if found.reads_tokens and isinstance(value, str):
        fields = {"where": name} | found.file_half.make_input(value, name)
        return PredictionItem(**fields, modality=modality)
    if found.reads_tokens and not isinstance(value, Path | bytes | bytearray):
        raise UserError(f"{name}: expected a text, not {type(value).__name__}")
    if isinstance(value, str | Path):
        data = read_file_bytes(Path(value))
        if not data:
            raise UserError(f"{value}: the file is empty")
        # A drawing in SVG would pass as a text. Decoders of media check their files.
        other = find_suffix_modality(str(value)) if found.reads_tokens else None
        if other not in (None, modality):
            raise UserError(f"{value}: {task} reads {modality}, this is {other}")
        return PredictionItem(str(value), data=data, modality=modality)
    if isinstance(value, bytes | bytearray):
        if not value:
            raise UserError(f"{name}: the file is empty")
        return PredictionItem(name, data=bytes(value), modality=modality)
    if wrong := found.file_half.describe_wrong_content(value):
        raise UserError(f"{name}: {wrong}")
    return PredictionItem(name, content=value, modality=modality)


# -- rows ------------------------------------------------------------------------------------


def parse_row(
    row: Any,
    keys: Sequence[str],
    read_file: FileReader,
    name: str = "",
    task: str | None = None,
    clue: bool = False,
) -> PredictionItem:
    """Return the item of a row of a file or of a request.

    Args:
        row: with a text, or with ``file``; optionally ``task`` and ``keywords``. None means absent.
        keys: that are read.
        read_file: returns the content for the value of ``file``.
        name: identifier of a file without ``name``; "" takes the value of ``file``.
        task: default for a row that names none.
        clue: require an id, and accept an empty text.

    Raises:
        UserError: the row is unusable; the message is the reason alone.
    """
    if not isinstance(row, Mapping):
        raise UserError(EXPECTED_ROW)
    given = {key: row.get(key) for key in keys}
    for key, value in given.items():
        if not isinstance(value, str | None):
            raise UserError(f"{key} must be a string")
    texts = [text for key in TEXT_KEYS if (text := given.get(key)) is not None]
    # With both, the answer would depend on an arbitrary choice.
    if len(texts) + (given["file"] is not None) != 1:
        raise UserError(EXPECTED_ROW)
    if clue and "id" not in row:
        raise UserError('no "id"; CLUE identifies predictions by it')
    task = given["task"] or task
    if given["file"] is not None:
        data = read_file(given["file"])
        if not data:
            raise UserError("the file is empty")
        return PredictionItem(given.get("name") or name or given["file"], None, data, task)
    (text,) = texts
    if not text.strip() and not clue:
        raise UserError("the text is empty")
    name = given.get("name") or text
    return PredictionItem(name, text, None, task, given["keywords"], may_be_empty=clue)


def parse_table_row(
    row: Mapping[str, Any],
    read_file: FileReader,
    where: str,
    task: str | None = None,
    fields: InputFields = InputFields(),
    clue: bool = False,
) -> PredictionItem:
    """Return the item of a row of a table, whose columns have the names that ``prepare`` reads.

    Args:
        row: column -> value. A file is its name, its bytes, or a mapping with ``bytes``.
        read_file: returns the content for the name of a file.
        where: position of the row; names an input without a name.
        task: default for a row that names none.
        fields: columns that the user names.
        clue: see :func:`parse_row`.

    Raises:
        UserError: the row is unusable; the message is the reason alone.
    """
    if clue or not isinstance(row, Mapping):
        return parse_row(row, FILE_ROW_KEYS, read_file, "", task, clue)
    for name in filter(None, (fields.text, fields.file)):
        if name not in row:
            raise UserError(f"no column {name!r}{suggest_name(name, row)}")
    given = {key: row.get(key) for key in ("task", "keywords")}
    if fields.text is not None or fields.file is not None:
        key = "file" if fields.text is None else "text"
        both = {key: row[fields.text or fields.file or ""]}
        both |= {"file": row[fields.file]} if fields.file is not None else {}
    elif row.get("file") not in (None, ""):
        # An empty cell of a table is no text.
        both = {key: row.get(key) or None for key in (*TEXT_KEYS, "file")}
    else:
        both = _find_input(row)
    if (modality := both.pop("modality", None)) is not None:
        # A string of another modality than texts, such as a function.
        code, half = both["text"], find_modality(modality).file_half
        if not isinstance(code, str):
            raise UserError(f"{both['name']} must be a string")
        task = _read_task(given["task"]) or task
        return PredictionItem(**half.make_input(code, where), task=task, modality=modality)
    media: Any = both.get("file")
    if isinstance(media, Mapping) and (media.get("bytes") or media.get("path")):
        given["name"] = media.get("path")
        media = media.get("bytes") or media.get("path")
    if isinstance(media, bytes) and both.get("text") is None:
        content = media
        both["file"], read_file = where, lambda _: content
    elif media is not None:
        both["file"] = media
    return parse_row(given | both, (*FILE_ROW_KEYS, "name"), read_file, "", task)


def _read_task(task: Any) -> str | None:
    if not isinstance(task, str | None):
        raise UserError("task must be a string")
    return task


def _find_input(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the input of a row by the names of its columns, under the keys of a row."""
    folded = {fold_name(str(name)): row[name] for name in reversed([*row])}
    for name in FILE_FIELDS:
        value = folded.get(name)
        is_media = isinstance(value, bytes) or (isinstance(value, Mapping) and "bytes" in value)
        is_named = isinstance(value, str) and bool(value)
        # Other columns can hold anything, such as the path of a source file.
        if is_media or (is_named and (name == "file_name" or find_suffix_modality(str(value)))):
            return {"file": value}
    texts = find_modality(CAPTION_MODALITY).file_half.text_fields
    given = [name for name in texts if name in folded]
    if given:
        filled = (name for name in given if folded[name] not in (None, ""))
        return {"text": folded[next(filled, given[0])]}
    for modality in list_modalities():
        strings = modality.file_half.row_fields if modality.reads_tokens else ()
        if (found := next((each for each in strings if each in folded), None)) is not None:
            return {"text": folded[found], "modality": modality.name, "name": found}
    return {}


def parse_request_row(row: Any, number: int, is_required: bool = False) -> InputRow:
    """Return a row of a request; an unusable row has its reason.

    Args:
        row: see :func:`parse_row`; ``file`` is in base64.
        number: index of the row, from 0.
        is_required: see :class:`InputRow`.
    """
    where, place = f"row {number}", {"row": number}
    try:
        if unknown := sorted(row.keys() - set(REQUEST_ROW_KEYS)) if isinstance(row, dict) else []:
            raise UserError(f"unknown key {unknown[0]!r}; use {', '.join(REQUEST_ROW_KEYS)}")
        item = parse_row(row, REQUEST_ROW_KEYS, decode_file, where)
    except UserError as error:
        return InputRow(where, place, None, str(error), is_required)
    return InputRow(where, place, item, is_required=is_required)


def decode_file(text: str) -> bytes:
    """Return the content of a file that a request holds in base64.

    Raises:
        UserError: it is not base64.
    """
    try:
        # Without validation, foreign characters are skipped and the result is garbage.
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise UserError("file is not base64") from None


def parse_input_line(
    source: str,
    number: int,
    line: bytes,
    read_file: FileReader,
    task: str | None,
    clue: bool = False,
    fields: InputFields = InputFields(),
) -> InputRow:
    """Return a line of a file as a row; an unusable row has its reason.

    Args:
        source: path or URI of the file.
        number: index of the line, from 1.
        line: content.
        read_file: called with the name of a file that the row names.
        task: for rows that do not name one.
        clue: see :func:`parse_row`.
        fields: columns that the user names.
    """
    row, item, reason = None, None, ""
    try:
        row = json.loads(line.decode("utf-8"))
        # JSON can escape half a character. An id or a task with it could not be written.
        check_unicode(json.dumps(row, ensure_ascii=False))
        # Opening such a path raises ValueError, not UserError.
        if isinstance(row, dict) and "\0" in str(row.get("file")):
            raise UserError("the file name contains a null character")
        item = parse_table_row(row, read_file, f"{source}, line {number}", task, fields, clue)
    # These errors are ValueErrors, so the order of the handlers matters.
    except UnicodeDecodeError:
        reason = "not UTF-8; convert the file, for example with iconv -f GB18030 -t UTF-8"
    # json raises RecursionError for deeply nested input.
    except (json.JSONDecodeError, RecursionError) as error:
        reason = f"not JSON ({error})"
    except ValueError as error:
        reason = str(error)
    identity = {"id": row["id"]} if isinstance(row, dict) and "id" in row else {}
    place = identity | {"source": source, "line": number}
    values = row if isinstance(row, dict) else {}
    return InputRow(f"{source}, line {number}", place, item, reason, values=values)


def read_input_rows(
    path: Path, task: str | None, clue: bool = False, fields: InputFields = InputFields()
) -> list[InputRow]:
    """Read the rows of a .jsonl file; files that rows name are relative to its directory.

    Args:
        path: file to read.
        task: for rows that do not name one.
        clue: see :func:`parse_row`.
        fields: columns that the user names.

    Raises:
        UserError: the file is missing, is a JSON array, or has no usable row.
    """
    data = read_file_bytes(path, max_bytes=MAX_ROWS_BYTES, allow_pipe=True)
    # Editors on Windows write a byte order mark, which the JSON parser rejects.
    data = data.removeprefix(b"\xef\xbb\xbf")
    # Otherwise the only message would be that line 1 is not an object.
    if data.lstrip().startswith(b"["):
        raise UserError(
            f"{path}: a JSON array; expected one object per line. Convert it: jq -c '.[]' {path}"
        )

    def read_file(name: str) -> bytes:
        return read_file_bytes(path.parent / name)

    rows = [
        parse_input_line(str(path), number, line, read_file, task, clue, fields)
        # Not splitlines(): on text it would also split at U+2028, which JSON strings may contain.
        for number, line in enumerate(data.split(b"\n"), 1)
        if line.strip()
    ]
    if not rows:
        raise UserError(f"{path}: the file has no rows")
    check_usable_rows([row for row in rows if row.reason], len(rows))
    return rows


def check_usable_rows(rejected: Sequence[InputRow], count: int) -> None:
    """Check that at least one row is usable.

    Args:
        rejected: the unusable rows.
        count: number of all rows.

    Raises:
        UserError: every row is rejected; the message gives the first reason.
    """
    # All rows fail for one cause, such as the wrong file or format; an empty result would hide it.
    if rejected and len(rejected) == count:
        raise UserError(f"{rejected[0].where}: {rejected[0].reason}; {NONE_USABLE}")


def report_rejected(
    rejected: Sequence[InputRow],
    answered: Sequence[InputRow],
    remedy: str,
    count: int | None = None,
) -> None:
    """Warn about rejected rows with their reasons, and about rows with empty texts.

    Args:
        rejected: the unusable rows.
        answered: rows with a prediction.
        remedy: where all of them are listed, if they are too many for warnings.
        count: number of unusable rows, if ``rejected`` has only the first ones.
    """
    lines = [f"{row.where}: {row.reason}; row skipped" for row in rejected]
    lines += [
        f"{row.where}: the text is empty; the row is predicted from the empty text"
        for row in answered
        if row.item is not None and row.item.text is not None and not row.item.text.strip()
    ]
    # A wrong encoding rejects every row; thousands of warnings would hide the first one.
    for line in lines[:MAX_REPORTED]:
        console.print_warning(line)
    more = len(lines) + max(0, (count or 0) - len(rejected)) - MAX_REPORTED
    if more > 0:
        console.print_warning(f"{more} more rows with problems; {remedy}")
