"""``skillnet predict``: a trained model on texts and files."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.config.resources import request_model
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import positional
from skillnet_platform.errors import UserError
from skillnet_platform.storage import atomic_write, data_root
from skillnet_platform.storage.location import place

if TYPE_CHECKING:
    from pipelines.serving.inputs import InputRow
    from pipelines.serving.predictor import TaskPrediction

ROW_SUFFIXES = (".jsonl", ".ndjson")


@dataclass
class PredictConfig:
    """Predict for texts and files.

    Args:
        files: recordings, pictures, clips, Python files, texts (.txt), or .jsonl with a row
            {"text": …} or {"file": …}, and "task" if wanted, a line.
        file: more files; the same as bare words.
        input: a file of rows as JSON lines, whatever its name; TNEWS's {"id": …, "sentence": …}
            are read too, with "keywords" where the model was trained with them. Rows that cannot
            be used are told and left out; only where none can, it is an error.
        format: of ``output``: ``jsonl`` has all that is known of each prediction, ``clue`` the
            lines that CLUE expects of TNEWS, {"id": 2, "label": "107", "label_desc": "news_car"},
            one for an empty sentence, too.
        text: a text.
        task: by default the task that reads such an input.
        model: a registry address, a run's name, id or folder, a checkpoint, or a saved model.
        data: prepared corpora; needed for a checkpoint only.
        top: how many alternatives.
        output: write the predictions to this file as well, a line each.
        precision: auto, bf16, fp32 or fp64.
        tracking_uri: MLflow tracking URI; by default as in training.
    """

    files: list[str] = positional([])
    file: list[str] = field(default_factory=list)
    input: str | None = None
    format: Literal["jsonl", "clue"] = "jsonl"
    text: str | None = None
    task: str | None = None
    model: str = "models:/skillnet@champion"
    data: str | None = None
    top: int = 5
    output: str | None = None
    precision: str = "auto"
    tracking_uri: str | None = None

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UserError(f"top must be at least 1, got {self.top}")
        if self.format == "clue" and (not self.input or self.files or self.file or self.text):
            raise UserError(
                "--format clue is for one test file: give --input test.json and nothing else"
            )
        if not self.files and not self.file and self.text is None and self.input is None:
            raise UserError(
                "nothing to predict for: give --text TEXT, or files "
                "(recordings, pictures, clips, .py, .txt, .jsonl)"
            )


def predict_files(config: PredictConfig) -> "list[TaskPrediction]":
    """Predictions in the order of the inputs, the text first; see :func:`predict_rows`."""
    return [prediction for _, prediction in predict_rows(config)]


def predict_rows(config: PredictConfig) -> "list[tuple[InputRow, TaskPrediction]]":
    """What was given and its prediction, in the order of the inputs, the text first.

    Rows of a file that cannot be used are told and left out.

    Raises:
        UserError: no such model or file, an input of the command line that cannot be read, or a
            file whose rows all cannot; names it.
    """
    from pipelines.runs import model_source
    from pipelines.serving.bundle import open_predictor
    from pipelines.serving.inputs import InputRow, check_usable_rows, report_rejected

    given = gather_inputs(config)
    source = model_source.resolve_model(config.model, config.tracking_uri)
    data = place(config.data, data_root())
    predictor = open_predictor(source, data, config.precision)
    whole = [row for row in given if not row.reason]
    aside: dict[int, str] = {}

    def leave_out(number: int, why: str) -> None:
        where = whole[number].where
        if not where:  # it was named itself, and does not stand in a file of many
            raise UserError(why)
        aside[number] = why.removeprefix(f"{where}: ")

    made = predictor.predict([row.item for row in whole if row.item], config.top, leave_out)
    bad = [replace(whole[number], item=None, reason=why) for number, why in aside.items()]
    good = [row for number, row in enumerate(whole) if number not in aside]
    bad += [row for row in given if row.reason]
    check_usable_rows([row for row in (*bad, *good) if row.where])
    report_rejected([*bad, *good])
    # A file of functions has several predictions; a text has one.
    pairs = good if len(good) == len(made) else [InputRow("", {})] * len(made)
    return list(zip(pairs, made, strict=True))


def gather_inputs(config: PredictConfig) -> "list[InputRow]":
    """All inputs of a command line.

    Raises:
        UserError: a file that is missing, empty or damaged.
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


def clue_lines(answers: "list[tuple[InputRow, TaskPrediction]]") -> list[dict[str, Any]]:
    """What CLUE's evaluation expects of TNEWS: id, label and its description, of every line.

    Raises:
        UserError: classes that are not named as the reader ``tnews`` names them.
    """
    made = []
    for given, prediction in answers:
        code, _, description = prediction.answer.partition(" ")
        if not code.isdigit() or not description:
            raise UserError(
                f"--format clue: the class {prediction.answer!r} is none of TNEWS's; the model has "
                "to be trained on a corpus that was prepared with --corpus tnews=PATH"
            )
        made.append({"id": given.row["id"], "label": code, "label_desc": description})
    return made


def print_tables(predictions: "list[TaskPrediction]") -> None:
    """Print predictions, a table per task."""
    for task in dict.fromkeys(p.task for p in predictions):
        rows = []
        for p in predictions:
            if p.task != task:
                continue
            answer, score = (
                p.answer or f"(a vector of {len(p.embedding)} numbers)",
                f"{p.score:.3f}",
            )
            others = "\n".join(f"{_short(n, 32)} {v:.3f}" for n, v in p.alternatives[1:])
            rows.append([_short(p.input), answer, score if p.answer else "–", others])
        console.table(task, ["input", "answer", "score", "then"], rows)
        if any(not p.answer and p.task == task and p.embedding for p in predictions):
            console.note(f'to rank what a text stands for: skillnet search "…" --task {task}')


def show_predictions(
    predictions: "list[TaskPrediction]", lines: list[dict[str, Any]], config: PredictConfig
) -> None:
    """Print predictions as tables, or in CLUE's format."""
    if config.format == "clue" and config.output:
        console.note(f"{len(lines)} predictions in {config.output}")
    elif config.format == "clue":
        print("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    else:
        print_tables(predictions)


def _plain(prediction: "TaskPrediction") -> dict[str, Any]:
    values = asdict(prediction)
    values["alternatives"] = [
        {"answer": name, "score": score} for name, score in prediction.alternatives
    ]
    if not prediction.answer:
        values["score"] = None
    return values


def _short(text: str, longest: int = 48) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


@command(
    PredictConfig,
    description="Class of a text, transcript of a recording, known captions nearest to a "
    "picture, a clip or the functions of a Python file.",
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
    answers = predict_rows(config)
    predictions = [prediction for _, prediction in answers]
    lines: list[dict[str, Any]] = [_plain(prediction) for prediction in predictions]
    if config.format == "clue":
        lines = clue_lines(answers)
    if config.output:
        with atomic_write(config.output, "w") as stream:
            for line in lines:
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    return predictions, lines, config


if __name__ == "__main__":
    raise SystemExit(main())
