"""JSON files: bad records, encodings and layouts."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.corpora import open_external_corpus
from pipelines.data.corpora.base import SourceArchives
from pipelines.data.corpora.formats.encoding import TRUNCATED_LINE, BadRecord
from pipelines.data.corpora.formats.record_reader import (
    DUPLICATE_FIELD,
    MULTILINE_JSON,
    read_json_entries,
    read_json_lines,
    read_records,
)
from pipelines.data.io import directory
from pipelines.data.io.directory import SourceDirectory
from skillnet_corpora.readers.metadata_tables import read_json_arrays

GOOD, DOUBLE = '{"a": 1, "b": {"a": 2}}', '{"a": 1, "b": [{"c": 1, "c": 2}]}'


@pytest.mark.parametrize(
    ("name", "text"),
    [("rows.jsonl", f"{GOOD}\n{DOUBLE}\n{GOOD}\n"), ("rows.json", f"[{GOOD},\n {DOUBLE}, {GOOD}]")],
)
def test_a_duplicate_field_costs_only_its_record(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = list(read_records(SourceDirectory(str(tmp_path)), name))
    good = {"a": 1, "b": {"a": 2}}
    assert found == [(1, good), (2, DUPLICATE_FIELD), (3, good)]


ROWS = [{"text": f"第{n}条新闻的标题", "label": "ab"[n % 2]} for n in range(20)]


def written(kind: str) -> str:
    """Return the rows as JSON lines, as an array, or as CSV."""
    if kind == "rows.json":
        return json.dumps(ROWS, ensure_ascii=False, indent=1)
    if kind == "rows.csv":
        return "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "gbk"])
def test_another_encoding_has_one_message(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(written(name).encode(encoding))
    ((number, broken),) = read_records(SourceDirectory(str(tmp_path)), name)
    assert (number, broken.truncates_file) == (1, True)
    said = "GB18030" if encoding == "gbk" else encoding.upper().replace("6-", "6")
    assert broken.reason.endswith(f"not UTF-8; convert it: iconv -f {said} -t UTF-8")


def test_annotations_in_another_encoding_have_one_message(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(written("rows.json").encode("gbk"))
    ((_, _, broken),) = read_json_entries(SourceDirectory(str(tmp_path)), "rows.json")
    assert broken.reason.startswith("probably GBK, not UTF-8")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_few_rows_that_are_not_utf8_cost_only_themselves(tmp_path: Path, name: str) -> None:
    good = written(name).encode().splitlines(keepends=True)
    bad = "第x条新闻的标题".encode("gbk")
    at = 1 if name.endswith(".csv") else 0
    other = b'{"text": "' + bad + b'", "label": "a"}\n' if not at else bad + b",a\n"
    (tmp_path / name).write_bytes(b"".join([*good[:at], other, *good[at:]]))
    (_, first), *rest = read_records(SourceDirectory(str(tmp_path)), name)
    assert first == BadRecord("not UTF-8")
    assert [row for _, row in rest] == ROWS


def test_zeros_of_a_crash_are_not_an_encoding(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(bytes(4096))
    assert list(read_records(SourceDirectory(str(tmp_path)), "rows.jsonl")) == [(1, TRUNCATED_LINE)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz"])
def test_an_array_is_read_in_place_of_lines(tmp_path: Path, name: str, indent: int | None) -> None:
    data = json.dumps(ROWS, indent=indent).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert list(read_json_lines(SourceDirectory(str(tmp_path)), name)) == list(
        enumerate(ROWS, start=1)
    )


def test_objects_over_several_lines_have_one_message(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(row, indent=2) for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(text)
    assert list(read_json_lines(SourceDirectory(str(tmp_path)), "rows.jsonl")) == [
        (1, MULTILINE_JSON)
    ]


def test_a_line_that_starts_with_a_bracket_is_one_bad_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("[[[[[[\n" + written("rows.jsonl"), "utf-8")
    first, *rest = read_json_lines(SourceDirectory(str(tmp_path)), "rows.jsonl")
    assert first == (1, BadRecord("not JSON"))
    assert [row for _, row in rest] == ROWS


def test_data_after_an_array_is_reported(tmp_path: Path) -> None:
    """Of two consecutive arrays the second one would be lost silently."""
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:2]) + "\n" + json.dumps(ROWS[2:]))
    *good, (number, last) = read_records(SourceDirectory(str(tmp_path)), "rows.json")
    assert [row for _, row in good] == ROWS[:2]
    assert (number, last) == (3, BadRecord("data after the end of the JSON", truncates_file=True))


def test_tnews_is_read_from_an_array(tmp_path: Path) -> None:
    rows = [{"label": "107", "sentence": row["text"]} for row in ROWS]
    for indent in (None, 2):
        (tmp_path / "train.json").write_text(json.dumps(rows, indent=indent))
        found: list[Any] = list(
            open_external_corpus("tnews", str(tmp_path)).rows(SourceArchives.none())
        )
        assert [row["text"] for row in found] == [row["text"] for row in ROWS]
        assert found[3]["key"] == "train.json:4"


@pytest.mark.parametrize("flood", [b"\0" * 5000, b"\n" * 5000, b" " * 5000])
def test_oversized_input_ends_the_file(tmp_path, monkeypatch, flood):
    """A small file can decompress to a line, or to empty lines, of any length."""
    monkeypatch.setattr(directory, "MAX_LINE_BYTES", 2000)
    monkeypatch.setattr(directory, "MAX_EMPTY_LINES", 2000)
    good = b'{"a": 1}\n'
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(good + flood + b"\n" + good))
    first, (number, broken) = read_records(SourceDirectory(str(tmp_path)), "rows.jsonl.gz")
    assert first == (1, {"a": 1})
    assert (number > 1, broken.truncates_file) == (True, True)
    assert broken.reason in ("a line longer than 64 MiB", "a flood of empty lines")


class EndlessEntry(io.RawIOBase):
    """A JSON text whose first entry is as long as somebody reads it, up to a limit.

    Attributes:
        given: bytes that were read.
    """

    def __init__(self, start: bytes, limit: int) -> None:
        self.start, self.limit, self.given = start, limit, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = (self.start + b"x" * len(buffer))[: len(buffer)] if not self.given else None
        size = min(len(buffer), self.limit - self.given)
        buffer[:size] = (data or b"x" * size)[:size]
        self.given += size
        return size


@pytest.mark.parametrize(
    ("reader", "start"), [(read_json_arrays, b'{"images": ["'), (read_json_lines, b'[{"text": "')]
)
def test_memory_holds_one_entry_of_64_mib_at_most(tmp_path, monkeypatch, reader, start):
    """A file of some KiB can decompress to an entry without end."""
    limit = 64 * 2**20
    raw = EndlessEntry(start, 5 * limit)
    monkeypatch.setattr(SourceDirectory, "open", lambda *_: io.BufferedReader(raw))
    ((number, *_, record),) = reader(SourceDirectory(str(tmp_path)), "rows.json")
    assert number == 1
    assert record.truncates_file
    # The block that exceeds the limit is as large as everything before it.
    assert limit < raw.given <= 3 * limit
