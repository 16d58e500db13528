"""Predictions in blocks: whole parts or none, resumed where they were interrupted."""

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import predict
from pipelines.data.shards.format import manifest_digest
from pipelines.serving import batch_prediction, predictor
from pipelines.serving.batch_prediction import (
    BatchRequest,
    BlockPredictor,
    plan_blocks,
    predict_blocks,
)
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from tests.helpers.readable_corpora import SUBJECTS
from tests.helpers.served_place import ServedPlace

TEXTS = [f"{subject}研究" for subject in SUBJECTS]


@pytest.fixture
def served(place: ServedPlace) -> dict[str, str]:
    return {"model": str(place.root / "saved"), "data": str(place.data)}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """15 texts, of which one is unusable, in two files with empty lines."""
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = [json.dumps({"text": text, "id": n}) for n, text in enumerate(TEXTS)]
    lines[3] = "{broken"
    (folder / "a.jsonl").write_text("\n\n".join(lines[:8]) + "\n")
    (folder / "b.jsonl").write_text("\ufeff" + "\n".join(lines[8:]))
    (folder / ".hidden").write_text("no row")
    return folder


def run_here(request: BatchRequest, blocks: list[Any]) -> Iterator[Any]:
    return map(BlockPredictor(request).commit_block, blocks)


def read_parts(folder: Path) -> list[dict[str, Any]]:
    parts = [each for each in sorted(folder.glob("part-*.jsonl")) if "rejected" not in each.name]
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


def test_blocks_cover_every_line_once(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_blocks(rows, 3)
    assert [block.rows for block in plan.blocks] == [3, 3, 2, 3, 3, 1]
    assert [block.line for block in plan.blocks[:3]] == [1, 6, 12]
    assert plan_blocks(rows, 3) == plan
    (rows / "b.jsonl").write_text("{}")
    assert plan_blocks(rows, 3).digest != plan.digest
    with pytest.raises(UserError, match="no such file or folder"):
        plan_blocks(rows / "none", 3)
    monkeypatch.setattr("pipelines.data.io.directory.MAX_LINE_BYTES", 9)
    with pytest.raises(
        UserError, match=r"a\.jsonl: a line longer than 64 MiB\. Give a file of JSON"
    ):
        plan_blocks(rows, 3)


def test_parts_equal_a_prediction_at_once_and_name_every_row(served, rows, tmp_path, monkeypatch):
    request = BatchRequest(**served, output=str(tmp_path / "out"))

    done: list[int] = []
    allowed = 2

    def run(request: BatchRequest, blocks: list[Any]) -> Iterator[Any]:
        worker = BlockPredictor(request)
        for block in blocks:
            if len(done) == allowed:
                raise KeyboardInterrupt
            done.append(block.index)
            yield worker.commit_block(block)

    monkeypatch.setattr(batch_prediction, "_run", run)
    with pytest.raises(KeyboardInterrupt):
        predict_blocks(request, rows, 3)
    assert not (tmp_path / "out" / "summary.json").exists()
    # A part without its record was not committed.
    (tmp_path / "out" / "part-000002.jsonl").write_text("half of a li")
    done, allowed = [], 99
    summary = predict_blocks(request, rows, 3)
    assert done == [2, 3, 4, 5], "finished blocks are not repeated"
    assert (summary.resumed, summary.predictions, summary.rejected) == (2, 14, 1)

    found = read_parts(tmp_path / "out")
    assert [each["id"] for each in found] == [n for n in range(15) if n != 3]
    assert [each["line"] for each in found if each["source"].endswith("a.jsonl")] == [
        2 * n + 1 for n in range(8) if n != 3
    ]
    (rejected,) = (tmp_path / "out").glob("*.rejected.jsonl")
    (line,) = map(json.loads, rejected.read_text().splitlines())
    assert (line["line"], line["reason"][:8]) == (7, "not JSON")
    at_once = predict.predict_rows(
        predict.PredictConfig(
            input=str(rows / "a.jsonl"), model=served["model"], data=served["data"]
        )
    )
    assert [p.answer for _, p in at_once.answered] == [each["answer"] for each in found[:7]]
    document = json.loads((tmp_path / "out" / "summary.json").read_text())
    for part in document["parts"]:
        data = (tmp_path / "out" / f"{part['part']}.jsonl").read_bytes()
        assert hashlib.sha256(data).hexdigest() == part["sha256"]


def test_an_output_of_another_call_is_kept(served, rows, tmp_path):
    request = BatchRequest(**served, output=str(tmp_path / "out"))
    assert predict_blocks(request, rows / "a.jsonl", 100).predictions == 7
    again = predict_blocks(request, rows / "a.jsonl", 100)
    assert (again.resumed, again.predictions) == (1, 7)
    before = read_parts(tmp_path / "out")
    with pytest.raises(UserError, match=r"input differs\). Choose another"):
        predict_blocks(request, rows / "b.jsonl", 100)
    assert read_parts(tmp_path / "out") == before


@pytest.mark.parametrize("exchanged", ["text", "medium", "listed", "missing", "corpus", "open"])
def test_an_exchanged_input_of_a_done_block_is_refused(served, tmp_path, monkeypatch, exchanged):
    """Names and sizes stay equal: only the bytes differ."""
    folder, code = tmp_path / "rows", "def {}(file):\n    return client.{}(file)\n"
    (folder / ".m").mkdir(parents=True)
    lines = ['{"text": "历史研究"}', '{"file": ".m/b.py"}', '{"file": ".m/none.py"}']
    (folder / "a.jsonl").write_text("\n".join([*lines, '{"text": "数学研究"}']), encoding="utf-8")
    (folder / "c.py").write_text(code.format("read", "read"))
    (folder / ".m" / "b.py").write_text(code.format("read", "read"))
    data = shutil.copytree(served["data"], tmp_path / "corpora")
    request = BatchRequest(served["model"], str(data), str(tmp_path / "out"))
    left = {"open": 1, "medium": 3}.get(exchanged, 2)

    def run(request: BatchRequest, blocks: list[Any]) -> Iterator[Any]:
        for number, block in enumerate(blocks):
            if number == left:
                raise KeyboardInterrupt
            yield BlockPredictor(request).commit_block(block)

    monkeypatch.setattr(batch_prediction, "_run", run)
    with contextlib.suppress(KeyboardInterrupt):
        predict_blocks(request, folder, 3)
    if exchanged == "text":
        path = folder / "a.jsonl"
        path.write_text(path.read_text("utf-8").replace("历史", "化学"), encoding="utf-8")
    elif exchanged == "medium":
        (folder / "c.py").write_text(code.format("send", "send"))
    elif exchanged == "listed":
        (folder / ".m" / "b.py").write_text(code.format("send", "send"))
    elif exchanged == "missing":
        (folder / ".m" / "none.py").write_text(code.format("send", "send"))
    elif exchanged == "corpus":
        path = data / "functions" / "manifest.json"
        manifest = json.loads(path.read_text("utf-8")) | {"preprocessing": {"code_tokens": 5}}
        path.write_text(json.dumps(manifest | {"digest": manifest_digest(manifest)}), "utf-8")
    else:
        path = folder / "a.jsonl"
        path.write_text(path.read_text("utf-8").replace("数学", "化学"), encoding="utf-8")
        left = 9
        assert predict_blocks(request, folder, 3).resumed == 1
        return
    before = read_parts(tmp_path / "out")
    with pytest.raises(UserError, match=r"Choose another --output"):
        predict_blocks(request, folder, 3)
    assert read_parts(tmp_path / "out") == before


def test_media_files_are_rows_and_bad_ones_are_rejected(served, tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    code = 'def read_file(file):\n    """读取文件"""\n    return client.read(file)\n'
    (folder / "a.py").write_text(code)
    (folder / "b.png").write_bytes(b"\x89PNG broken")
    (folder / "c.txt").touch()
    (folder / "rows.jsonl").write_text('{"file": "a.py"}\n{"file": "none.py"}\n')
    request = BatchRequest(**served, output=str(tmp_path / "out"))
    words = ["--input", str(folder), "--output", str(tmp_path / "out"), "--json"]
    words += ["--embeddings", "true"]
    words += ["--model", served["model"], "--data", served["data"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_prediction, "_run", run_here)
        assert predict.main(words) == 0
    assert request.output == str(tmp_path / "out")
    found = read_parts(tmp_path / "out")
    assert [each["task"] for each in found] == ["text_to_code"] * 2
    assert len(found[0]["embedding"]) == 8
    rejected = [
        json.loads(line)
        for part in sorted((tmp_path / "out").glob("*.rejected.jsonl"))
        for line in part.read_text().splitlines()
    ]
    assert [Path(each["source"]).name for each in rejected] == ["rows.jsonl", "b.png", "c.txt"]


def test_memory_does_not_grow_with_the_input(served, tmp_path, monkeypatch):
    """A block of many files holds the bytes of a few at a time, and nothing after its end."""
    monkeypatch.setattr(predictor, "CHUNK_BYTES", 2**20)
    draw = np.random.default_rng(0)
    for count in (12, 36):
        (tmp_path / f"{count}").mkdir()
        for number in range(count):
            pixels = draw.integers(0, 256, (256, 256, 3), np.uint8)  # 200 KB as PNG
            Image.fromarray(pixels).save(tmp_path / f"{count}" / f"{number}.png")
    request = BatchRequest(**served, output=str(tmp_path / "out"))
    worker = BlockPredictor(request)
    peaks = []
    for count in (12, 12, 36):  # the first one warms up
        (block,) = plan_blocks(tmp_path / f"{count}", 100).blocks
        tracemalloc.start()
        assert worker.commit_block(block)["predictions"] == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 2**20 < peaks[2] < 1.25 * peaks[1]


def test_a_prediction_in_blocks_needs_one_input_and_an_output(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --output"):
        predict.PredictConfig(input=str(tmp_path))
    with pytest.raises(UserError, match="one --input"):
        predict.PredictConfig(["a.png"], input=str(tmp_path), output="out")


@pytest.mark.integration
def test_input_and_output_may_be_in_a_store(served, rows, object_store):
    for path in rows.glob("*.jsonl"):
        directories.put_file(path, f"{object_store.uri}/rows/{path.name}")
    output = f"{object_store.uri}/predictions"
    request = BatchRequest(**served, output=output)
    summary = predict_blocks(request, f"{object_store.uri}/rows/a.jsonl", 100)
    assert (summary.predictions, summary.rejected) == (7, 1)
    names = {entry.name for entry in directories.list_files(output)}
    assert {"plan.json", "part-000000.jsonl", "done/part-000000.json", "summary.json"} <= names
    assert predict_blocks(request, f"{object_store.uri}/rows/a.jsonl", 100).resumed == 1


@pytest.mark.integration
@pytest.mark.slow("test_batch_prediction.py::test_input_and_output_may_be_in_a_store")
def test_ray_data_predicts_from_a_store_into_a_store(served, rows, object_store):
    for path in rows.glob("*.jsonl"):
        directories.put_file(path, f"{object_store.uri}/rows/{path.name}")
    output = f"{object_store.uri}/predictions"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_prediction, "_run", run_here)
        predict_blocks(BatchRequest(**served, output=output), f"{object_store.uri}/rows", 4)
    parts = [directories.read_bytes(f"{output}/part-{n:06d}.jsonl") for n in range(4)]
    # Two blocks lose their commits, as if the call had been killed before them.
    for number in (1, 3):
        directories.write_bytes(f"{output}/part-{number:06d}.jsonl", b"half")
        directories.remove_file(f"{output}/done/part-{number:06d}.json")
    words = ["--input", f"{object_store.uri}/rows", "--output", output, "--block_rows", "4"]
    words += ["--model", served["model"], "--data", served["data"], "--json"]
    # A Ray of its own: its workers find the store by the environment.
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.predict", *words],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["blocks"], found["predictions"], found["rejected"]) == (4, 14, 1)
    assert found["resumed"] == 2
    again = [directories.read_bytes(f"{output}/part-{n:06d}.jsonl") for n in range(4)]
    assert again == parts
    found = [json.loads(line)["id"] for part in parts for line in part.decode().splitlines()]
    assert found == [n for n in range(15) if n != 3]
