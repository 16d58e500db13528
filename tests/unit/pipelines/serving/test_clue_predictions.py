"""Output of ``skillnet predict`` for CLUE's evaluation of TNEWS."""

from pathlib import Path

import pytest

from pipelines.predict import clue_lines
from pipelines.serving.inputs import InputRow, read_input_rows
from pipelines.serving.predictor import TaskPrediction
from skillnet_platform.errors import UserError
from tests.helpers.user_corpora import tnews, write_lines


def predicted(rows: list[InputRow], *answers: str) -> list[tuple[InputRow, TaskPrediction]]:
    predictions = [TaskPrediction("x", "text_classification", answer, 0.5) for answer in answers]
    return list(zip(rows, predictions, strict=True))


def test_lines_of_a_test_file_keep_their_ids(tmp_path: Path) -> None:
    rows = read_input_rows(tnews(tmp_path, other=3) / "test.json", "text_classification", clue=True)
    items = [row.item for row in rows if row.item]
    texts = ["news_story的新闻研究0", "news_culture的新闻概论1", "news_entertainment的新闻教程2"]
    assert [item.text for item in items] == texts
    assert {item.task for item in items} == {"text_classification"}
    lines = clue_lines(predicted(rows, "107 news_car", "100 news_story", "116 news_game"))
    assert lines[0] == {"id": 0, "label": "107", "label_desc": "news_car"}
    assert [line["id"] for line in lines] == [0, 1, 2]


def test_classes_of_another_corpus_are_rejected(tmp_path: Path) -> None:
    write_lines(tmp_path / "test.json", [{"id": 4, "sentence": "一"}])
    rows = read_input_rows(tmp_path / "test.json", None, clue=True)
    with pytest.raises(UserError, match="'G 文化' is not a class of TNEWS"):
        clue_lines(predicted(rows, "G 文化"))


def test_unusable_lines_have_reasons_and_an_empty_sentence_is_predicted(tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    lines = [
        '{"id": 0, "sentence": "一"}'.encode(),
        b'{"id": 1, "sentence": " "}',
        '{"id": 2, "sentence": "新闻"}'.encode("gbk"),
        b'{"sentence": "b"}',
        b'{"id": 4, "sentence": 5}',
        b'{"id": 5, "sentence": ',
        b'{"id": 6, "file": "a\\u0000b"}',
        b'{"id": 7, "sentence": "c", "task": ["x"]}',
        b"7",
    ]
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    rows = read_input_rows(path, None, clue=True)
    assert [row.where for row in rows] == [f"{path}, line {n}" for n in range(1, 10)]
    assert [row.item is not None for row in rows] == [True, True] + [False] * 7
    reasons = (
        "not UTF-8",
        'no "id"',
        "sentence must be a string",
        "not JSON",
        "null character",
        "task must be a string",
        "expected",
    )
    for row, reason in zip(rows[2:], reasons, strict=True):
        assert reason in row.reason
    assert rows[1].item.may_be_empty
    (empty,) = [row for row in read_input_rows(path, None) if row.where.endswith("line 2")]
    assert empty.reason == "the text is empty"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1, "sentence": "一"}]'.encode(), r"test\.json: a JSON array; expected one ob"),
        (b'[\n {"id": 1}\n]', r"test\.json: a JSON array"),
        ('{"id": 2, "sentence": "新闻"}'.encode("gbk"), "line 1: not UTF-8; convert.*iconv"),
        (b"\n \n", "the file has no rows"),
        (b'{"sentence": "a"}', 'line 1: no "id"; CLUE'),
    ],
)
def test_a_file_without_usable_rows_gives_one_message(tmp_path, content, message):
    (tmp_path / "test.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_input_rows(tmp_path / "test.json", None, clue=True)
