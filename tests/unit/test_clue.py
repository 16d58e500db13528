"""What ``skillnet predict`` writes for CLUE's evaluation of TNEWS."""

from pathlib import Path

import pytest

from pipelines.predict import PredictConfig, clue_lines, read_rows
from pipelines.predictor import Prediction
from skillnet_platform.errors import UserError
from tests.user_corpora import tnews, write_lines


def predicted(*answers: str) -> list[Prediction]:
    return [Prediction("x", "text_classification", answer, 0.5) for answer in answers]


def test_a_test_file_is_read_and_its_lines_are_told_apart(tmp_path: Path) -> None:
    path = tnews(tmp_path, other=3) / "test.json"
    items = read_rows(path, "text_classification")
    texts = ["news_story的新闻研究0", "news_culture的新闻概论1", "news_entertainment的新闻教程2"]
    assert [item.text for item in items] == texts
    assert {item.task for item in items} == {"text_classification"}
    lines = clue_lines(path, predicted("107 news_car", "100 news_story", "116 news_game"))
    assert lines[0] == {"id": 0, "label": "107", "label_desc": "news_car"}
    assert [line["id"] for line in lines] == [0, 1, 2]


def test_classes_of_another_corpus_and_lines_without_id_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "test.json", [{"sentence": "一"}])
    with pytest.raises(UserError, match="'G 文化' is none of TNEWS's"):
        clue_lines(tmp_path / "test.json", predicted("G 文化"))
    with pytest.raises(UserError, match='line 1: no "id" in it'):
        clue_lines(tmp_path / "test.json", predicted("107 news_car"))


def test_the_format_is_for_one_file() -> None:
    with pytest.raises(UserError, match="one test file"):
        PredictConfig(format="clue", text="一")
