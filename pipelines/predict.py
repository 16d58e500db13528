"""``skillnet predict``: predictions of a trained model for texts and files."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pipelines.training.config.resources import request_model
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import positional_field
from skillnet_platform.config.bounds import PositiveCount, require_bounds
from skillnet_platform.errors import UserError
from skillnet_platform.storage import open_output
from skillnet_platform.storage.directories import is_uri
from skillnet_platform.storage.location import Location, parse_location
from skillnet_platform.terminal_text import format_plural, shorten_text

if TYPE_CHECKING:
    from pipelines.serving.batch_prediction import BatchRequest, BatchSummary
    from pipelines.serving.inputs import InputFields, InputRow
    from pipelines.serving.predictor import AnswerLayout, RowAnswers, TaskPrediction
    from pipelines.serving.table_prediction import TableSummary


#: Predictions in memory, or the counts of those that were written.
PredictResult: TypeAlias = (
    "tuple[RowAnswers, list[dict[str, Any]], PredictConfig] | BatchSummary | TableSummary"
)
#: Title of the inputs for which the router found no task.
NO_TASK = "unsure"


def _find_format(name: str) -> str | None:
    """Return the format of a file of rows by its suffix, see :mod:`pipelines.serving.inputs`.

    Args:
        name: name of a file.
    """
    from pipelines.serving import inputs

    return inputs.find_table_format(name)


@dataclass
class PredictConfig:
    """Predict for texts and files.

    Args:
        files: audio, images, video, Python files, texts (.txt), or one file of rows.
        file: more files; the same as positional arguments.
        input: what `skillnet prepare` reads: a file of rows (.csv, .tsv, .parquet, .json, .jsonl)
            or a folder. A row has a text or names a file, and optionally its task. Unusable rows
            are reported and skipped; it is an error if no row is usable. With the name of a file as
            --output, rows are answered in blocks, and the same command continues an interrupted
            prediction. A folder with a folder as output, or a URI of .jsonl or media files, is
            predicted in blocks with Ray Data.
        format: layout of the output: ``jsonl`` has all fields of each prediction, ``clue`` the
            lines that CLUE expects for TNEWS, {"id": 2, "label": "107", "label_desc": "news_car"},
            including lines with an empty sentence.
        text: text to predict on.
        task: task to run; without it, the model finds the tasks that an input belongs to. All of
            them answer; the answer says so if the model is unsure.
        model: registry address, name, id or folder of a run, checkpoint, or saved model.
        data: prepared corpora, for a checkpoint; by default those of its run, else corpora below
            the run root.
        text_column: column of the text in a table; by default as in `skillnet prepare`: text,
            sentence and the like.
        file_column: column of the file in a table; by default file_name, image and the like.
        top: number of alternatives; without it, only a table on the terminal has some.
        embeddings: also the vector of each input that a retrieval task reads. A text of a retrieval
            task always has one, because it is the answer.
        output: file for the predictions, in the format of its suffix (.csv, .tsv, .parquet, .jsonl)
            or else of the input: the columns of the input with those of the predictions. Rejected
            rows are listed with their reasons in a file of the same name that ends in
            .rejected.jsonl.
        block_rows: rows of a block, of an input in blocks.
        precision: auto, bf16, fp32 or fp64.
        tracking_uri: MLflow tracking URI; by default as in training.
    """

    files: list[str] = positional_field([])
    file: list[str] = field(default_factory=list)
    input: str | None = None
    format: Literal["jsonl", "clue"] = "jsonl"
    text: str | None = None
    task: str | None = None
    model: str = "models:/skillnet@champion"
    data: str | None = None
    text_column: str | None = None
    file_column: str | None = None
    top: PositiveCount | None = None
    embeddings: bool = False
    output: str | None = None
    block_rows: PositiveCount = 1000
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    tracking_uri: str | None = None

    def __post_init__(self) -> None:
        require_bounds(self)
        if self.format == "clue" and (not self.input or self.files or self.file or self.text):
            raise UserError(
                "--format clue needs exactly one test file; give only --input test.json"
            )
        if not self.files and not self.file and self.text is None and self.input is None:
            raise UserError(
                "no input; give --text TEXT, or files (audio, images, video, .py, .txt, .jsonl)"
            )
        if self.is_batch:
            given = [*self.files, self.file, self.text, self.format == "clue" and "--format clue"]
            others = [str(each) for each in given if each]
            if not self.input or others:
                raise UserError(
                    "a prediction in blocks takes one --input folder or URI"
                    + (f"; leave out {', '.join(others)}" if others else "")
                )
            if not self.output:
                raise UserError(f"--input {self.input}: give --output FOLDER, or a URI")

    @property
    def is_batch(self) -> bool:
        """Whether the input is predicted with Ray Data: a folder, or a URI on either side."""
        if self.output and is_uri(self.output):
            return True
        # One file of answers is written by this process.
        is_folder = bool(self.input and not is_uri(self.input) and Path(self.input).is_dir())
        has_many = is_folder or bool(self.input and is_uri(self.input))
        return has_many and not (self.output and _find_format(self.output))

    @property
    def table(self) -> Location | None:
        """Rows that flow into one file: the only input, None for other inputs."""
        others = [self.text, *(self.files if self.input else self.files[1:]), *self.file]
        name = self.input or next(iter(self.files), None)
        if name is None or not self.output or self.format == "clue" or any(others):
            return None
        where = parse_location(name, Path())
        # A pipe can be read once, and not again after an interruption.
        if isinstance(where, Path) and not where.is_dir() and not where.is_file():
            return None
        return where if self.input or _find_format(name) else None

    @property
    def fields(self) -> "InputFields":
        """Columns that the user names."""
        from pipelines.serving.inputs import InputFields

        return InputFields(self.text_column, self.file_column)

    @property
    def layout(self) -> "AnswerLayout":
        """Fields of an answer outside of a terminal."""
        from pipelines.serving.predictor import AnswerLayout

        return AnswerLayout(self.top or 0, self.embeddings)


def predict_rows(config: PredictConfig) -> "RowAnswers":
    """Predict for the inputs of a command line.

    Args:
        config: settings of the command.

    Raises:
        UserError: the model or a file is missing, an input of the command line is unreadable, or a
            file has no usable row.
    """
    from pipelines.serving import inputs
    from pipelines.training.runs import model_source

    # Inputs are read before the model is loaded, so that a wrong path fails at once.
    rows = gather_inputs(config)
    source = model_source.resolve_model(config.model, config.tracking_uri)
    # torch loads here: --help and wrong names do not need it.
    from pipelines.serving.bundle import open_predictor
    from pipelines.serving.predictor import DEFAULT_TOP, RowAnswers

    predictor = open_predictor(
        source, source.find_corpora(config.data), config.precision, config.task
    )
    parts = list(predictor.answer_rows(rows, config.top or DEFAULT_TOP))
    answered = [each for part in parts for each in part.answered]
    rejected = [row for part in parts for row in part.rejected]
    inputs.check_usable_rows(rejected, sum(not row.is_required for row in rows))
    listed = choose_rejected_path(config.output) if config.output else None
    remedy = f"see {listed}" if listed else "--output FILE lists all of them"
    inputs.report_rejected(rejected, [row for row, _ in answered], remedy)
    return RowAnswers(answered, rejected)


def predict_in_blocks(config: PredictConfig) -> "BatchSummary":
    """Predict for a folder or URI with Ray Data.

    Args:
        config: settings of the command.

    Raises:
        UserError: as :func:`pipelines.serving.batch_prediction.predict_blocks`.
    """
    from pipelines.serving.batch_prediction import predict_blocks

    request = make_request(config, str(parse_location(config.output, Path())))
    return predict_blocks(request, parse_location(config.input, Path()), config.block_rows)


def predict_into_file(config: PredictConfig, where: Location) -> "TableSummary":
    """Predict a table into one file.

    Args:
        config: settings of the command.
        where: file or folder of the rows.

    Raises:
        UserError: as :func:`pipelines.serving.table_prediction.predict_table`.
    """
    from pipelines.serving.row_tables import RowTable
    from pipelines.serving.table_prediction import predict_table

    output = Path(config.output or "")
    listed = choose_rejected_path(str(output))
    # Beside a device such as /dev/stdout, no folder can hold the parts.
    parts = "" if listed is None else str(output.with_name(f"{output.name}.parts").absolute())
    table = RowTable(where, config.task, config.fields)
    return predict_table(make_request(config, parts), table, output, listed, config.block_rows)


def make_request(config: PredictConfig, output: str) -> "BatchRequest":
    """Return what a prediction in blocks needs of a command line.

    Args:
        config: settings of the command.
        output: folder or URI of the parts.
    """
    from pipelines.serving.batch_prediction import BatchRequest

    return BatchRequest(
        config.model,
        str(parse_location(config.data, Path())) if config.data else None,
        output,
        config.task,
        config.top,
        config.precision,
        config.tracking_uri,
        has_embeddings=config.embeddings,
    )


def choose_rejected_path(output: str) -> Path | None:
    """Return the file that lists rejected rows beside an output, None beside a pipe or device.

    Args:
        output: file of the predictions.
    """
    path = Path(output)
    if path.exists() and not path.is_file():
        return None
    stem = path.stem if _find_format(path.name) else path.name
    return path.with_name(f"{stem}.rejected.jsonl")


def gather_inputs(config: PredictConfig) -> "list[InputRow]":
    """Return all inputs of a command line, the text first.

    Args:
        config: settings of the command.

    Raises:
        UserError: a file is missing, empty or damaged.
    """
    from pipelines.serving import inputs

    found: list[InputRow] = []
    if config.text is not None:
        item = inputs.PredictionItem(config.text, config.text, None, config.task)
        found.append(inputs.InputRow("--text", {}, item, is_required=True))
    if config.input is not None:
        path = Path(config.input)
        found += _read_rows(path, config)
    for name in [*config.files, *config.file]:
        if _find_format(name):
            found += _read_rows(Path(name), config)
        else:
            item = inputs.read_input_item(name, config.task)
            found.append(inputs.InputRow(name, {}, item, is_required=True))
    return found


def _read_rows(path: Path, config: PredictConfig) -> "list[InputRow]":
    """Return the rows of a file that fit into memory; it may be a pipe."""
    from pipelines.serving import inputs

    is_lines = config.format == "clue" or (_find_format(path.name) or "jsonl") == "jsonl"
    if is_lines and path.suffix.lower() not in (".json", ".gz"):
        return inputs.read_input_rows(path, config.task, config.format == "clue", config.fields)
    from pipelines.serving.row_tables import RowTable

    rows = list(RowTable(path.absolute(), config.task, config.fields).read())
    if not rows:
        raise UserError(f"{path}: the file has no rows")
    inputs.check_usable_rows([row for row in rows if row.reason], len(rows))
    return rows


def clue_lines(predictions: "list[tuple[InputRow, TaskPrediction]]") -> list[dict[str, Any]]:
    """Return the lines that CLUE's evaluation of TNEWS expects: id, label and description.

    Args:
        predictions: inputs with their predictions.

    Raises:
        UserError: the classes of the model are not those of the reader ``tnews``.
    """
    lines = []
    for row, prediction in predictions:
        if not prediction.task:
            raise UserError(f"--format clue: {row.where}: {prediction.answer}. Give --task")
        # The classes of the reader tnews are named by code and description.
        code, _, description = prediction.answer.partition(" ")
        if not code.isdigit() or not description:
            raise UserError(
                f"--format clue: {prediction.answer!r} is not a class of TNEWS; use a model that "
                "was trained on a corpus of --corpus tnews=PATH"
            )
        lines.append({"id": row.place["id"], "label": code, "label_desc": description})
    return lines


def print_tables(answered: "list[tuple[InputRow, TaskPrediction]]") -> None:
    """Print predictions, one table per task.

    Args:
        answered: inputs with their predictions, in order.
    """
    for task in dict.fromkeys(prediction.task for _, prediction in answered):
        rows, queries = [], set[str]()
        for row, p in answered:
            if p.task != task:
                continue
            answer, score = p.answer or f"(embedding of width {len(p.embedding)})", f"{p.score:.3f}"
            others = "\n".join(f"{_short(n, 32)} {v:.3f}" for n, v in p.alternatives[1:])
            label = [str(row.place.get("id", "")), row.place.get("line", "")]
            rows.append([*label, _short(p.input), answer, score if p.answer else "–", others])
            if not p.answer and p.embedding:
                queries.add('"…"' if row.item and row.item.text is not None else "--file FILE")
            rows[-1].append("" if p.confidence == 1 else f"{p.confidence:.3f}")
        columns = ["id", "line", "input", "answer", "score", "alternatives", "task fits"]
        # Inputs of the command line have neither id nor line; transcripts have no alternatives.
        always = ("input", "answer", "score")
        shown = [n for n, name in enumerate(columns) if name in always or any(r[n] for r in rows)]
        console.print_table(
            task or NO_TASK, [columns[n] for n in shown], [[row[n] for n in shown] for row in rows]
        )
        for query in sorted(queries):
            console.print_note(
                f"to rank the rows of a corpus for it: skillnet search {query} --task {task}"
            )


def show_result(result: "PredictResult") -> None:
    """Print predictions, or the counts of a prediction in blocks.

    Args:
        result: outcome of the command.
    """
    # The module of the result is loaded, and --help does not load it.
    from pipelines.serving.batch_prediction import BatchSummary

    if not isinstance(result, tuple):
        if not isinstance(result, BatchSummary):
            _show_counts(result.predictions, result.tasks, result.output)
            _show_rejected(result.rejected, result.output)
            return
        console.print_note(
            f"{result.predictions:,} predictions and {result.rejected:,} rejected rows in "
            f"{result.blocks} blocks ({result.resumed} done before): {result.output}"
        )
        return
    run, lines, config = result
    if config.output:
        tasks = Counter(prediction.task for _, prediction in run.answered)
        _show_counts(len(lines), tasks, config.output)
    elif config.format == "clue":
        console.print_json_lines(lines)
    else:
        print_tables(run.answered)
    _show_rejected(len(run.rejected), config.output)


def _show_counts(count: int, tasks: Mapping[str, int], output: str) -> None:
    counts = ", ".join(f"{task or NO_TASK} {count}" for task, count in tasks.items())
    console.print_note(f"{format_plural(count, 'prediction')} ({counts}) in {output}")


def _show_rejected(count: int, output: str | None) -> None:
    listed = choose_rejected_path(output) if output else None
    if count:
        where = f" in {listed}" if listed else ""
        console.print_note(f"{format_plural(count, 'rejected row')}{where}")


def write_predictions(run: "RowAnswers", lines: list[dict[str, Any]], output: str) -> None:
    """Write predictions, and the rejected rows beside them.

    Args:
        run: predictions and rejected rows.
        lines: records of the output file.
        output: file of the predictions.
    """
    from pipelines.data.io.source_file import format_json_line
    from pipelines.serving.answer_files import (
        ANSWER_FIELDS,
        choose_format,
        infer_schema,
        open_answer_file,
    )

    kind = choose_format(output, "jsonl") or "jsonl"
    schema = None if kind == "jsonl" else infer_schema(lines, ANSWER_FIELDS)
    # A killed command must not leave half a file that looks complete.
    with open_answer_file(output, kind, schema) as answers:
        answers.write_rows(lines)
    listed = choose_rejected_path(output)
    if listed is not None and run.rejected:
        with open_output(listed, "w") as stream:
            stream.writelines(map(format_json_line, run.list_reasons()))
    elif listed is not None:
        # The list of an earlier command would describe other predictions.
        listed.unlink(missing_ok=True)


def _short(text: str, longest: int = 48) -> str:
    return shorten_text(" ".join(text.split()), longest)


@command(
    PredictConfig,
    description="Predict the class of a text, the transcript of a recording, or the known captions "
    "nearest to an image, a video or the functions of a Python file.",
    example='skillnet predict --text "中国古代文学史"\n'
    "skillnet predict heart.png speech.mp3 module.py --top 3\n"
    "skillnet predict rows.csv --output predictions.csv\n"
    "skillnet predict --task text_classification --input test.json "
    "--output tnews_predict.json --format clue\n"
    "skillnet predict --input s3://bucket/rows --output s3://bucket/predictions",
    show=show_result,
    to_json=lambda result: result[1] if isinstance(result, tuple) else result,
    resources=lambda config: request_model(config.model, config.data),
)
def main(
    config: PredictConfig,
) -> "PredictResult":
    """Run ``skillnet predict``."""
    if config.is_batch:
        return predict_in_blocks(config)
    if (where := config.table) is not None:
        return predict_into_file(config, where)
    run = predict_rows(config)
    is_clue = config.format == "clue"
    lines = clue_lines(run.answered) if is_clue else run.list_documents(config.layout)
    if config.output:
        write_predictions(run, lines, config.output)
    return run, lines, config


if __name__ == "__main__":
    raise SystemExit(main())
