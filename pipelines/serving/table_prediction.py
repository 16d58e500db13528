"""Predictions of a table: rows flow through this process into one file, which appears whole.

    rows ──> blocks: predict, commit a part ──> answers.csv
                └── committed before: compare the bytes, take the answers of the part

    <output>.parts/plan.json           what the parts belong to
    <output>.parts/part-000000.jsonl   answers and rejected rows of a block; a rename commits it

Only the rows of a chunk are in memory. A call with the same arguments continues a killed one, and
the file is equal to that of an uninterrupted one, bit for bit: the blocks, and so the batches of
the model, are the same. The parts are removed when the file is complete.

:func:`predict_table` is the path of ``skillnet predict``, and :func:`answer_table` that of Python.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipelines.data.io.source_file import format_json_line
from pipelines.serving.answer_files import (
    ANSWER_FIELDS,
    choose_format,
    extend_schema,
    merge_answer,
    open_answer_file,
)
from pipelines.serving.batch_prediction import (
    BatchRequest,
    claim_parts,
    open_request_predictor,
)
from pipelines.serving.inputs import InputRow, check_usable_rows, printable_name, report_rejected
from pipelines.serving.row_tables import RowTable
from skillnet.objectives.base import find_objective
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import open_output
from skillnet_platform.storage.location import read_if_exists, write_location

if TYPE_CHECKING:
    from pipelines.serving.predictor import AnswerLayout, TaskPrediction, TaskPredictor

#: Rows whose answers are read from a part, and written, at once.
CHUNK_ROWS = 64
#: Rejected rows that are kept for the warnings.
KEPT_ROWS = 21


@dataclass
class TableSummary:
    """Result of a prediction of a table.

    Args:
        output: file of the answers.
        rows: number of rows of the input.
        predictions: number of answers.
        rejected: number of unusable rows.
        resumed: rows that an earlier call had answered.
        tasks: task -> number of answers; "" counts those for which the router found no task.
    """

    output: str
    rows: int = 0
    predictions: int = 0
    rejected: int = 0
    resumed: int = 0
    tasks: dict[str, int] = field(default_factory=dict)


#: Rows with the documents of their answers, in order, and the rejected ones.
Answers = tuple[list[tuple[InputRow, dict[str, Any]]], list[InputRow]]


def predict_table(
    request: BatchRequest,
    table: RowTable,
    output: Path,
    rejected: Path | None,
    block_rows: int,
) -> TableSummary:
    """Predict all rows of a table into a file; the same call continues an interrupted one.

    Args:
        request: model, task and layout of the answers; its output is the folder of the parts, ""
            keeps none.
        table: the rows.
        output: file of the answers; its suffix decides the format.
        rejected: file that lists the rejected rows; None lists none.
        block_rows: rows of a part.

    Raises:
        UserError: the model or the input is missing, no row is usable, or the input changed after a
            part of it was predicted.
    """
    kind = choose_format(output, table.format) or "jsonl"
    # Inputs are read before the model is loaded, so that a wrong path fails at once.
    if next(table.read(), None) is None:
        raise UserError(f"{table.where}: the file has no rows")
    schema = None if kind == "jsonl" else table.find_schema()
    predictor, digest = open_request_predictor(request)
    if schema is not None:
        schema = extend_schema(schema, _list_columns(request, table, predictor, schema.names))
    parts = None
    if request.output:
        parts = Path(request.output)
        settings = request.list_settings(digest, block_rows)
        settings |= {"input": str(table.where), "columns": [table.fields.text, table.fields.file]}
        claim_parts(parts, settings, lambda: any(parts.glob("part-*")))
    run = _TableRun(request, predictor, parts, table, block_rows)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(console.show_progress("predicting", table.count_rows(), "rows"))
        answers = stack.enter_context(open_answer_file(output, kind, schema))
        listed: IO[bytes] | None = None
        for answered, refused in run.answer():
            answers.write_rows([_merge(table, row, each) for row, each in answered])
            if refused and rejected is not None:
                listed = listed or stack.enter_context(open_output(rejected, "wb"))
                reasons = (row.place | {"reason": row.reason} for row in refused)
                listed.writelines(format_json_line(each).encode() for each in reasons)
            bar.advance(run.summary.rows - bar.done)
        if not run.summary.predictions:
            if parts is not None:
                # The input or an option is wrong, and nothing was answered.
                shutil.rmtree(parts)
            check_usable_rows(run.rejected, len(run.rejected))
    if rejected is not None and not run.summary.rejected:
        # The list of an earlier command would describe other predictions.
        rejected.unlink(missing_ok=True)
    if parts is not None:
        shutil.rmtree(parts)
    remedy = f"see {rejected}" if rejected is not None else "--output FILE lists all of them"
    report_rejected(run.rejected, [], remedy, run.summary.rejected)
    return replace(run.summary, output=str(output))


def answer_rows(
    predictor: "TaskPredictor", rows: Iterable[InputRow], top: int | None, layout: "AnswerLayout"
) -> Iterator[Answers]:
    """Yield the answers to rows in chunks that fit into memory, each with its row.

    Args:
        predictor: with the model.
        rows: usable and rejected ones.
        top: number of alternatives.
        layout: fields of an answer.
    """
    for part in predictor.answer_rows(rows, top or 1):
        found = [(row, format_answer(row, made, layout)) for row, made in part.answered]
        yield found, part.rejected


def format_answer(
    row: InputRow, prediction: "TaskPrediction", layout: "AnswerLayout"
) -> dict[str, Any]:
    """Return the columns of a prediction: ``input`` only where the row has several inputs.

    Args:
        row: the row that it answers.
        prediction: the answer.
        layout: fields of an answer.
    """
    document = layout.format(prediction)
    # The row itself has its text or file.
    if row.item is not None and document["input"] == printable_name(row.item.name):
        del document["input"]
    return document


class _TableRun:
    """Blocks of a table, predicted or taken from the parts of an earlier call."""

    def __init__(
        self,
        request: BatchRequest,
        predictor: "TaskPredictor",
        parts: Path | None,
        table: RowTable,
        block_rows: int,
    ) -> None:
        self._request, self._predictor, self._parts = request, predictor, parts
        self._table, self._block_rows = table, block_rows
        self._seen = hashlib.sha256()
        self.summary = TableSummary("")
        #: The first rejected rows.
        self.rejected: list[InputRow] = []

    def answer(self) -> Iterator[Answers]:
        """Yield the answers to all rows."""
        rows, number = self._table.read(self._see), 0
        for first in rows:
            block = self._take_block(first, rows)
            done = self._read_part(number)
            chunks = self._predict_block(number, block) if done is None else done.join(block)
            for answered, refused in chunks:
                self._count(answered, refused)
                yield answered, refused
            if done is not None:
                self._compare(number, done)
            number, self._seen = number + 1, hashlib.sha256()

    def _see(self, data: bytes) -> bytes:
        # With its length, so that bytes do not move between two rows unnoticed.
        self._seen.update(len(data).to_bytes(8, "big"))
        self._seen.update(data)
        return data

    def _take_block(self, first: InputRow, rest: Iterator[InputRow]) -> Iterator[InputRow]:
        """Yield the rows of a block, numbered; the first one has been read."""
        for number, row in enumerate(chain([first], islice(rest, self._block_rows - 1))):
            self.summary.rows += 1
            yield replace(row, number=number)

    def _count(
        self, answered: list[tuple[InputRow, dict[str, Any]]], refused: list[InputRow]
    ) -> None:
        self.summary.predictions += len(answered)
        self.summary.rejected += len(refused)
        self.rejected += refused[: KEPT_ROWS - len(self.rejected)]
        for _, each in answered:
            self.summary.tasks[each["task"]] = self.summary.tasks.get(each["task"], 0) + 1

    def _predict_block(self, number: int, block: Iterator[InputRow]) -> Iterator[Answers]:
        lines: list[str] = []
        before = self.summary.rows
        layout = self._request.layout
        for answered, refused in answer_rows(self._predictor, block, self._request.top, layout):
            lines += [json.dumps({"row": row.number, "answer": each}) for row, each in answered]
            lines += [json.dumps({"row": row.number, "reason": row.reason}) for row in refused]
            yield answered, refused
        if self._parts is not None:
            rows = self.summary.rows - before
            head = {"rows": rows, "lines": len(lines), "input_sha256": self._seen.hexdigest()}
            # A rename commits the part whole.
            data = "\n".join([json.dumps(head), *lines, ""]).encode()
            write_location(self._parts / _name_part(number), data)

    def _read_part(self, number: int) -> "_DonePart | None":
        """Return a committed part; None if the block has to be predicted."""
        data = None if self._parts is None else read_if_exists(self._parts / _name_part(number))
        if data is None:
            return None
        head, *lines = data.decode().splitlines() or [""]
        done = _DonePart()
        try:
            about = json.loads(head)
            done.rows, done.digest = int(about["rows"]), about["input_sha256"]
            for line in map(json.loads, lines):
                if "answer" in line:
                    done.answers.setdefault(line["row"], []).append(line["answer"])
                else:
                    done.reasons[line["row"]] = line["reason"]
        # A disk that was full may leave a damaged part; its block is predicted again.
        except (ValueError, KeyError, TypeError):
            return None
        return done if len(lines) == about["lines"] else None

    def _compare(self, number: int, done: "_DonePart") -> None:
        """Raise UserError if the rows of a committed part have other bytes than they had then."""
        self.summary.resumed += done.rows
        if self._seen.hexdigest() != done.digest:
            raise UserError(
                f"{self._parts}: {_name_part(number)} was predicted from other bytes than the rows "
                f"of {self._table.where} have now. Remove the folder, or choose another --output"
            )


@dataclass
class _DonePart:
    """Answers of a committed block.

    Args:
        rows: number of its rows.
        digest: SHA-256 of their bytes.
        answers: number of a row -> its answers.
        reasons: number of a row -> why it is unusable.
    """

    rows: int = 0
    digest: str = ""
    answers: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)

    def join(self, block: Iterator[InputRow]) -> Iterator[Answers]:
        """Yield the answers with their rows, a chunk at a time."""
        while rows := [replace(row, item=None) for row in islice(block, CHUNK_ROWS)]:
            refused = (row for row in rows if row.number in self.reasons)
            yield (
                [(row, each) for row in rows for each in self.answers.get(row.number, ())],
                [replace(row, reason=self.reasons[row.number]) for row in refused],
            )


def _merge(table: RowTable, row: InputRow, document: dict[str, Any]) -> dict[str, Any]:
    """Return the row of the output: its columns, its place in the input, and the prediction."""
    keys = ("source", "line") if table.format is None else ("line",)
    return merge_answer(row.values or {}, {key: row.place[key] for key in keys} | document)


def _name_part(number: int) -> str:
    return f"part-{number:06d}.jsonl"


def _list_columns(
    request: BatchRequest, table: RowTable, predictor: "TaskPredictor", names: Iterable[str]
) -> list[str]:
    """Return the columns of predictions that a table with these columns needs."""
    left_out = set()
    if table.format is not None:
        left_out.add("source")
    if not request.top:
        left_out.add("alternatives")
    # Only a named retrieval task answers a text with its embedding alone.
    named = {request.task or ""} & {*predictor.tasks} or (
        {*predictor.tasks} if "task" in names else ()
    )
    specs = (predictor.model.config.tasks[task] for task in named)
    has_vectors = any(find_objective(spec.objective).pairs_towers for spec in specs)
    if not request.has_embeddings and not has_vectors:
        left_out.add("embedding")
    return [name for name in ANSWER_FIELDS if name not in left_out]
