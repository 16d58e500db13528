"""Tables in memory whose rows are predicted: data frames, Arrow tables and lists of mappings.

:func:`predict_memory_table` is the path of ``SkillNet.predict``; its answer is of the same kind.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipelines.data.io.field_names import FILE_FIELDS, fold_name
from pipelines.serving.answer_files import ANSWER_FIELDS, merge_answer, rename_column
from pipelines.serving.inputs import (
    InputFields,
    InputRow,
    check_usable_rows,
    make_item,
    read_file_bytes,
    report_rejected,
)
from pipelines.serving.predictor import AnswerLayout, TaskPredictor
from pipelines.serving.row_tables import parse_record
from pipelines.serving.table_prediction import answer_rows
from skillnet.skills import find_task
from skillnet_platform.errors import UserError

#: Common name of a column with decoded media -> their modality.
MODALITY_OF_FIELD = {"image": "image", "audio": "sound", "wav": "sound", "video": "video"}


def predict_memory_table(
    predictor: TaskPredictor,
    rows: Any,
    task: str | None,
    top: int | None,
    has_embeddings: bool,
    fields: InputFields,
) -> Any:
    """Return a table of the same kind: the columns of the rows, and those of their predictions.

    Args:
        predictor: with the model.
        rows: a data frame, an Arrow table or a list of mappings.
        task: for rows that do not name one.
        top: number of alternatives; None leaves them out.
        has_embeddings: whether predictions with an answer have an embedding, too.
        fields: columns that the caller names.

    Raises:
        UserError: the rows are no table, or none of them is usable.
    """
    records = list_records(rows, "rows")
    read = (_read_row(predictor, record, n, task, fields) for n, record in enumerate(records))
    layout = AnswerLayout(top or 0, has_embeddings)
    answered, rejected = list[tuple[InputRow, dict[str, Any]]](), list[InputRow]()
    for found, refused in answer_rows(predictor, read, top, layout):
        answered += found
        rejected += refused
    check_usable_rows(rejected, len(records))
    report_rejected(rejected, [], "correct them, or leave them out")
    if not isinstance(rows, pa.Table) and not hasattr(rows, "iloc"):
        return [merge_answer(records[row.number], each) for row, each in answered]
    documents = [each for _, each in answered]
    names = [name for name in ANSWER_FIELDS if any(name in each for each in documents)]
    columns = {name: [each.get(name) for each in documents] for name in names}
    return _extend_table(rows, [row.number for row, _ in answered], columns)


def _extend_table(rows: Any, numbers: list[int], columns: dict[str, list[Any]]) -> Any:
    """Return the rows of some numbers with further columns."""
    if isinstance(rows, pa.Table):
        table = rows.drop_columns(["task"]) if "task" in rows.column_names else rows
        table = table.take(pa.array(numbers, pa.int64()))
        table = table.rename_columns([rename_column(name) for name in table.column_names])
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, ANSWER_FIELDS[name]))
        return table
    frame = rows.drop(columns="task") if "task" in rows.columns else rows
    frame = frame.iloc[numbers].rename(columns=rename_column)
    for name, values in columns.items():
        frame[name] = values
    return frame


def _read_row(
    predictor: TaskPredictor,
    record: Mapping[Any, Any],
    number: int,
    task: str | None,
    fields: InputFields,
) -> InputRow:
    where = f"row {number}"
    values = {str(name): None if is_missing(value) else value for name, value in record.items()}
    place = {"row": number}
    try:
        if (media := _find_media(values, fields)) is not None:
            name = values.get("task") or task
            modality = MODALITY_OF_FIELD.get(fold_name(media), "")
            if name is not None:
                spec = find_task(name, predictor.model.config.tasks)
                modality = spec.towers[spec.row_tower or "input"].modality
            if not modality:
                raise UserError(f"{media} holds media of an unknown kind. Give task")
            item = make_item(values[media], modality, where, name or "")
            return InputRow(where, place, replace(item, task=name), number=number)
    except ValueError as error:
        return InputRow(where, place, None, str(error).removeprefix(f"{where}: "), number=number)
    found = parse_record(values, where, place, read_file_bytes, task, fields)
    return replace(found, number=number)


def _find_media(values: Mapping[str, Any], fields: InputFields) -> str | None:
    """Return the column that holds a path or decoded media, which no file of rows has."""
    names = [name for each in FILE_FIELDS for name in values if fold_name(name) == each]
    if fields.text is not None or fields.file is not None:
        names = [name for name in values if name == fields.file and fields.text is None]
    plain = (str, bytes, dict, int, float, type(None))
    return next((name for name in names if not isinstance(values[name], plain)), None)


def list_records(rows: Any, name: str) -> list[dict[Any, Any]]:
    """Return rows as mappings; those of a mapping of splits with a field ``split``.

    Args:
        rows: a data frame, an Arrow table, a list of mappings, or split -> one of them.
        name: names the rows in messages.

    Raises:
        UserError: the rows are something else.
    """
    if isinstance(rows, Mapping):
        found = []
        for split, part in rows.items():
            if not isinstance(split, str) or isinstance(part, Mapping):
                raise UserError(f"{name}: expected rows, or the rows of each split by its name")
            found += [row | {"split": split} for row in list_records(part, name)]
        return found
    if isinstance(rows, pa.Table):
        return list(rows.to_pylist())
    # A data frame, without an import of pandas.
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        if len(set(rows.columns)) < len(rows.columns):
            raise UserError(f"{name}: two columns of the data frame have one name; rename one")
        return [dict(row) for row in rows.to_dict("records")]
    if isinstance(rows, Sequence) and not isinstance(rows, str | bytes):
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise UserError(
                    f"{name}, row {number}: expected a mapping such as "
                    f'{{"text": …, "label": …}}, got {type(row).__name__}'
                )
        return [dict(row) for row in rows]
    raise UserError(
        f"{name}: expected a data frame, an Arrow table, a list of mappings, or a path; got "
        f"{type(rows).__name__}"
    )


def is_missing(value: Any) -> bool:
    """Return whether a cell is empty: None, or NaN as data frames have it."""
    return value is None or (isinstance(value, float) and math.isnan(value))
