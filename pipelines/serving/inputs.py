"""Rows of a JSON lines file as inputs of predictions; unusable rows have a reason instead.

An unusable row is reported with its file and line; the other rows are predicted. CLUE scores a
prediction of every line, so in its format a line with an empty sentence is predicted as well: from
the empty text, or from its keywords. ``skillnet predict`` calls :func:`read_input_rows`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.data.transforms.text import check_unicode
from pipelines.serving.input_items import (
    MAX_ROWS_BYTES,
    PredictionItem,
    read_file_bytes,
    read_input_item,
)
from skillnet_platform import console
from skillnet_platform.errors import UserError

#: Maximum number of rows that are reported individually.
MAX_REPORTED = 20
#: Reader of a file that a row names: its name and its task -> the item.
FileReader = Callable[[str, str | None], PredictionItem]
EXPECTED_ROW = 'expected {"text": …} or {"file": …}'


@dataclass(frozen=True)
class InputRow:
    """Input of a prediction: a row of a file, usable or rejected, or an input of the command line.

    Args:
        source: file of the row; "" for an input of the command line.
        line: number of the row's line in the file, from 1; 0 if the file itself is the row.
        row: the JSON object; {} if the line is not an object.
        item: to predict for; None if the row is rejected.
        reason: cause of the rejection; "" if the row is usable.
    """

    source: str = ""
    line: int = 0
    row: dict[str, Any] = field(default_factory=dict)
    item: PredictionItem | None = None
    reason: str = ""

    @property
    def where(self) -> str:
        """File and line for messages; "" for an input of the command line."""
        return f"{self.source}, line {self.line}" if self.line else self.source

    def locate(self) -> dict[str, Any]:
        """Return the fields that join an output with its input: id if given, file and line."""
        identity = {"id": self.row["id"]} if "id" in self.row else {}
        line = {"line": self.line} if self.line else {}
        return {**identity, "source": self.source, **line} if self.source else {}


def read_input_rows(path: Path, task: str | None, clue: bool = False) -> list[InputRow]:
    """Read the rows of a .jsonl file; files that rows name are relative to its directory.

    Args:
        path: file to read.
        task: for rows that do not name one.
        clue: require an id in each row, and accept empty sentences.

    Raises:
        UserError: the file is missing, is a JSON array, or has no usable row.
    """
    # Editors on Windows write a byte order mark, which the JSON parser rejects.
    data = read_file_bytes(path, max_bytes=MAX_ROWS_BYTES, allow_pipe=True)
    data = data.removeprefix(b"\xef\xbb\xbf")
    # Otherwise the only message would be that line 1 is not an object.
    if data.lstrip().startswith(b"["):
        raise UserError(
            f"{path}: a JSON array; expected one object per line. Convert it: jq -c '.[]' {path}"
        )

    def read_file(name: str, own: str | None) -> PredictionItem:
        return read_input_item(path.parent / name, own)

    rows = [
        parse_input_line(str(path), number, line, read_file, task, clue)
        # Not splitlines(): on text it would also split at U+2028, which JSON strings may contain.
        for number, line in enumerate(data.split(b"\n"), 1)
        if line.strip()
    ]
    if not rows:
        raise UserError(f"{path}: the file has no rows")
    check_usable_rows(rows)
    return rows


def check_usable_rows(rows: Sequence[InputRow]) -> None:
    """Check that at least one row of a file is usable.

    Args:
        rows: items that the file names, in its order.

    Raises:
        UserError: every row is rejected; the message gives the first reason.
    """
    # All rows fail for one cause, such as the wrong file or format; an empty result would hide it.
    if rows and all(row.reason for row in rows):
        raise UserError(f"{rows[0].where}: {rows[0].reason}; none of its rows is usable")


def report_rejected(rows: Sequence[InputRow], remedy: str) -> None:
    """Warn about rejected rows with their reasons, and about rows with empty texts.

    Args:
        rows: items that all files name, in their order.
        remedy: where all of them are listed, if they are too many for warnings.
    """
    lines = [f"{row.where}: {row.reason}; row skipped" for row in rows if row.reason]
    lines += [
        f"{row.where}: the text is empty; the row is predicted from the empty text"
        for row in rows
        if row.item is not None and row.item.text is not None and not row.item.text.strip()
    ]
    # A wrong encoding rejects every row; thousands of warnings would hide the first one.
    for line in lines[:MAX_REPORTED]:
        console.print_warning(line)
    if len(lines) > MAX_REPORTED:
        console.print_warning(f"{len(lines) - MAX_REPORTED} more rows with problems; {remedy}")


def parse_input_line(
    source: str,
    number: int,
    line: bytes,
    read_file: FileReader,
    task: str | None,
    clue: bool = False,
) -> InputRow:
    """Return a line of a file as a row; an unusable row has its reason.

    Args:
        source: path or URI of the file.
        number: index of the line, from 1.
        line: content.
        read_file: called with the name of a file that the row names, and its task.
        task: for rows that do not name one.
        clue: require an id in each row, and accept empty sentences.
    """
    where = f"{source}, line {number}"
    row: Any = None
    try:
        row = json.loads(line.decode("utf-8"))
        # JSON can escape half a character. An id or a task with it could not be written.
        check_unicode(json.dumps(row, ensure_ascii=False))
        return InputRow(source, number, row, _parse_item(where, row, read_file, task, clue))
    # These errors are ValueErrors, so the order of the handlers matters.
    except UnicodeDecodeError:
        reason = "not UTF-8; convert the file, for example with iconv -f GB18030 -t UTF-8"
    except OSError as error:
        reason = f"{row['file']}: cannot be read ({error.strerror or 'no such file'})"
    # json raises RecursionError for deeply nested input.
    except (json.JSONDecodeError, RecursionError) as error:
        reason = f"not JSON ({error})"
    except ValueError as error:
        reason = str(error).removeprefix(f"{where}: ")
    return InputRow(source, number, row if isinstance(row, dict) else {}, None, reason)


def _parse_item(
    where: str, row: Any, read_file: FileReader, task: str | None, clue: bool
) -> PredictionItem:
    if not isinstance(row, dict):
        raise UserError(EXPECTED_ROW)
    texts = [row[key] for key in ("text", "sentence") if key in row]
    if len(texts) + ("file" in row) != 1:
        raise UserError(EXPECTED_ROW)
    task = row.get("task", task)
    if not all(isinstance(value, str) for value in (*texts, row.get("file", ""), task or "")):
        raise UserError("text, file and task must be strings")
    if clue and "id" not in row:
        raise UserError('no "id"; CLUE identifies predictions by it')
    if not texts:
        # Opening such a path raises ValueError, not OSError, and would be reported as broken JSON.
        if "\0" in row["file"]:
            raise UserError("the file name contains a null character")
        return replace(read_file(row["file"], task), where=where)
    if not texts[0].strip() and not clue:
        raise UserError("the text is empty")
    value = row.get("keywords")
    keywords = value if isinstance(value, str) else None
    # CLUE expects a line for each id, so empty sentences are predicted in its format.
    return PredictionItem(texts[0], texts[0], None, task, keywords, where, may_be_empty=clue)
