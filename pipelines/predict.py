"""``skillnet predict``: a trained model on texts and files."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import parse, positional
from skillnet_platform.errors import UserError
from skillnet_platform.places import place
from skillnet_platform.storage import atomic_write, data_root

if TYPE_CHECKING:
    from pipelines.predictor import Item, Prediction

ROWS = (".jsonl", ".ndjson")


@dataclass
class PredictConfig:
    """Predict for texts and files.

    Args:
        files: recordings, pictures, clips, Python files, texts (.txt), or .jsonl with a row
            {"text": …} or {"file": …}, and "task" if wanted, a line.
        file: more files; the same as bare words.
        input: a file of rows as JSON lines, whatever its name; TNEWS's {"id": …, "sentence": …}
            are read too, with "keywords" where the model was trained with them.
        format: of ``output``: ``jsonl`` has all that is known of each prediction, ``clue`` the
            lines that CLUE expects of TNEWS, {"id": 2, "label": "107", "label_desc": "news_car"}.
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
    input: Optional[str] = None  # noqa: UP045
    format: Literal["jsonl", "clue"] = "jsonl"
    text: Optional[str] = None  # noqa: UP045
    task: Optional[str] = None  # noqa: UP045
    model: str = "models:/skillnet@champion"
    data: Optional[str] = None  # noqa: UP045
    top: int = 5
    output: Optional[str] = None  # noqa: UP045
    precision: str = "auto"
    tracking_uri: Optional[str] = None  # noqa: UP045

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


def predict(config: PredictConfig) -> "list[Prediction]":
    """Predictions in the order of the inputs, the text first.

    Raises:
        UserError: no such model or file, or an input that cannot be read; names it.
    """
    from pipelines import sources
    from pipelines.bundle import open_predictor

    items = gather(config)
    source = sources.find(config.model, config.tracking_uri)
    data = place(config.data, data_root())
    predictor = open_predictor(source, data, config.precision)
    return predictor.predict(items, config.top)


def gather(config: PredictConfig) -> "list[Item]":
    """All inputs of a command line.

    Raises:
        UserError: a file that is missing, empty or damaged.
    """
    from pipelines.predictor import Item, read_item

    items: list[Item] = []
    if config.text is not None:
        items.append(Item(config.text, config.text, None, config.task))
    if config.input is not None:
        items += read_rows(Path(config.input), config.task)
    for name in [*config.files, *config.file]:
        if Path(name).suffix.lower() in ROWS:
            items += read_rows(Path(name), config.task)
        else:
            items.append(read_item(name, config.task))
    return items


def read_rows(path: Path, task: str | None) -> "list[Item]":
    """Items of a .jsonl file; files named in it are looked for beside it.

    Raises:
        UserError: naming the line that is not JSON or has neither text nor file.
    """
    from pipelines.predictor import Item, read_item

    items: list[Item] = []
    for where, row in _lines(path):
        texts = [row[key] for key in ("text", "sentence") if key in row]
        if len(texts) + ("file" in row) != 1:
            raise UserError(f'{where}: expected {{"text": …}} or {{"file": …}}')
        wanted = row.get("task", task)
        if texts:
            said = row.get("keywords")
            keywords = said if isinstance(said, str) else None
            items.append(Item(str(texts[0]), str(texts[0]), None, wanted, keywords))
        else:
            items.append(read_item(path.parent / row["file"], wanted))
    return items


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(Where it stands, object) of each line that is not empty.

    Raises:
        UserError: no such file, no rows, or a line that is no JSON object; names it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as problem:
            raise UserError(f"{where}: not JSON ({problem})") from None
        if not isinstance(row, dict):
            raise UserError(f'{where}: expected {{"text": …}} or {{"file": …}}')
        rows.append((where, row))
    if not rows:
        raise UserError(f"{path}: no rows in it")
    return rows


def clue_lines(path: Path, predictions: "list[Prediction]") -> list[dict[str, Any]]:
    """What CLUE's evaluation expects of TNEWS: id, label and its description, of every line.

    Raises:
        UserError: a line without an id, or classes that are not named as the reader ``tnews``
            names them.
    """
    made = []
    for (where, row), prediction in zip(_lines(path), predictions, strict=True):
        code, _, description = prediction.answer.partition(" ")
        if not code.isdigit() or not description:
            raise UserError(
                f"--format clue: the class {prediction.answer!r} is none of TNEWS's; the model has "
                "to be trained on a corpus that was prepared with --corpus tnews=PATH"
            )
        if "id" not in row:
            raise UserError(f'{where}: no "id" in it; CLUE tells predictions apart by it')
        made.append({"id": row["id"], "label": code, "label_desc": description})
    return made


def show(predictions: "list[Prediction]") -> None:
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


@command
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``skillnet predict``."""
    config = parse(
        PredictConfig,
        argv or [],
        "skillnet predict",
        description="Class of a text, transcript of a recording, known captions nearest to a "
        "picture, a clip or the functions of a Python file.",
        example='skillnet predict --text "中国古代文学史"\n'
        "skillnet predict heart.png speech.mp3 module.py --top 3\n"
        "skillnet predict rows.jsonl --output predictions.jsonl --json\n"
        "skillnet predict --task text_classification --input test.json "
        "--output tnews_predict.json --format clue",
    )
    predictions = predict(config)
    lines: list[dict[str, Any]] = [_plain(prediction) for prediction in predictions]
    if config.format == "clue":
        lines = clue_lines(Path(str(config.input)), predictions)
    if config.output:
        with atomic_write(config.output, "w") as stream:
            for line in lines:
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    if console.json_wanted():
        console.emit_json(lines)
    elif config.format == "clue" and config.output:
        console.note(f"{len(lines)} predictions in {config.output}")
    elif config.format == "clue":
        print("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    else:
        show(predictions)
    return 0


def _plain(prediction: "Prediction") -> dict[str, Any]:
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


if __name__ == "__main__":
    raise SystemExit(main())
