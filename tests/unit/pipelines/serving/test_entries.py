"""Every entry gives the same answer to a request, and the same sentence to a wrong one.

One table of requests, one column per entry: a file of rows and single inputs of the command line,
blocks of a folder, HTTP, MLflow, and the methods of a model in Python.
"""

import base64
import io
import json
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipelines import predict
from pipelines.data.transforms.decode_guard import WorkBudget
from pipelines.serving import bundle
from pipelines.serving.batch_prediction import BatchRequest, BlockPredictor, plan_blocks
from pipelines.serving.inputs import parse_request_row
from pipelines.serving.mlflow_model import SkillNetModel
from skillnet import SkillNet
from skillnet.router import RoutedInput
from skillnet_corpora.demo.strokes import draw_pen_paths
from skillnet_platform.errors import UserError
from skillnet_serving.server.config import ServeConfig, ServerLimits
from skillnet_serving.server.request_rows import PredictionRequest
from skillnet_serving.server.served_model import ServedModel
from tests.helpers.file_forms import draw_png
from tests.helpers.local_server import run_service
from tests.helpers.readable_corpora import STROKES
from tests.helpers.served_place import TASKS, ServedPlace
from tests.helpers.sound_files import encode_tone
from tests.helpers.video_files import encode_video

CODE = b"def send(message):\n    return client.post(message)\n"
#: Two functions: one row with two answers.
CODES = CODE + b"\n\ndef add(a, b):\n    return a + b\n"
FILES: dict[str, Callable[[], bytes]] = {
    "a.png": draw_png,
    "a.mp3": encode_tone,
    "a.mp4": lambda: encode_video(draw_pen_paths([STROKES["横"]])),
    "a.py": lambda: CODE,
    "two.py": lambda: CODES,
    "a.txt": lambda: "历史研究".encode(),
    "torn.png": lambda: b"\x89PNG\r\n\x1a\nnonsense",
    "empty.png": lambda: b"",
    "none.py": lambda: b"x = 1\n",
    "a.xyz": lambda: b"nonsense",
    "gbk.txt": lambda: "历史".encode("gbk"),
}
COMMAND, FILE, BLOCKS, HTTP, MLFLOW, PYTHON = "command file blocks http mlflow python".split()  # noqa: SIM905
CSV, PARQUET, LIST = "csv", "parquet", "list"
#: Entries of rows, which may hold anything; a command line and Python have no such row.
ROWS = (FILE, BLOCKS, HTTP, MLFLOW, LIST)
#: Entries of tables, whose columns have one kind of values.
TABLES = (CSV, PARQUET)


@dataclass(frozen=True)
class Request:
    """A row, and what each entry answers: the task that runs, or the reason of a refusal.

    Args:
        row: with a text, or with the name of one of ``FILES``.
        expected: tasks, or start of the reason.
        method: call on a model in Python; None if no method can ask this.
        entries: that can ask it.
    """

    row: Any
    expected: str
    method: str | None = None
    entries: tuple[str, ...] = (COMMAND, *ROWS, *TABLES)


TEXT, IMAGE, CLIP, *_, RETRIEVAL = TASKS
REQUESTS = {
    "text": Request({"text": "历史研究"}, TEXT, "classify"),
    "text of a task": Request({"text": "数学教程", "task": TEXT}, TEXT, "classify"),
    "text file": Request({"file": "a.txt"}, TEXT, "classify"),
    "query": Request({"text": "红色", "task": RETRIEVAL}, RETRIEVAL, "encode_text"),
    "image": Request({"file": "a.png", "task": IMAGE}, IMAGE, "classify"),
    "retrieved": Request({"file": "a.png", "task": RETRIEVAL}, RETRIEVAL, "encode_image"),
    "labels": Request({"file": "a.mp4"}, CLIP, "classify"),
    "sound": Request({"file": "a.mp3"}, "speech_recognition", "transcribe"),
    "value": Request({"file": "a.py"}, "code_regression"),
    "two functions": Request({"file": "two.py"}, "code_regression"),
    # Both tasks were trained on the same rows, so no router can tell them apart.
    "tasks of one domain": Request({"file": "a.png"}, f"{IMAGE} and {RETRIEVAL}"),
    # -- refused -----------------------------------------------------------------------------
    "no text": Request({"text": "  ", "task": TEXT}, "the text is empty", "classify"),
    "no such task": Request(
        {"text": "x", "task": "text_classificatio"}, "unknown task 'text_class", "classify"
    ),
    "torn": Request({"file": "torn.png", "task": IMAGE}, "a damaged image", "classify"),
    "empty": Request({"file": "empty.png", "task": IMAGE}, "the file is empty", "classify"),
    "not UTF-8": Request({"file": "gbk.txt", "task": TEXT}, "the text is not UTF-8", "classify"),
    "no functions": Request({"file": "none.py"}, "the file has no functions"),
    "no known type": Request({"file": "a.xyz"}, "unknown file type; use a name with one of"),
    "other medium": Request(
        {"file": "a.png", "task": "speech_recognition"},
        "speech_recognition reads sound, this is image",
    ),
    "both": Request(
        {"text": "x", "file": "a.png"}, 'expected {"text": …} or {"f', None, (*ROWS, *TABLES)
    ),
    "neither": Request({"task": TEXT}, 'expected {"text": …} or {"file": …}', None, ROWS),
    "no object": Request(7, 'expected {"text": …} or {"file": …}', None, (FILE, BLOCKS, HTTP)),
    "number": Request({"text": 3}, "text must be a string", None, ROWS),
    "list": Request({"text": "x", "task": ["y"]}, "task must be a string", None, ROWS),
    "keywords": Request({"text": "x", "keywords": 1}, "keywords must be a string", None, ROWS),
}

#: A reason, or the answers of a row as documents.
Outcome = str | list[dict[str, Any]]


@dataclass
class EntryPlace:
    """Entries to one model.

    Args:
        folder: with the files of the requests.
        model: address of the model.
        outcomes: entry -> request -> outcome of the request alone.
        joined: the same for all requests together, where an entry rejects single rows.
    """

    folder: Path
    model: str
    outcomes: dict[str, dict[str, Outcome]] = field(default_factory=dict)
    joined: dict[str, dict[str, Outcome]] = field(default_factory=dict)

    def encoded(self, row: Any) -> Any:
        """Return a row as servers take it, with the content of its file."""
        if not isinstance(row, dict) or "file" not in row:
            return row
        content = base64.b64encode((self.folder / row["file"]).read_bytes()).decode()
        return row | {"file": content, "name": row["file"]}


def sort_out(names: list[str], answers: list[Any], rejected: list[Any]) -> dict[str, Outcome]:
    """Return request -> outcome for documents with the number of their row."""
    outcomes: dict[str, Outcome] = {name: [] for name in names}
    for row, document in answers:
        outcomes[names[row]].append(document)
    return outcomes | {names[row]: reason for row, reason in rejected}


def read_lines(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def ask_file(place: EntryPlace, names: list[str], top: int) -> dict[str, Outcome]:
    rows, out = place.folder / "rows.jsonl", place.folder / "out.jsonl"
    rows.write_text("\n".join(json.dumps(REQUESTS[each].row) for each in names), encoding="utf-8")
    words = ["--input", str(rows), "--output", str(out), "--model", place.model]
    out.unlink(missing_ok=True)
    predict.main([*words, "--top", str(top), "--embeddings", "true"])
    found = [(each["line"] - 1, each) for each in read_lines(out)]
    rejected = read_lines(out.with_name("out.rejected.jsonl"))
    return sort_out(names, found, [(each["line"] - 1, each["reason"]) for each in rejected])


def ask_blocks(place: EntryPlace, names: list[str], top: int) -> dict[str, Outcome]:
    rows, out = place.folder / "rows.jsonl", place.folder / "parts"
    rows.write_text("\n".join(json.dumps(REQUESTS[each].row) for each in names), encoding="utf-8")
    request = BatchRequest(place.model, None, str(out), top=top, has_embeddings=True)
    worker = BlockPredictor(request)
    lines: list[Any] = []
    for block in plan_blocks(rows, 3).blocks:
        part = out / f"{worker.commit_block(block)['part']}.jsonl"
        lines += [*read_lines(part), *read_lines(part.with_suffix(".rejected.jsonl"))]
        part.with_suffix(".rejected.jsonl").unlink(missing_ok=True)
    found = [(each["line"] - 1, each) for each in lines if "reason" not in each]
    rejected = [(each["line"] - 1, each["reason"]) for each in lines if "reason" in each]
    return sort_out(names, found, rejected)


def ask_table(place: EntryPlace, names: list[str], top: int, kind: str) -> dict[str, Outcome]:
    """Ask with a table of another format than JSON lines, in which all rows have all columns."""
    rows, out = place.folder / f"rows.{kind}", place.folder / f"out.{kind}"
    columns = ("text", "file", "task")
    frame = pd.DataFrame([{n: REQUESTS[name].row.get(n) for n in columns} for name in names])
    frame.to_csv(rows, index=False) if kind == CSV else frame.to_parquet(rows)
    words = ["--input", str(rows), "--output", str(out), "--model", place.model]
    predict.main([*words, "--top", str(top), "--embeddings", "true", "--block_rows", "5"])
    read = pd.read_csv(out, keep_default_na=False) if kind == CSV else pd.read_parquet(out)
    documents = read.to_dict("records")
    first = 2 if kind == CSV else 1
    for each in documents:
        for key in ("alternatives", "embedding"):
            value = each.pop(key)
            value = json.loads(value or "[]") if kind == CSV else value
            each[key] = [] if value is None else [*value]
        each["score"] = float(each["score"]) if each["answer"] else None
    found = [(each["line"] - first, each) for each in documents]
    rejected = read_lines(place.folder / "out.rejected.jsonl")
    return sort_out(names, found, [(each["line"] - first, each["reason"]) for each in rejected])


def ask_list(place: EntryPlace, model: SkillNet, name: str, top: int) -> Outcome:
    row = REQUESTS[name].row
    if isinstance(row, dict) and "file" in row:
        row = row | {"file": str(place.folder / row["file"])}
    try:
        found = model.predict([row], top=top, embeddings=True)
    except ValueError as error:
        return str(error).removeprefix("row 0: ")
    return [dict(each) for each in found]


def ask_command(place: EntryPlace, name: str, top: int) -> Outcome:
    row = REQUESTS[name].row
    given = {"text": row["text"]} if "text" in row else {"files": [str(place.folder / row["file"])]}
    try:
        config = predict.PredictConfig(**given, task=row.get("task"), model=place.model, top=top)
        return predict.predict_rows(config).list_documents()
    except UserError as error:
        where = given.get("files", ["--text"])[0]
        return str(error).removeprefix(f"{where}: ")


def ask_mlflow(place: EntryPlace, names: list[str], top: int) -> Outcome:
    model = SkillNetModel()
    context: Any = types.SimpleNamespace(artifacts={"bundle": place.model})
    model.load_context(context)
    rows = [place.encoded(REQUESTS[each].row) for each in names]
    try:
        frame = model.predict(context, pd.DataFrame(rows), {"top": top})
    except UserError as error:
        return str(error).removeprefix("row 0: ")
    documents = frame.to_dict("records")
    for each in documents:
        pairs = zip(each["alternatives"], each.pop("scores"), strict=True)
        each["alternatives"] = [{"answer": answer, "score": score} for answer, score in pairs]
        each["score"] = each["score"] if each["answer"] else None
    return documents


def ask_python(place: EntryPlace, model: SkillNet, name: str, top: int) -> Outcome:
    request = REQUESTS[name]
    task = request.expected if request.expected in TASKS else request.row["task"]
    given = request.row.get("text") or place.folder / request.row["file"]
    options = {"task": task} | ({"top": top} if request.method == "classify" else {})
    try:
        (found,) = getattr(model, request.method or "")([given], **options)
    except ValueError as error:
        return str(error).removeprefix("input 0: ").removeprefix(f"{given}: ")
    if request.method == "transcribe":
        return [{"answer": found}]
    if request.method == "classify":
        pairs = [{"answer": answer, "score": score} for answer, score in found.alternatives]
        return [{"task": found.task, "answer": found.answer, "score": found.score,
                 "alternatives": pairs}]  # fmt: skip
    return [{"task": task, "embedding": found.tolist()}]


@pytest.fixture(scope="module")
def entries(place: ServedPlace, tmp_path_factory: pytest.TempPathFactory) -> EntryPlace:
    made = EntryPlace(tmp_path_factory.mktemp("entries"), str(place.every_objective))
    for name, content in FILES.items():
        (made.folder / name).write_bytes(content())
    opened = bundle.open_bundle(made.model)
    with pytest.MonkeyPatch.context() as patch:
        # The same folder would be hashed and loaded for each request.
        patch.setattr(bundle, "open_predictor", lambda *_: opened)
        patch.setattr("pipelines.serving.mlflow_model.open_bundle", lambda _: opened)
        rows = [name for name, each in REQUESTS.items() if FILE in each.entries]
        for entry, ask in ((FILE, ask_file), (BLOCKS, ask_blocks)):
            made.joined[entry] = ask(made, rows, 3)
        made.outcomes[FILE] = made.joined[FILE]
        for kind in TABLES:
            asked = [name for name, each in REQUESTS.items() if kind in each.entries]
            made.outcomes[kind] = ask_table(made, asked, 3, kind)
        made.outcomes[BLOCKS] = {name: ask_blocks(made, [name], 3)[name] for name in rows[::4]}
        asked = [name for name, each in REQUESTS.items() if COMMAND in each.entries]
        made.outcomes[COMMAND] = {name: ask_command(made, name, 3) for name in asked}
        asked = [name for name, each in REQUESTS.items() if MLFLOW in each.entries]
        made.outcomes[MLFLOW] = {name: ask_mlflow(made, [name], 3) for name in asked}
        model = SkillNet.from_pretrained(made.model)
        asked = [name for name, each in REQUESTS.items() if each.method]
        made.outcomes[PYTHON] = {name: ask_python(made, model, name, 3) for name in asked}
        asked = [name for name, each in REQUESTS.items() if LIST in each.entries]
        made.outcomes[LIST] = {name: ask_list(made, model, name, 3) for name in asked}
        limits = ServerLimits(max_bytes=10**7, max_rows=99, max_requests=9, timeout_s=60.0)
        with run_service(ServedModel(ServeConfig(made.model, search=False)), limits) as http:
            sent = [made.encoded(REQUESTS[name].row) for name in rows]
            status, body, _ = http.ask("/v1/predict", {"rows": sent, "top": 3})
            answer = json.loads(body)
            assert status == 200
            made.joined[HTTP] = sort_out(
                rows,
                [(each["row"], each) for each in answer["predictions"]],
                [(each["row"], each["reason"]) for each in answer["rejected"]],
            )
            made.outcomes[HTTP] = {}
            for name, row in zip(rows, sent, strict=True):
                status, body, _ = http.ask("/v1/predict", {"rows": [row], "top": 3})
                answer = json.loads(body)
                error = answer.get("error", "").removeprefix("row 0: ")
                made.outcomes[HTTP][name] = answer.get("predictions") or error
                assert status == (422 if error else 200)
    return made


def assert_equal(found: Outcome, expected: Outcome, entry: str) -> None:
    """Assert that two entries agree on all that the first one reports."""
    if isinstance(expected, str) or isinstance(found, str):
        assert str(found).removesuffix("; none of the rows is usable") == expected, entry
        return
    assert len(found) == len(expected), entry
    for one, other in zip(found, expected, strict=True):
        for key in one.keys() & {"task", "answer"}:
            assert one[key] == other[key], (entry, key)
        if "score" in one:
            assert one["score"] == pytest.approx(other["score"], abs=1e-5), entry
        for key in one.keys() & {"embedding"}:
            np.testing.assert_allclose(one[key], other[key], atol=1e-5, err_msg=entry)
        if "alternatives" in one:
            names = [[each["answer"] for each in side["alternatives"]] for side in (one, other)]
            assert names[0] == names[1], entry
            scores = [[each["score"] for each in side["alternatives"]] for side in (one, other)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-5), entry


@pytest.mark.parametrize("name", REQUESTS)
def test_every_entry_answers_a_request_alike(entries: EntryPlace, name: str) -> None:
    request, expected = REQUESTS[name], entries.outcomes[FILE][name]
    tasks = request.expected.split(" and ")
    if tasks[0] in TASKS:
        assert isinstance(expected, list), expected
        assert [each["task"] for each in expected] == tasks * (2 if name == "two functions" else 1)
    else:
        assert str(expected).startswith(request.expected)
    asked = {entry for entry in entries.outcomes if name in entries.outcomes[entry]}
    assert asked >= set(request.entries) - {BLOCKS}
    assert (PYTHON in asked) == (request.method is not None)
    for entry in asked:
        assert_equal(entries.outcomes[entry][name], expected, entry)
    for entry in entries.joined:
        assert_equal(entries.joined[entry][name], expected, f"{entry}, joined")


def test_every_entry_says_that_the_router_is_unsure(entries, monkeypatch, capsys):
    opened = bundle.open_bundle(entries.model)
    doubt = "unsure between a and b; name the task"
    unsure = types.SimpleNamespace(route=lambda _: RoutedInput((), 0.4, doubt))
    monkeypatch.setattr(opened, "_find_router", lambda *_: unsure)
    monkeypatch.setattr(bundle, "open_predictor", lambda *_: opened)
    monkeypatch.setattr("pipelines.serving.mlflow_model.open_bundle", lambda _: opened)
    name = "tasks of one domain"
    served = ServedModel(ServeConfig(entries.model, search=False))
    request = PredictionRequest([parse_request_row(entries.encoded(REQUESTS[name].row), 0)])
    (answer,) = served.predict([served.read_rows(request, WorkBudget(60.0))])
    found = {
        FILE: ask_file(entries, [name, "sound"], 3)[name],
        COMMAND: ask_command(entries, name, 3),
        BLOCKS: ask_blocks(entries, [name], 3)[name],
        MLFLOW: ask_mlflow(entries, [name], 3),
        HTTP: answer["predictions"],
    }
    for entry, documents in found.items():
        (each,) = documents
        assert isinstance(each, dict), entry
        assert (each["task"], each["answer"]) == ("", doubt), entry
        assert (each["confidence"], each["score"]) == (0.4, 0.4), entry
    assert "2 predictions (unsure 1, speech_recognition 1) in" in capsys.readouterr().err
    words = [str(entries.folder / "a.png"), "--model", entries.model]
    assert predict.main(words) == 0
    assert doubt in " ".join(capsys.readouterr().out.split())


def test_a_text_of_a_list_and_a_single_one_have_one_answer(entries: EntryPlace) -> None:
    model = SkillNet.from_pretrained(entries.model)
    texts = ["历史研究", "数学教程"]
    together = model.classify(texts, task=TEXT, top=3)
    for text, made in zip(texts, together, strict=True):
        (alone,) = model.classify([text], task=TEXT, top=3)
        assert (alone.answer, made.score) == (made.answer, pytest.approx(alone.score, abs=1e-6))
    with pytest.raises(ValueError, match="expected a list of inputs, not a single str"):
        model.classify(texts[0], task=TEXT)
    picture = Image.open(io.BytesIO(draw_png()))
    (inner,) = model.classify([picture], task=IMAGE, top=3)
    assert_equal([{"answer": inner.answer, "score": inner.score}],
                 entries.outcomes[FILE]["image"], PYTHON)  # fmt: skip
