"""The corpora of the benchmark ``paper_sizes`` have the layouts that the readers expect."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import paper_corpora
from pipelines.data.corpora import open_external_corpus
from pipelines.data.corpora.base import RejectedRow, SourceArchives
from pipelines.data.transforms import image, sound, video
from tests.helpers.user_corpora import jpg, wav

STROKE = {"points": [0, 900, 1000, 900, 500, 0], "counts": [2, 1], "captions": ["横"], "key": "一"}


def rows_of(**row: Any) -> dict[str, list[dict[str, Any]]]:
    return {"train": [row] * 3, "validation": [row], "test": [row]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paper_corpora, "FILM_FRAMES", 12)
    monkeypatch.setattr(paper_corpora, "LONGEST", 3.0)
    paper_corpora.write_tnews(tmp_path / "tnews", rows_of(text="天文研究", label=3))
    spoken = rows_of(text="ba1", audio=wav(0))
    paper_corpora.write_aishell(tmp_path / "aishell1", spoken, 3)
    drawn = rows_of(image=jpg(1), captions=["红色的方块", "方块"])
    paper_corpora.write_aic_icc(tmp_path / "aic_icc", drawn)
    paper_corpora.write_vatex(tmp_path / "vatex", rows_of(**STROKE))
    code = "def f(x):\n    return x + 1\n"
    function = rows_of(key="f", package="p", module="m", code=code, captions=["返回加一的函数"])
    paper_corpora.write_pytorrent(tmp_path / "pytorrent", function)
    return tmp_path


def test_the_readers_read_all_rows(folder: Path) -> None:
    for name in ("tnews", "aishell1", "aic_icc", "vatex", "pytorrent"):
        corpus = open_external_corpus(name, str(folder / name))
        rows = list(corpus.rows(SourceArchives.none()))
        rejected = [row.reason for row in rows if isinstance(row, RejectedRow)]
        assert not rejected, name
        assert {row["split"] for row in rows} >= {"train", "validation", "test"}, name
    films = sorted((folder / "vatex" / "clips").iterdir())
    pixels = video.load_video_frames(films[0].read_bytes(), 4, 32, 3)
    assert np.ptp(pixels, axis=-1).max() > 20  # coloured
    (picture, *_) = sorted((folder / "aic_icc").rglob("*.jpg"))
    assert image.read_image_size(picture.read_bytes()) == paper_corpora.PHOTOGRAPH
    lengths = [
        len(sound.decode_audio(p.read_bytes())) for p in (folder / "aishell1").rglob("*.wav")
    ]
    assert max(lengths) <= 3.0 * sound.RATE
