"""Corpus ``stroke_counts``: the videos of ``strokes`` with the class of their stroke count."""

import json
from pathlib import Path

import numpy as np

from pipelines.corpora import BUILT_IN, EXTRA_BUILT_IN, find_corpus
from pipelines.corpora.base import RejectedRow, SourceArchives
from pipelines.corpora.builtin import strokes
from pipelines.corpora.builtin.stroke_counts import LABELS, StrokeCountsCorpus, stroke_count_class
from pipelines.corpora.builtin.strokes import StrokesCorpus
from pipelines.preprocessing.blocks import rows_to_table
from pipelines.preprocessing.transform_task import transform_block
from tests.helpers.archive_files import tarred

ORDER = {"一": "j", "十": "js", "三": "jjj", "田": "sjjss", "二": "jj"}
DRAWN = {"一": 1, "十": 2, "三": 3, "田": 5, "二": 7, "龘": 4}


def archives(folder: Path) -> SourceArchives:
    """Return both archives with six characters; "二" and "龘" have no confirmed count."""
    letters, names = json.dumps(ORDER), {"j": {"name": "横"}, "s": {"name": "竖"}}
    script = f"f(JSON.parse('{letters}'),JSON.parse('{json.dumps(names)}'))"
    paths = {
        char: [[[100, 800 - 90 * line], [900, 800 - 90 * line]] for line in range(count)]
        for char, count in DRAWN.items()
    }
    files = {
        f"package/draw/{char}.json": json.dumps({"medians": each}).encode()
        for char, each in paths.items()
    }
    content = {
        "cnchar-order": tarred({"package/cnchar.order.min.js": script.encode()}),
        "cnchar-data": tarred(files),
    }
    for start, data in content.items():
        (name,) = [a.file for a in StrokeCountsCorpus.archives if a.file.startswith(start)]
        (folder / name).write_bytes(data)
    return SourceArchives(folder, StrokeCountsCorpus.archives)


def test_it_is_found_by_name_but_not_in_built_in() -> None:
    assert isinstance(find_corpus("stroke_counts"), StrokeCountsCorpus)
    assert not EXTRA_BUILT_IN.keys() & BUILT_IN.keys()


def test_end_classes_are_open() -> None:
    assert [stroke_count_class(n) for n in (1, 3, 4, 18, 19, 30)] == [0, 0, 1, 15, 16, 16]
    assert len(LABELS) == 17
    assert LABELS[stroke_count_class(7)] == "7 strokes"


def test_rows_and_splits_equal_those_of_strokes(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(strokes, "TEST", 1)
    monkeypatch.setattr(strokes, "VALIDATION", 1)
    sources = archives(tmp_path)
    clips = {
        row["key"]: row for row in StrokesCorpus().rows(sources) if not isinstance(row, RejectedRow)
    }
    found = list(StrokeCountsCorpus().rows(sources))
    counted = {row["key"]: row for row in found if not isinstance(row, RejectedRow)}
    assert {key: row["label"] for key, row in counted.items()} == {
        "一": 0, "十": 0, "三": 0, "田": 2
    }  # fmt: skip
    assert {key: row["split"] for key, row in counted.items()} == {
        key: clips[key]["split"] for key in counted
    }
    assert {row["split"] for row in counted.values()} == {"train", "validation", "test"}
    set_aside = {row.key: row.reason for row in found if isinstance(row, RejectedRow)}
    assert set_aside.keys() == {"二", "龘"}
    assert "confirms the count" in set_aside["龘"]


def test_videos_equal_those_of_strokes(tmp_path: Path) -> None:
    corpus = StrokeCountsCorpus()
    rows = [r for r in corpus.rows(archives(tmp_path)) if not isinstance(r, RejectedRow)]
    block, _ = rows_to_table(corpus, rows)
    made = transform_block(corpus, None, block)
    drawn = strokes.render_clips(block)[0]
    assert made["frames"].combine_chunks().equals(drawn)
    assert np.asarray(drawn.flatten()).any()
    assert set(made.column_names) >= {field.name for field in corpus.schema("train")}
    assert "captions" not in made.column_names
