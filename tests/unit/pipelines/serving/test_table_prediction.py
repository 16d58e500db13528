"""Predictions of tables: what `prepare` reads comes in, and its columns with the answers go out."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import predict
from pipelines.serving import bundle, table_prediction
from skillnet import SkillNet
from skillnet_platform.errors import UserError
from tests.helpers.file_forms import draw_png
from tests.helpers.readable_corpora import SUBJECTS
from tests.helpers.served_place import ServedPlace

TEXTS = [f"{subject}研究" for subject in SUBJECTS]
TEXT = "text_classification"


@pytest.fixture
def model(place: ServedPlace, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(bundle, "open_predictor", lambda *_: place.predictor)
    return str(place.bundle)


@pytest.fixture(scope="module")
def direct(place: ServedPlace) -> list[str]:
    """Answers of the texts, asked without a table."""
    return [each.answer for each in SkillNet.from_pretrained(place.bundle).classify(TEXTS, TEXT)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format of the suffix; JSON lines by default."""
    frame = pd.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return list(pq.read_table(path).to_pylist())
    if path.suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(model: str, rows: Path, out: Path, *words: str) -> int:
    return int(
        predict.main(
            ["--input", str(rows), "--output", str(out), "--model", model, "--task", TEXT, *words]
        )
    )


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "json", "jsonl", "txt"])
def test_answers_follow_the_columns_of_the_input_in_its_format(
    model: str, direct: list[str], tmp_path: Path, kind: str
) -> None:
    given = [{"text": text, "n": n, "note": 'a "b", c'} for n, text in enumerate(TEXTS)]
    rows, out = write_rows(tmp_path / f"rows.{kind}", given), tmp_path / f"out.{kind}"
    assert run(model, rows, out, "--block_rows", "4") == 0
    found = read_rows(out)
    names = ["text", "n", "note", "line", "task", "answer", "score", "confidence"]
    as_text = kind in ("csv", "tsv")
    if kind in ("csv", "tsv", "parquet"):
        names.insert(4, "input")
    assert [*found[0]] == names
    assert [each["answer"] for each in found] == direct
    assert [each["text"] for each in found] == TEXTS
    assert [each["n"] for each in found] == [str(n) if as_text else n for n in range(len(TEXTS))]
    assert {each["note"] for each in found} == {'a "b", c'}
    first = 2 if as_text else 1
    assert [int(each["line"]) for each in found] == [*range(first, first + len(TEXTS))]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([rows.name, out.name])


def test_the_suffix_of_the_output_chooses_another_format(model: str, tmp_path: Path) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"text": TEXTS[0], "tags": ["a"]}, {"text": "x", "n": 1.5}]
    )
    for kind in ("csv", "parquet"):
        assert run(model, rows, tmp_path / f"out.{kind}", "--top", "2") == 0
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.field("n").type == pa.float64()
    assert table["tags"].to_pylist() == [["a"], None]
    first, second = read_rows(tmp_path / "out.csv")
    assert (first["tags"], first["n"], second["n"]) == ('["a"]', "", "1.5")
    assert json.loads(first["alternatives"]) == table["alternatives"][0].as_py()
    mixed = write_rows(tmp_path / "mixed.jsonl", [{"text": "x", "n": 1}, {"text": "x", "n": "a"}])
    assert run(model, mixed, tmp_path / "mixed.jsonl.out") == 0
    assert run(model, mixed, tmp_path / "mixed.parquet") == 2
    assert not (tmp_path / "mixed.parquet").exists()


def test_types_of_a_parquet_file_are_kept(model: str, tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(TEXTS[:2], pa.large_string()),
            "when": pa.array([0, 1], pa.timestamp("us", "UTC")),
            "small": pa.array([1, None], pa.int8()),
            "score": pa.array([0.5, 1.5], pa.float32()),
            "task": pa.array([TEXT, None]),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    assert run(model, tmp_path / "rows.parquet", tmp_path / "out.parquet") == 0
    found = pq.read_table(tmp_path / "out.parquet")
    for name in ("text", "when", "small"):
        assert found.schema.field(name).type == table.schema.field(name).type
        assert found[name].to_pylist() == table[name].to_pylist()
    # A prediction has a score, too.
    assert found["input_score"].to_pylist() == [0.5, 1.5]
    assert found["task"].to_pylist() == [TEXT, TEXT]


def test_bad_rows_are_listed_by_line_and_counted(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = tmp_path / "rows.csv", tmp_path / "out.csv"
    rows.write_text(f"id,text\n1,{TEXTS[0]}\n2,a,b\n3,  \n4,{TEXTS[1]}\n", encoding="utf-8")
    assert run(model, rows, out) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "line 3: a different number of fields than the header; row skipped" in said
    assert f"2 predictions ({TEXT} 2) in {out}" in said
    assert f"2 rejected rows in {tmp_path / 'out.rejected.jsonl'}" in said
    assert [each["id"] for each in read_rows(out)] == ["1", "4"]
    rejected = read_rows(tmp_path / "out.rejected.jsonl")
    assert [(each["line"], each.get("id"), each["reason"][:20]) for each in rejected] == [
        (3, None, "a different number o"),
        (4, "3", "the text is empty"),
    ]
    # The list of an earlier command would describe other predictions.
    rows.write_text(f"id,text\n1,{TEXTS[0]}\n", encoding="utf-8")
    assert run(model, rows, out) == 0
    assert not (tmp_path / "out.rejected.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n,m\n1,2\n", 'line 2: expected {"text": …} or {"file": …}; none of the rows is usable'),
        ("text\n", "the file has no rows"),
        ("text\n\xff\n", "rows.csv, line 2: not UTF-8"),
        # One rejected row would stand for all that follow.
        ('text\na\n"b\nc\nd\n', "line 3: an unclosed quote from here on. Correct the file"),
    ],
)
def test_no_usable_row_leaves_no_file(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    message: str,
) -> None:
    (tmp_path / "rows.csv").write_text(content, encoding="latin-1")
    (tmp_path / "out.csv").write_text("earlier")
    assert run(model, tmp_path / "rows.csv", tmp_path / "out.csv") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "out.csv").read_text() == "earlier"
    assert not (tmp_path / "out.rejected.jsonl").exists()
    assert not [*tmp_path.glob("out.csv.parts/part-*")]


def test_columns_have_the_names_of_prepare_or_those_that_are_given(
    model: str, direct: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[0], encoding="utf-8")
    out = tmp_path / "out.csv"
    for name, value in (("Sentence ", TEXTS[0]), ("content", TEXTS[0]), ("file_name", "a.txt")):
        rows = write_rows(tmp_path / "rows.csv", [{name: value, "path": "src/x"}])
        assert run(model, rows, out) == 0
        assert [each["answer"] for each in read_rows(out)] == direct[:1]
    rows = write_rows(tmp_path / "rows.csv", [{"review": TEXTS[0], "text": TEXTS[1]}])
    assert run(model, rows, out, "--text_column", "review") == 0
    assert [each["answer"] for each in read_rows(out)] == direct[:1]
    assert run(model, rows, out, "--text_column", "reviews") == 2
    assert "no column 'reviews'; did you mean 'review'?" in capsys.readouterr().err
    # Prepare takes the medium of a row, and its text as a transcript.
    (tmp_path / "a.png").write_bytes(draw_png())
    rows = write_rows(tmp_path / "rows.jsonl", [{"file_name": "a.png", "text": "ein Herz"}])
    words = ["--input", str(rows), "--output", str(out), "--model", model]
    assert predict.main([*words, "--task", "text_to_image"]) == 0
    (found,) = read_rows(out)
    assert found["text"] == "ein Herz"
    assert len(json.loads(found["embedding"])) == 8 if not found["answer"] else found["answer"]


def test_folders_are_read_as_prepare_reads_them(
    model: str, direct: list[str], tmp_path: Path
) -> None:
    folder, out = tmp_path / "rows", tmp_path / "out.csv"
    (folder / "train").mkdir(parents=True)
    write_rows(folder / "train.csv", [{"text": text, "label": "x"} for text in TEXTS[:3]])
    write_rows(folder / "test.csv", [{"text": text} for text in TEXTS[3:5]])
    assert run(model, folder, out) == 0
    found = {(each["source"], int(each["line"])): each["answer"] for each in read_rows(out)}
    assert [found["train.csv", n] for n in (2, 3, 4)] == direct[:3]
    assert [found["test.csv", n] for n in (2, 3)] == direct[3:5]

    media = tmp_path / "media"
    for name in ("heart/a", "sun/b"):
        (media / name).parent.mkdir(parents=True)
        (media / f"{name}.png").write_bytes(draw_png())
    (media / "sun" / "torn.png").write_bytes(b"\x89PNG nonsense")
    words = ["--input", str(media), "--output", str(out), "--model", model, "--embeddings", "true"]
    assert predict.main([*words, "--task", "text_to_image"]) == 0
    rows = read_rows(out)
    assert [each["file_name"] for each in rows] == ["heart/a.png", "sun/b.png"]
    assert all(len(json.loads(each["embedding"])) == 8 for each in rows)
    (rejected,) = read_rows(tmp_path / "out.rejected.jsonl")
    assert rejected["source"] == "sun/torn.png"


def test_media_in_a_parquet_file_are_answered_and_kept(model: str, tmp_path: Path) -> None:
    media = [{"bytes": draw_png(), "path": "a.png"}, {"bytes": b"torn", "path": "b.png"}]
    pq.write_table(pa.table({"image": media, "n": [1, 2]}), tmp_path / "rows.parquet")
    words = ["--input", str(tmp_path / "rows.parquet"), "--model", model, "--task", "text_to_image"]
    assert predict.main([*words, "--output", str(tmp_path / "out.parquet")]) == 0
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["image"].to_pylist() == media[:1]
    assert predict.main([*words, "--output", str(tmp_path / "out.csv")]) == 0
    assert [each["image"] for each in read_rows(tmp_path / "out.csv")] == ["a.png"]


def test_data_frames_and_tables_are_answered_in_python(
    place: ServedPlace, direct: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = SkillNet.from_pretrained(place.bundle)
    frame = pd.DataFrame({"text": [*TEXTS[:3], " "], "n": [1, 2, 3, 4]}, index=[7, 5, 3, 1])
    found = model.predict(frame, task=TEXT)
    assert [*found.columns] == ["text", "n", "task", "answer", "score", "confidence"]
    assert ([*found.index], [*found["answer"]]) == ([7, 5, 3], direct[:3])
    assert found["n"].dtype == frame["n"].dtype
    assert "row 3: the text is empty; row skipped" in capsys.readouterr().err
    table = model.predict(pa.Table.from_pandas(frame), task=TEXT, top=2)
    assert table["answer"].to_pylist() == direct[:3]
    assert [len(each) for each in table["alternatives"].to_pylist()] == [2, 2, 2]
    rows = model.predict([{"review": text} for text in TEXTS[:3]], TEXT, text_column="review")
    assert [each["answer"] for each in rows] == direct[:3]
    picture = Image.open(io.BytesIO(draw_png()))
    rows = [
        {"image": picture},
        {"image": np.asarray(picture.convert("RGB"))},
        {"image": draw_png()},
    ]
    first, second, third = model.predict(rows, task="text_to_image", embeddings=True)
    for each in (second, third):
        np.testing.assert_allclose(each["embedding"], first["embedding"], atol=1e-5)
    with pytest.raises(ValueError, match="expected a data frame, an Arrow table, a list"):
        model.predict("rows.csv")


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_a_stopped_prediction_continues_and_its_file_is_equal_bit_for_bit(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    given: list[dict[str, Any]] = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]
    given[4]["text"] = given[11]["text"] = " "
    rows, whole, out = tmp_path / f"rows.{kind}", tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
    write_rows(rows, given)
    words = ["--block_rows", "4", "--top", "3"]
    assert run(model, rows, whole, *words) == 0
    answer_rows, asked = table_prediction.answer_rows, list[int]()

    def answer(*arguments: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(1)
        yield from answer_rows(*arguments)

    monkeypatch.setattr(table_prediction, "answer_rows", answer)
    assert run(model, rows, out, *words) == 130
    parts = tmp_path / f"b.{kind}.parts"
    assert [path.name for path in sorted(parts.iterdir())] == [
        "part-000000.jsonl",
        "part-000001.jsonl",
        "plan.json",
    ]
    assert not out.exists()
    assert not (tmp_path / "b.rejected.jsonl").exists()
    # A disk that was full leaves half a part; its block is predicted again.
    last = parts / "part-000001.jsonl"
    last.write_bytes(last.read_bytes()[:-40])
    asked.clear()
    asked.append(-9)
    monkeypatch.setattr(
        table_prediction, "answer_rows", lambda *a: (asked.append(1), answer_rows(*a))[1]
    )
    assert run(model, rows, out, *words) == 0
    assert len(asked) - 1 == 3
    assert out.read_bytes() == whole.read_bytes()
    listed = [tmp_path / f"{name}.rejected.jsonl" for name in "ab"]
    assert listed[1].read_bytes() == listed[0].read_bytes()
    assert not parts.exists()


@pytest.mark.parametrize("changed", ["row", "file", "top", "model"])
def test_parts_of_another_input_or_call_are_refused(
    model: str,
    place: ServedPlace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: str,
) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[0], encoding="utf-8")
    given = [{"text": text, "file": None} for text in TEXTS[:6]]
    given[1] = {"text": None, "file": "a.txt"}
    rows, out = write_rows(tmp_path / "rows.jsonl", given), tmp_path / "out.jsonl"
    answer_rows, asked = table_prediction.answer_rows, list[int]()

    def answer(*arguments: Any) -> Any:
        if asked:
            raise KeyboardInterrupt
        asked.append(1)
        yield from answer_rows(*arguments)

    monkeypatch.setattr(table_prediction, "answer_rows", answer)
    assert run(model, rows, out, "--block_rows", "3") == 130
    monkeypatch.setattr(table_prediction, "answer_rows", answer_rows)
    words = ["--block_rows", "3"]
    if changed == "row":
        given[0]["text"] = TEXTS[9]
        write_rows(rows, given)
    elif changed == "file":
        (tmp_path / "a.txt").write_text(TEXTS[9], encoding="utf-8")
    elif changed == "top":
        words += ["--top", "2"]
    else:
        digest = (place.predictor, "another")
        monkeypatch.setattr(table_prediction, "open_request_predictor", lambda _: digest)
    capsys.readouterr()
    assert run(model, rows, out, *words) == 2
    said = " ".join(capsys.readouterr().err.split())
    expected = {"row": "other bytes", "file": "other bytes", "top": "top differs", "model": "model"}
    assert expected[changed] in said
    assert not out.exists()


def test_memory_does_not_grow_with_the_rows(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten times as many rows take no more memory, with answers and reasons of all of them."""
    answer: Any = {"task": TEXT, "answer": "a" * 100, "score": 0.5, "confidence": 1.0}

    def answer_rows(predictor: Any, rows: Any, top: Any, layout: Any) -> Any:
        for row in rows:
            yield ([], [row]) if row.reason else ([(row, answer)], [])

    monkeypatch.setattr(table_prediction, "answer_rows", answer_rows)
    peaks = []
    for count in (1_000, 1_000, 10_000):  # the first one warms up
        rows = tmp_path / "rows.csv"
        lines = (f"{'x' * 100},{n}\n" if n % 3 else "a,b,c\n" for n in range(count))
        rows.write_text("text,n\n" + "".join(lines))
        tracemalloc.start()
        assert run(model, rows, tmp_path / "out.csv", "--block_rows", "100") == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.3 * peaks[1]


@pytest.mark.integration
def test_a_killed_command_continues_and_its_file_is_equal_bit_for_bit(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL at any time: no file, or a whole one."""
    given = [{"text": TEXTS[n % 15], "n": n} for n in range(2_000)]
    rows = write_rows(tmp_path / "rows.csv", given)
    out, parts = tmp_path / "out.csv", tmp_path / "out.csv.parts"
    command = [sys.executable, "-m", "pipelines.predict", "--model", model, "--input", str(rows)]
    command += ["--task", TEXT, "--block_rows", "32", "--output", str(out)]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        stop = time.monotonic() + 200
        while len([*parts.glob("part-*.jsonl")]) < 3 and time.monotonic() < stop:
            assert running.poll() is None
            time.sleep(0.02)
        os.kill(running.pid, signal.SIGKILL)
    finally:
        running.kill()
        running.wait()
    assert not out.exists()
    kept = len([*parts.glob("part-*.jsonl")])
    assert kept >= 3
    capsys.readouterr()
    assert run(model, rows, out, "--block_rows", "32", "--json") == 0
    assert json.loads(capsys.readouterr().out)["resumed"] >= 32 * kept
    whole = tmp_path / "whole.csv"
    assert run(model, rows, whole, "--block_rows", "32") == 0
    assert out.read_bytes() == whole.read_bytes()


def test_files_that_are_no_tables_are_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.csv", [{"text": TEXTS[0]}])
    assert run(model, rows, tmp_path / "out.csv.gz") == 2
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 nonsense")
    assert run(model, tmp_path / "torn.parquet", tmp_path / "out.csv") == 2
    assert "not a Parquet file, or a damaged one" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"only \.jsonl files are cut into blocks"):
        from pipelines.serving.batch_prediction import plan_blocks

        plan_blocks(tmp_path, 3)
