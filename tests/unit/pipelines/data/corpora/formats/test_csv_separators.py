"""The separator of a CSV file is the one that its header and rows share."""

from pathlib import Path

import pytest

from pipelines.data.corpora.formats.encoding import BadRecord
from pipelines.data.corpora.formats.record_reader import (
    detect_separator,
    read_csv_rows,
    read_records,
)
from pipelines.data.io.directory import SourceDirectory


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", ["", "\n"], ids=["cut", "complete"])
def test_each_separator_is_detected(tmp_path: Path, separator: str, suffix: str) -> None:
    lines = [("id", "text", "label"), ("1", "甲, 乙", "a"), ("2", "丙; 丁", "b")]
    if separator in ",;":
        lines = [(i, f'"{text}"', label) for i, text, label in lines]
    text = "\n".join(separator.join(line) for line in lines) + suffix
    (tmp_path / "rows.csv").write_text(text, "utf-8-sig")
    found = [record for _, record in read_records(SourceDirectory(str(tmp_path)), "rows.csv")]
    assert found == [
        {"id": "1", "text": "甲, 乙", "label": "a"},
        {"id": "2", "text": "丙; 丁", "label": "b"},
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
    (tmp_path / "rows.csv").write_text("image_name| number| comment\n1.jpg| 0| 'A' dog .\n")
    found = list(read_records(SourceDirectory(str(tmp_path)), "rows.csv"))
    assert found == [(2, {"image_name": "1.jpg", "number": " 0", "comment": " 'A' dog ."})]


def test_rows_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('1|"a\n\n2|"b|c"\n3|d"\n')
    source = SourceDirectory(str(tmp_path))
    found = list(read_csv_rows(source, "rows.csv", "|", ("name", "text")))
    reason = "a different number of fields than the first row"
    assert found == [
        (1, {"name": "1", "text": '"a'}),
        (3, BadRecord(reason)),
        (4, {"name": "3", "text": 'd"'}),
    ]
