"""Rows of a file to predict for: JSON lines, good ones as items, others with a reason.

A row that cannot be used is told with file and line and set aside; the rest arrives. CLUE scores a
prediction of every line, so a line whose sentence is empty gets one all the same: that of an empty
text, or of its keywords.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.serving.predictor import PredictionItem, read_file_bytes, read_input_item
from skillnet_platform import console
from skillnet_platform.errors import UserError

#: So many rows are told one by one.
MAX_REPORTED = 20
EXPECTED_ROW = 'expected {"text": …} or {"file": …}'


@dataclass(frozen=True)
class InputRow:
    """A row that can be predicted for, or why it cannot.

    Args:
        where: file and line.
        row: what stands there; {} if that is no object.
        item: of it, or none.
        reason: why it is set aside; "" if it is not.
    """

    where: str
    row: dict[str, Any]
    item: PredictionItem | None = None
    reason: str = ""


def read_input_rows(path: Path, task: str | None, clue: bool = False) -> list[InputRow]:
    """Rows of a .jsonl file; files named in it are looked for beside it.

    Args:
        path: of the file.
        task: of rows that name none.
        clue: whether each row needs an id, and an empty sentence is one, too.

    Raises:
        UserError: no such file, none of its rows can be used, or it is one JSON array.
    """
    data = read_file_bytes(path).removeprefix(b"\xef\xbb\xbf")
    if data.lstrip().startswith(b"["):
        raise UserError(
            f"{path}: a JSON array; expected an object a line. Make it so with: jq -c '.[]' {path}"
        )
    found = [
        _given(f"{path}, line {number}", line, path.parent, task, clue)
        for number, line in enumerate(data.split(b"\n"), 1)
        if line.strip()
    ]
    if not found:
        raise UserError(f"{path}: no rows in it")
    check_usable_rows(found)
    return found


def check_usable_rows(rows: Sequence[InputRow]) -> None:
    """Refuse a file of which no row can be used.

    Raises:
        UserError: naming the first of them.
    """
    if rows and all(row.reason for row in rows):
        raise UserError(f"{rows[0].where}: {rows[0].reason}; so none of its rows can be used")


def report_rejected(rows: Sequence[InputRow]) -> None:
    """Say which rows are set aside, and why, and which are predicted for without a text."""
    lines = [f"{row.where}: {row.reason}; set aside" for row in rows if row.reason]
    lines += [
        f"{row.where}: the text is empty; predicted for all the same"
        for row in rows
        if row.item is not None and row.item.text is not None and not row.item.text.strip()
    ]
    for line in lines[:MAX_REPORTED]:
        console.warn(line)
    if len(lines) > MAX_REPORTED:
        console.warn(f"{len(lines) - MAX_REPORTED} more rows like these")


def _given(where: str, line: bytes, folder: Path, task: str | None, clue: bool) -> InputRow:
    row: Any = None
    try:
        row = json.loads(line.decode("utf-8"))
        item = _item(where, row, folder, task, clue)
        return InputRow(where, row, item)
    except UnicodeDecodeError:
        reason = "not UTF-8; convert the file, for example with iconv -f GB18030 -t UTF-8"
    except UserError as problem:
        reason = str(problem).removeprefix(f"{where}: ")
    except (ValueError, RecursionError) as problem:
        reason = f"not JSON ({problem})"
    return InputRow(where, row if isinstance(row, dict) else {}, None, reason)


def _item(where: str, row: Any, folder: Path, task: str | None, clue: bool) -> PredictionItem:
    if not isinstance(row, dict):
        raise UserError(EXPECTED_ROW)
    texts = [row[key] for key in ("text", "sentence") if key in row]
    if len(texts) + ("file" in row) != 1:
        raise UserError(EXPECTED_ROW)
    wanted = row.get("task", task)
    if not all(isinstance(each, str) for each in (*texts, row.get("file", ""), wanted or "")):
        raise UserError("text, file and task must be strings")
    if clue and "id" not in row:
        raise UserError('no "id" in it; CLUE tells predictions apart by it')
    if not texts:
        if "\0" in row["file"]:
            raise UserError("no file can have such a name")
        return replace(read_input_item(folder / row["file"], wanted), where=where)
    if not texts[0].strip() and not clue:
        raise UserError("the text is empty")
    said = row.get("keywords")
    keywords = said if isinstance(said, str) else None
    return PredictionItem(texts[0], texts[0], None, wanted, keywords, where, may_be_empty=clue)
