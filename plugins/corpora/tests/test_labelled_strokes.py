"""The corpus ``radicals``, which labels the videos of ``strokes``."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.data.corpora import DEMO, find_corpus
from pipelines.data.corpora.base import RejectedRow, Row, SourceArchives
from pipelines.data.preprocessing.blocks import rows_to_table
from pipelines.data.preprocessing.jobs import transform_block
from plugins.corpora.tests.demo_archives import write_stroke_archives
from skillnet_corpora.demo import strokes
from skillnet_corpora.demo.strokes import StrokesCorpus
from skillnet_corpora.study.radicals import RADICALS, RadicalsCorpus

ORDER = {"一": "j", "十": "js", "三": "jjj", "田": "szjsj", "二": "jj", "叶": "szjjs"}
DRAWN = {"一": 1, "十": 2, "三": 3, "田": 5, "二": 7, "龘": 4, "叶": 5}
#: 叶 has the radical 口; the others have none, one of few characters, or marks without strokes.
MARKS = {"叶": [0, 1, 2], "十": [0, 1], "三": [], "田": [9], "龘": [0]}


@pytest.fixture
def sources(tmp_path: Path) -> SourceArchives:
    """Seven characters; "二" and "龘" have no confirmed count."""
    return write_stroke_archives(tmp_path, ORDER, DRAWN, MARKS)


def read_by_key(corpus: StrokesCorpus, sources: SourceArchives) -> dict[str, Row]:
    found = corpus.rows(sources)
    return {row["key"]: row for row in found if not isinstance(row, RejectedRow)}


def test_it_is_found_by_name_but_is_not_of_the_demo() -> None:
    assert find_corpus("radicals").facts()["labels"]
    assert "radicals" not in DEMO


def test_rows_and_splits_equal_those_of_strokes(sources, monkeypatch):
    monkeypatch.setattr(strokes, "TEST", 1)
    monkeypatch.setattr(strokes, "VALIDATION", 1)
    clips = read_by_key(StrokesCorpus(), sources)
    kept = read_by_key(RadicalsCorpus(), sources)
    assert kept
    for column in ("split", "unit", "group"):
        assert {key: row[column] for key, row in kept.items()} == {
            key: clips[key][column] for key in kept
        }


def test_a_radical_is_the_sequence_of_its_marked_strokes(sources: SourceArchives) -> None:
    labelled = read_by_key(RadicalsCorpus(), sources)
    assert {key: RadicalsCorpus.labels[row["label"]] for key, row in labelled.items()} == {
        "叶": "口"
    }
    found = RadicalsCorpus().rows(sources)
    rejected = {row.key: row.reason for row in found if isinstance(row, RejectedRow)}
    assert rejected == {
        "一": "no stroke belongs to a radical",
        "三": "no stroke belongs to a radical",
        "田": "no stroke belongs to a radical",
        "十": "a radical of few characters",
        "二": "no stroke order that names its strokes",
        "龘": "no stroke order that names its strokes",
    }


def test_each_radical_has_strokes_of_its_own() -> None:
    assert len(set(RADICALS.values())) == len(RADICALS) == 34


def test_videos_equal_those_of_strokes(sources: SourceArchives) -> None:
    corpus = RadicalsCorpus()
    rows = [r for r in corpus.rows(sources) if not isinstance(r, RejectedRow)]
    block, _ = rows_to_table(corpus, rows)
    made = transform_block(corpus, None, block)
    drawn = strokes.render_clips(block)[0]
    assert made["frames"].combine_chunks().equals(drawn)
    assert np.asarray(drawn.flatten()).any()
    assert set(made.column_names) >= {field.name for field in corpus.schema("train")}
    assert "captions" not in made.column_names
