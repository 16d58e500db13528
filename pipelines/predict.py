"""``skillnet predict``: predictions of a trained model for texts and files."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.config.resources import request_model
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import positional_field
from skillnet_platform.config.bounds import PositiveCount, require_bounds
from skillnet_platform.errors import UserError
from skillnet_platform.storage import data_root, open_output
from skillnet_platform.storage.location import parse_location

if TYPE_CHECKING:
    from pipelines.serving.inputs import InputRow
    from pipelines.serving.predictor import TaskPrediction

ROW_SUFFIXES = (".jsonl", ".ndjson")


@dataclass
class PredictConfig:
    """Predict for texts and files.

    Args:
        files: audio, images, video, Python files, texts (.txt), or .jsonl with one row per line:
            {"text": …} or {"file": …}, and optionally "task".
        file: more files; the same as positional arguments.
        input: file of rows as JSON lines, with any name. Rows of TNEWS, {"id": …, "sentence": …},
            are read as well, with "keywords" if the model was trained with them. Unusable rows are
            reported and skipped; it is an error if no row is usable.
        format: of the output: ``jsonl`` has all fields of each prediction, ``clue`` the lines that
            CLUE expects for TNEWS, {"id": 2, "label": "107", "label_desc": "news_car"}, including
            lines with an empty sentence.
        text: a text.
        task: task to run; by default the first task that reads the modality.
        model: registry address, name, id or folder of a run, checkpoint, or saved model.
        data: prepared corpora; required only for a checkpoint.
        top: number of alternatives.
        output: file for the predictions, one line each.
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
    top: PositiveCount = 5
    output: str | None = None
    precision: str = "auto"
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


def predict_rows(config: PredictConfig) -> "list[tuple[InputRow, TaskPrediction]]":
    """Predict for the inputs of a command line, and return inputs with their predictions.

    Unusable rows of a file are reported and skipped.

    Args:
        config: of the command.

    Raises:
        UserError: the model or a file is missing, an input of the command line is unreadable, or a
            file has no usable row.
    """
    # torch loads here, so that --help and usage errors stay fast.
    from pipelines.runs import model_source
    from pipelines.serving.bundle import open_predictor
    from pipelines.serving.inputs import InputRow, check_usable_rows, report_rejected

    # Inputs are read before the model is loaded, so that a wrong path fails at once.
    inputs = gather_inputs(config)
    source = model_source.resolve_model(config.model, config.tracking_uri)
    data = parse_location(config.data, data_root())
    predictor = open_predictor(source, data, config.precision)
    usable = [row for row in inputs if not row.reason]
    rejected: dict[int, str] = {}

    def reject(index: int, message: str) -> None:
        where = usable[index].where
        # An input of the command line must not be skipped; a row of a file may be.
        if not where:
            raise UserError(message)
        rejected[index] = message.removeprefix(f"{where}: ")

    items = [row.item for row in usable if row.item]
    predictions = predictor.predict(items, config.top, reject)
    unusable = [
        replace(usable[index], item=None, reason=reason) for index, reason in rejected.items()
    ]
    unusable += [row for row in inputs if row.reason]
    predicted = [row for index, row in enumerate(usable) if index not in rejected]
    # Inputs of the command line have no position here; they have failed above.
    check_usable_rows([row for row in (*unusable, *predicted) if row.where])
    report_rejected([*unusable, *predicted])
    # A file with functions has several predictions, so that inputs and predictions do not pair.
    if len(predicted) != len(predictions):
        predicted = [InputRow("", {})] * len(predictions)
    return list(zip(predicted, predictions, strict=True))


def gather_inputs(config: PredictConfig) -> "list[InputRow]":
    """Return all inputs of a command line, the text first.

    Args:
        config: of the command.

    Raises:
        UserError: a file is missing, empty or damaged.
    """
    from pipelines.serving.inputs import InputRow, read_input_rows
    from pipelines.serving.predictor import PredictionItem, read_input_item

    inputs: list[InputRow] = []
    if config.text is not None:
        item = PredictionItem(config.text, config.text, None, config.task, where="--text")
        inputs.append(InputRow("", {}, item))
    if config.input is not None:
        inputs += read_input_rows(Path(config.input), config.task, config.format == "clue")
    for name in [*config.files, *config.file]:
        if Path(name).suffix.lower() in ROW_SUFFIXES:
            inputs += read_input_rows(Path(name), config.task)
        else:
            inputs.append(InputRow("", {}, read_input_item(name, config.task)))
    return inputs


def clue_lines(predictions: "list[tuple[InputRow, TaskPrediction]]") -> list[dict[str, Any]]:
    """Return the lines that CLUE's evaluation of TNEWS expects: id, label and description.

    Args:
        predictions: inputs with their predictions.

    Raises:
        UserError: the classes of the model are not those of the reader ``tnews``.
    """
    lines = []
    for row, prediction in predictions:
        # The classes of the reader tnews are named by code and description.
        code, _, description = prediction.answer.partition(" ")
        if not code.isdigit() or not description:
            raise UserError(
                f"--format clue: {prediction.answer!r} is not a class of TNEWS; use a model that "
                "was trained on a corpus of --corpus tnews=PATH"
            )
        lines.append({"id": row.row["id"], "label": code, "label_desc": description})
    return lines


def print_tables(predictions: "list[TaskPrediction]") -> None:
    """Print predictions, one table per task.

    Args:
        predictions: in order.
    """
    for task in dict.fromkeys(p.task for p in predictions):
        rows = []
        for p in predictions:
            if p.task != task:
                continue
            answer, score = (
                p.answer or f"(embedding of width {len(p.embedding)})",
                f"{p.score:.3f}",
            )
            others = "\n".join(f"{_short(n, 32)} {v:.3f}" for n, v in p.alternatives[1:])
            rows.append([_short(p.input), answer, score if p.answer else "–", others])
        console.print_table(task, ["input", "answer", "score", "alternatives"], rows)
        if any(not p.answer and p.task == task and p.embedding for p in predictions):
            console.print_note(
                f'to rank the rows of a corpus for a text: skillnet search "…" --task {task}'
            )


def show_predictions(
    predictions: "list[TaskPrediction]", lines: list[dict[str, Any]], config: PredictConfig
) -> None:
    """Print predictions as tables or in CLUE's format.

    Args:
        predictions: in order.
        lines: of the output file.
        config: of the command.
    """
    if config.format == "clue" and config.output:
        console.print_note(f"{len(lines)} predictions in {config.output}")
    elif config.format == "clue":
        console.print_json_lines(lines)
    else:
        print_tables(predictions)


def _to_json(prediction: "TaskPrediction") -> dict[str, Any]:
    values = asdict(prediction)
    values["alternatives"] = [
        {"answer": name, "score": score} for name, score in prediction.alternatives
    ]
    if not prediction.answer:
        # The score of an embedding is NaN, which JSON does not have.
        values["score"] = None
    return values


def _short(text: str, max_length: int = 48) -> str:
    text = " ".join(text.split())
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


@command(
    PredictConfig,
    description="Predict the class of a text, the transcript of a recording, or the known captions "
    "nearest to an image, a video or the functions of a Python file.",
    example='skillnet predict --text "中国古代文学史"\n'
    "skillnet predict heart.png speech.mp3 module.py --top 3\n"
    "skillnet predict rows.jsonl --output predictions.jsonl --json\n"
    "skillnet predict --task text_classification --input test.json "
    "--output tnews_predict.json --format clue",
    show=lambda result: show_predictions(*result),
    to_json=lambda result: result[1],
    resources=lambda config: request_model(config.model, config.data),
)
def main(
    config: PredictConfig,
) -> "tuple[list[TaskPrediction], list[dict[str, Any]], PredictConfig]":
    """Run ``skillnet predict``."""
    answered = predict_rows(config)
    predictions = [prediction for _, prediction in answered]
    lines: list[dict[str, Any]] = [_to_json(prediction) for prediction in predictions]
    if config.format == "clue":
        lines = clue_lines(answered)
    if config.output:
        # A killed command must not leave half a file that looks complete.
        with open_output(config.output, "w") as stream:
            for line in lines:
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    return predictions, lines, config


if __name__ == "__main__":
    raise SystemExit(main())
