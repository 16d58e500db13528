"""Corpora whose parts are read by tasks: nothing in them shows how many parts there were."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.corpora import base, open_external_corpus
from pipelines.data.corpora.base import RejectedRow, SourceArchives, measure_texts
from pipelines.data.corpora.formats import record_reader
from pipelines.data.corpora.formats.record_reader import divide_file, read_records
from pipelines.data.io import directory
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.preprocessing import blocks, local_tasks
from pipelines.data.preprocessing import prepare as preprocessing_prepare
from pipelines.data.preprocessing.blocks import read_part
from pipelines.data.preprocessing.local_tasks import LocalTasks, needs_no_ray
from pipelines.data.preprocessing.prepare import prepare
from pipelines.data.shards import files
from skillnet_platform.errors import UserError
from tests.helpers.synthetic_corpora import Made

NONE = SourceArchives.none()


def make_row(number: int, choose: random.Random) -> dict[str, Any]:
    text = "".join(chr(0x4E00 + choose.randrange(60)) for _ in range(choose.randint(1, 30)))
    return {"text": text, "label": f"class {number % 3}", "speaker": f"s{number % 5}"}


def hostile_lines(folder: Path) -> Path:
    """Lines of which many are bad, with blank lines, both line ends, a mark, and a cut end."""
    choose = random.Random(0)  # noqa: S311
    bad = [
        b"\n\n\r\n",
        b'{"text": "broken\n',
        b'{"text": "a", "text": "b", "label": "class 1"}\n',
        b"[1]\n",
        b'{"text": "\xff", "label": "class 1"}\n',
        b'{"text": " ", "label": "class 1"}\n',
        b'{"text": "no label"}\n',
        b' {"text": "\\u000a{", "label": "class 0"}\n',
        b'{"text": "\\ud800", "label": "class 0"}\n',
    ]
    lines = [
        json.dumps(make_row(n, choose), ensure_ascii=bool(n % 2)).encode()
        + (b"\r\n" if n % 7 == 0 else b"\n")
        if n % 4
        else bad[n // 4 % len(bad)]
        for n in range(400)
    ]
    path = folder / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(lines) + b'{"text": "cut')
    return path


def row_groups(folder: Path) -> Path:
    """Row groups of several sizes, some of whose rows name a split."""
    choose = random.Random(1)  # noqa: S311
    rows = [make_row(n, choose) | {"split": ("train", "test")[n % 9 == 0]} for n in range(300)]
    path = folder / "rows.parquet"
    schema = pa.Table.from_pylist(rows).schema
    with pq.ParquetWriter(path, schema) as writer:
        for start, stop in ((0, 7), (7, 150), (150, 151), (151, 300)):
            writer.write_table(pa.Table.from_pylist(rows[start:stop], schema=schema))
    return path


def files_of_splits(folder: Path) -> Path:
    """A file of lines, one of CSV with line breaks in fields, and a compressed one."""
    import gzip

    choose = random.Random(2)  # noqa: S311
    rows = [make_row(n, choose) for n in range(120)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    fields = "".join(f'"{row["text"]}\n{row["text"]}",{row["label"]}\n' for row in rows)
    (folder / "validation.csv").write_text(f"text,label\n{fields}", encoding="utf-8")
    (folder / "test.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.iterdir() if path.name != files.VERIFIED_NOTES)
    return {path.name: path.read_bytes() for path in found}


@pytest.fixture(autouse=True)
def no_running_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of a Ray that another test started would not see what a test replaces."""
    monkeypatch.setattr(preprocessing_prepare, "needs_no_ray", lambda *given: True)


def divide_by(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(record_reader, "PART_BYTES", size)


@pytest.mark.parametrize("write", [hostile_lines, row_groups, files_of_splits])
def test_a_corpus_does_not_depend_on_the_number_of_its_parts(write, tmp_path, monkeypatch):
    """Rows, keys, numbers in messages, splits, labels, shards and the manifest are equal."""
    # Some rows are too long, and long rows fill blocks.
    monkeypatch.setattr(base, "MAX_TEXT_LENGTH", 28)
    monkeypatch.setattr(blocks, "MAX_TEXT_LENGTH", 28)
    monkeypatch.setattr(blocks, "MAX_BLOCK_CHARACTERS", 1_500)
    monkeypatch.setattr(blocks, "FRAGMENT_ROWS", 7)
    (tmp_path / "given").mkdir()
    place = f"folder:{write(tmp_path / 'given')}"
    prepared, rows, counts = [], [], []
    for size in (2**30, 3_000, 60):
        divide_by(monkeypatch, size)
        corpus = open_external_corpus("mine", place)
        corpus.shard_rows = 50
        parts = corpus.divide()
        counts.append(len(parts))
        rows.append([row for part in parts for row in part.corpus.rows(NONE)])
        assert rows[-1] == list(corpus.rows(NONE))
        data = tmp_path / str(size)
        prepare([], data, tmp_path, 1, 1, [corpus], vocabulary=600)
        tokenizer = {"tokenizer": (data / "tokenizer.json").read_bytes()}
        prepared.append(content_of(data / "mine") | tokenizer)
    assert counts == sorted(counts)
    assert counts[-1] >= (4 if write is row_groups else 7)
    assert rows.count(rows[0]) == prepared.count(prepared[0]) == len(prepared)
    named = json.loads(prepared[0]["manifest.json"])["labels"]
    assert named == ["class 0", "class 1", "class 2"]


def test_processes_prepare_what_the_driver_prepares(tmp_path, monkeypatch):
    """A script without a guard runs once, and neither it nor its processes load Ray or torch."""
    (tmp_path / "given").mkdir()
    place = f"folder:{hostile_lines(tmp_path / 'given')}"
    code = f"""
import sys
from multiprocessing import context as ctx
from pathlib import Path
from pipelines.data.corpora import open_external_corpus
from pipelines.data.corpora.formats import record_reader
from pipelines.data.preprocessing import prepare as preparing
from pipelines.data.preprocessing.prepare import prepare
print("started")
record_reader.PART_BYTES = 3_000
preparing.MAX_FIRST_ROWS = 100
corpus = open_external_corpus("mine", {place!r})
assert len(corpus.divide()) > 3
where = Path({str(tmp_path)!r})
starts = []
start, process = ctx.SpawnProcess.start, ctx.SpawnProcess
process.start = lambda self: (starts.append(1), start(self))[1]
prepare([], where / "apart", where, 2, 1, [corpus], vocabulary=600)
assert not set(sys.modules) & {{"ray", "torch"}}
assert "concurrent.futures.process" in sys.modules and starts == [1, 1]
"""
    script = tmp_path / "script.py"
    script.write_text(code, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.count("started")) == (0, 1), done.stderr
    corpus = open_external_corpus("mine", place)
    prepare([], tmp_path / "alone", tmp_path, 1, 1, [corpus], vocabulary=600)
    assert content_of(tmp_path / "apart" / "mine") == content_of(tmp_path / "alone" / "mine")


def test_a_process_that_always_dies_ends_the_run_with_one_message(monkeypatch):
    monkeypatch.setattr(local_tasks, "MAX_ENDS", 2)
    with LocalTasks(2) as tasks:
        started = tasks.readers().submit(os._exit, 1)
        with pytest.raises(UserError, match="processes that prepare rows ended 2 times"):
            started.result()


@pytest.mark.parametrize("limit", ["MAX_LINE_BYTES", "MAX_EMPTY_LINES"])
def test_parts_after_the_end_of_a_truncated_file_are_not_read(limit, tmp_path, monkeypatch):
    choose = random.Random(3)  # noqa: S311
    lines = [json.dumps(make_row(n, choose)) + "\n" for n in range(90)]
    lines[40] = json.dumps({"text": "x" * 5_000}) + "\n" if limit == "MAX_LINE_BYTES" else "\n" * 99
    (tmp_path / "train.jsonl").write_text("".join(lines))
    (tmp_path / "test.jsonl").write_text("".join(lines[:9]))
    monkeypatch.setattr(directory, limit, 1_000 if limit == "MAX_LINE_BYTES" else 20)
    contents = []
    for size in (2**30, 500):
        divide_by(monkeypatch, size)
        corpus = open_external_corpus("mine", f"folder:{tmp_path}")
        data = tmp_path.with_name(f"{tmp_path.name}-{size}")
        prepare([], data, tmp_path, 1, 1, [corpus], vocabulary=600)
        contents.append(content_of(data / "mine"))
    assert contents[0] == contents[1]
    manifest = json.loads(contents[0]["manifest.json"])
    assert list(manifest["truncated_files"]) == ["train.jsonl"]
    assert manifest["rows_in"] == 40 + 1 + 9


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", b'{"a": 1}\n' * 100, 10),
        ("a.jsonl", b'{"a": 1}\r\n' * 100, 12),
        ("a.jsonl", b"", 1),
        # The end of the last line is unknown, and no line begins with a brace.
        ("a.jsonl", b' {"a": 1}\n' * 100, 1),
        ("a.json", b'[{"a": 1},\n{"a": 2}]' + b"\n" * 200, 0),
        ("a.json", b'{\n"a": 1}\n' * 30, 0),
        ("a.jsonl", '{"a": "中文的句子"}\n'.encode("gb18030") * 30, 0),
        ("a.csv", b"a\n1\n", 1),
        ("a.csv", b"a\n" + b"1\n" * 200, 0),
        ("a.jsonl.gz", b"", 0),
        ("a.parquet", b"PAR1 damaged", 0),
    ],
)
def test_only_files_with_known_ends_of_rows_are_divided(
    name, content, parts, tmp_path, monkeypatch
):
    divide_by(monkeypatch, 90)
    (tmp_path / name).write_bytes(content)
    source = SourceDirectory(str(tmp_path))
    found = divide_file(source, name)
    assert len(found) == parts
    if parts:
        divided = [each for part in found for each in read_records(source, name, part)]
        assert divided == list(read_records(source, name))


def test_a_file_with_a_part_beyond_memory_is_read_whole(tmp_path, monkeypatch):
    divide_by(monkeypatch, 90)
    monkeypatch.setattr(record_reader, "MAX_PART_BYTES", 1_000)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' * 50 + b' {"a": 1}\n' * 200)
    pq.write_table(pa.table({"a": list(range(5_000))}), tmp_path / "a.parquet")
    source = SourceDirectory(str(tmp_path))
    assert not divide_file(source, "a.jsonl")
    assert not divide_file(source, "a.parquet")


@pytest.mark.parametrize("name", [os.fsdecode(b"\xff.jsonl"), f"{'z' * 240}/{'z' * 240}.jsonl"])
def test_keys_that_can_repeat_are_compared(name: str, tmp_path: Path) -> None:
    """A file name that a key escapes or shortens could be that of another file."""
    corpus: Any = open_external_corpus("mine", f"folder:{files_of_splits(tmp_path)}")
    assert corpus.divide()
    corpus.tables[0] = type(corpus.tables[0])("train", name)
    assert not corpus.divide()


def test_texts_are_measured_alike_by_rows_and_by_columns() -> None:
    rows = [
        {"key": "a", "text": "长x", "captions": ["", "abc"], "row": 3},
        {"key": "é", "text": None, "captions": []},
        {"key": "b", "captions": None},
        {"key": "", "text": "abcd", "captions": ["长"]},
    ]
    schema = pa.schema([("key", pa.string()), ("text", pa.string()), ("row", pa.int64())])
    schema = schema.append(pa.field("captions", pa.list_(pa.string())))
    table = pa.Table.from_pylist(rows, schema=schema)
    expected = [measure_texts(row)[0] for row in rows]
    assert blocks._count_characters(table).tolist() == expected == [6, 1, 1, 5]
    assert blocks._count_characters(table.slice(1, 2)).tolist() == expected[1:3]


def test_media_keep_one_reader(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "b"}\n')
    assert not open_external_corpus("mine", f"folder:{tmp_path}").divide()


def test_ray_prepares_media_stores_and_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pictures(Made):
        modality = "image"

    monkeypatch.delitem(local_tasks.sys.modules, "ray", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert needs_no_ray([Made()], None)
    assert not needs_no_ray([Made(), Pictures()], None)
    with monkeypatch.context() as absent:
        absent.setattr(local_tasks.importlib.util, "find_spec", lambda name: None)
        assert needs_no_ray([Pictures()], None)
    assert not needs_no_ray([Made()], "s3://bucket/corpora")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not needs_no_ray([Made()], None)


def test_a_part_reports_rejected_rows_with_their_place(tmp_path, monkeypatch):
    divide_by(monkeypatch, 200)
    corpus = open_external_corpus("mine", f"folder:{hostile_lines(tmp_path)}")
    rejected = [row for row in corpus.rows(NONE) if isinstance(row, RejectedRow)]
    divided = [
        row
        for part in corpus.divide()
        for fragment in read_part(part.corpus, NONE)
        for row in fragment.rejected
    ]
    assert divided == rejected
    assert len({row.row for row in divided}) == len(divided) > 50
