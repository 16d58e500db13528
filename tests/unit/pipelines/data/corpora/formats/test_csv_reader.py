"""Damaged CSV files: a bad row costs only itself, and an unclosed quote is reported."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.corpora import open_external_corpus
from pipelines.data.corpora.base import RejectedRow, SourceArchives
from pipelines.data.corpora.formats import record_reader
from pipelines.data.corpora.formats.encoding import TRUNCATED_LINE, BadRecord
from pipelines.data.corpora.formats.record_reader import UNCLOSED_QUOTE, read_records
from pipelines.data.io.directory import SourceDirectory

HEAD = "text,label\n"


def read(folder: Path, text: str | bytes, name: str = "rows.csv") -> list[tuple[int, Any]]:
    data = text if isinstance(text, bytes) else text.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return list(read_records(SourceDirectory(str(folder)), name))


def row(text: str, label: str) -> dict[str, str]:
    return {"text": text, "label": label}


@pytest.mark.parametrize("behind", ["", '"丁, 戊",b\n', '己,"b"\n'])
def test_an_unclosed_quote_is_reported_with_its_line(tmp_path: Path, behind: str) -> None:
    """No later row is read, with or without a further quote."""
    found = read(tmp_path, f'{HEAD}甲,a\n"乙,a\n丙,b\n{behind}')
    assert found == [(2, row("甲", "a")), (3, UNCLOSED_QUOTE)]


def test_a_file_that_ends_in_a_quoted_field_is_truncated(tmp_path: Path) -> None:
    assert read(tmp_path, f'{HEAD}甲,a\n乙,"b') == [(2, row("甲", "a")), (3, TRUNCATED_LINE)]


def test_quoted_fields_can_hold_line_breaks_and_quotes(tmp_path: Path) -> None:
    found = read(tmp_path, f'{HEAD}\n"甲\n\n乙 ""丙"", 丁",a\r\n戊,b')
    assert found == [(5, row('甲\n\n乙 "丙", 丁', "a")), (6, row("戊", "b"))]


def test_a_bad_row_is_reported_with_its_line_and_costs_only_itself(tmp_path: Path) -> None:
    found = read(tmp_path, f'{HEAD}甲,a\n"乙"丙,a\n丁,b\n庚\n戊\0,b\n己,a\n')
    good = [(2, row("甲", "a")), (4, row("丁", "b")), (7, row("己", "a"))]
    assert [each for each in found if isinstance(each[1], dict)] == good
    bad = {number: each for number, each in found if isinstance(each, BadRecord)}
    assert sorted(bad) == [3, 5, 6]
    assert bad[3].reason == "not CSV (',' expected after '\"')"
    assert bad[5].reason == "a different number of fields than the header"
    assert bad[6].reason == "contains null characters"
    assert not any(each.truncates_file for each in bad.values())


def test_a_field_can_be_as_long_as_in_other_formats(tmp_path: Path) -> None:
    """The default limit of the csv module is 131,072 characters."""
    assert read(tmp_path, f'{HEAD}"{"x" * 500_000}",a\n') == [(2, row("x" * 500_000, "a"))]


def test_quotes_in_tsv_belong_to_the_text(tmp_path: Path) -> None:
    """Chinese TSV files are written without quoting; quoted fields of spreadsheets are read too."""
    lines = ['"甲\ta', '"乙"丙\ta', '丁 "戊\tb', '"己, ""庚"""\tb', '"辛\ta']
    found = read(tmp_path, "text\tlabel\n" + "\r\n".join(lines) + "\n", "rows.tsv")
    texts = ['"甲', '"乙"丙', '丁 "戊', '己, "庚"', '"辛']
    rows = map(row, texts, "aabba")
    assert found == list(enumerate(rows, start=2))


def test_a_bad_header_rejects_the_file(tmp_path: Path) -> None:
    ((number, broken),) = read(tmp_path, 'te"x"t,"la"bel\n甲,a\n乙,b\n')
    assert (number, broken.truncates_file) == (1, True)


@pytest.mark.parametrize(
    "text",
    ["x" * 5000, '"' + "甲,a\n" * 1000, "\n" * 5000],
    ids=["line", "quoted-field", "empty-lines"],
)
def test_oversized_input_ends_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(record_reader, "MAX_LINE_BYTES", 2000)
    monkeypatch.setattr(record_reader, "MAX_EMPTY_LINES", 2000)
    first, (number, broken) = read(tmp_path, f"{HEAD}甲,a\n{text}\n乙,a\n", "rows.csv.gz")
    assert first == (2, row("甲", "a"))
    assert broken.truncates_file
    assert number > 2
    assert "flood" in broken.reason or "longer than" in broken.reason


def test_an_invalid_gzip_file_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "rows.csv.gz").write_bytes(b"xx")
    ((_, broken),) = read_records(SourceDirectory(str(tmp_path)), "rows.csv.gz")
    assert broken == BadRecord("the compressed file is cut short or damaged", truncates_file=True)


def test_rows_of_a_corpus_have_line_numbers(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f'{HEAD}"甲\n乙",a\n"丙"丁,b\n戊,b\n', "utf-8")
    corpus = open_external_corpus("mine", f"folder:{tmp_path / 'rows.csv'}")
    found = [
        r.row if isinstance(r, RejectedRow) else r["row"]
        for r in corpus.rows(SourceArchives.none())
    ]
    assert found == [3, 4, 5]
