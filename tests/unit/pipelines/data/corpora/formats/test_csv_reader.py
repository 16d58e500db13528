"""CSV: a bad row costs only itself, an unclosed quote is reported, rows decide the separator."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.corpora.formats import record_reader
from pipelines.data.corpora.formats.encoding import TRUNCATED_LINE, BadRecord
from pipelines.data.corpora.formats.record_reader import (
    UNCLOSED_QUOTE,
    detect_separator,
    read_csv_rows,
    read_records,
)
from pipelines.data.io.directory import SourceDirectory

HEAD = "text,label\n"
DAMAGED_GZIP = BadRecord("the compressed file is cut short or damaged", truncates_file=True)


def read(folder: Path, text: str, name: str = "rows.csv") -> list[tuple[int, Any]]:
    data = text.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return list(read_records(SourceDirectory(str(folder)), name))


def row(text: str, label: str) -> dict[str, str]:
    return {"text": text, "label": label}


def bad(reason: str) -> BadRecord:
    return BadRecord(reason)


FIRST = (2, row("甲", "a"))
#: What a text shows -> the text after its header, and the records with the numbers of their lines.
TEXTS: dict[str, tuple[str, list[tuple[int, Any]]]] = {
    "an unclosed quote is reported": ('甲,a\n"乙,a\n丙,b\n', [FIRST, (3, UNCLOSED_QUOTE)]),
    "a further quote does not close it": (
        '甲,a\n"乙,a\n丙,b\n"丁, 戊",b\n',
        [FIRST, (3, UNCLOSED_QUOTE)],
    ),
    "a quote of a field does not close it": (
        '甲,a\n"乙,a\n丙,b\n己,"b"\n',
        [FIRST, (3, UNCLOSED_QUOTE)],
    ),
    "a file that ends in a quoted field is cut": ('甲,a\n乙,"b', [FIRST, (3, TRUNCATED_LINE)]),
    "quoted fields hold line breaks and quotes": (
        '\n"甲\n\n乙 ""丙"", 丁",a\r\n戊,b',
        [(5, row('甲\n\n乙 "丙", 丁', "a")), (6, row("戊", "b"))],
    ),
    "a bad row costs only itself": (
        '甲,a\n"乙"丙,a\n丁,b\n庚\n戊\0,b\n己,a\n',
        [
            FIRST,
            (3, bad("not CSV (',' expected after '\"')")),
            (4, row("丁", "b")),
            (5, bad("a different number of fields than the header")),
            (6, bad("contains null characters")),
            (7, row("己", "a")),
        ],
    ),
    "a field is longer than the csv module's default limit": (
        f'"{"x" * 500_000}",a\n',
        [(2, row("x" * 500_000, "a"))],
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_rows_are_read_with_their_lines(tmp_path: Path, name: str) -> None:
    text, expected = TEXTS[name]
    assert read(tmp_path, HEAD + text) == expected


def test_quotes_in_tsv_belong_to_the_text(tmp_path: Path) -> None:
    """Chinese TSV files are written without quoting; quoted fields of spreadsheets are read too."""
    lines = ['"甲\ta', '"乙"丙\ta', '丁 "戊\tb', '"己, ""庚"""\tb', '"辛\ta']
    found = read(tmp_path, "text\tlabel\n" + "\r\n".join(lines) + "\n", "rows.tsv")
    texts = ['"甲', '"乙"丙', '丁 "戊', '己, "庚"', '"辛']
    assert found == list(enumerate(map(row, texts, "aabba"), start=2))


def test_a_bad_header_rejects_the_file(tmp_path: Path) -> None:
    ((number, broken),) = read(tmp_path, 'te"x"t,"la"bel\n甲,a\n乙,b\n')
    assert (number, broken.truncates_file) == (1, True)


@pytest.mark.parametrize(
    "text",
    ["x" * 5000, '"' + "甲,a\n" * 1000, "\n" * 5000],
    ids=["line", "quoted-field", "empty-lines"],
)
def test_oversized_input_ends_the_file(tmp_path, monkeypatch, text):
    monkeypatch.setattr(record_reader, "MAX_LINE_BYTES", 2000)
    monkeypatch.setattr(record_reader, "MAX_EMPTY_LINES", 2000)
    first, (number, broken) = read(tmp_path, f"{HEAD}甲,a\n{text}\n乙,a\n", "rows.csv.gz")
    assert first == FIRST
    assert broken.truncates_file
    assert number > 2
    assert "flood" in broken.reason or "longer than" in broken.reason


def test_an_invalid_gzip_file_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "rows.csv.gz").write_bytes(b"xx")
    ((_, broken),) = read_records(SourceDirectory(str(tmp_path)), "rows.csv.gz")
    assert broken == DAMAGED_GZIP


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", ["", "\n"], ids=["cut", "complete"])
def test_each_separator_is_detected(tmp_path: Path, separator: str, suffix: str) -> None:
    quote = '"' if separator in ",;" else ""
    lines = [("id", "text"), ("1", f"{quote}甲, 乙{quote}"), ("2", f"{quote}丙; 丁{quote}")]
    found = read(tmp_path, "\ufeff" + "\n".join(map(separator.join, lines)) + suffix)
    assert [each for _, each in found] == [
        {"id": "1", "text": "甲, 乙"},
        {"id": "2", "text": "丙; 丁"},
    ]


@pytest.mark.parametrize(
    ("text", "separator"),
    [
        ("text,label\na;b,c\nd;e,f\n", ","),  # both divide every line into as many fields
        ("a;b,c\n1;x, y, z\n2;x\n", ";"),  # only one of them divides the rows as the header
        ("text,label\nd, e, f\ng\n", ","),  # damaged rows: the header decides
        ('"a;b",c\n"d;e",f\n', ","),
        ("text\na;b\nc,d\n", ","),  # a single field
        ('text;label\n"a;b\n', ";"),  # a quote without end
        ("", ","),
    ],
)
def test_header_and_rows_decide(text: str, separator: str) -> None:
    assert detect_separator(text.encode()) == separator


def test_spaces_around_names_are_removed(tmp_path: Path) -> None:
    found = read(tmp_path, "image_name| number| comment\n1.jpg| 0| 'A' dog .\n")
    assert found == [(2, {"image_name": "1.jpg", "number": " 0", "comment": " 'A' dog ."})]


def test_rows_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('1|"a\n\n2|"b|c"\n3|d"\n')
    source = SourceDirectory(str(tmp_path))
    assert list(read_csv_rows(source, "rows.csv", "|", ("name", "text"))) == [
        (1, {"name": "1", "text": '"a'}),
        (3, bad("a different number of fields than the first row")),
        (4, {"name": "3", "text": 'd"'}),
    ]
