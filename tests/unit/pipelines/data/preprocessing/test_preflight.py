"""A preparation that must fail fails before Ray starts, with its reasons and rejected rows."""

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pipelines import prepare
from pipelines.data.preprocessing import prepare as preparation
from skillnet_platform import cluster
from tests.helpers import user_corpora


class RayStartedError(Exception):
    """Ray would have been started."""


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(cpus: int | None = None) -> NoReturn:
        raise RayStartedError

    monkeypatch.setattr(cluster, "ensure_ray", start)


def run_prepare(tmp_path: Path, capsys: Any, *options: str) -> str:
    """Prepare the corpus below ``tmp_path``, which must fail; return the message."""
    words = [f"--corpus=mine=folder:{tmp_path / 'mine'}", "--data", str(tmp_path / "data")]
    assert prepare.main([*words, *options]) == 2
    return " ".join(capsys.readouterr().err.split())


def write_images(folder: Path, rows: int, data: bytes | None) -> None:
    lines = [{"file_name": f"{n}.jpg", "text": f"第{n}个"} for n in range(rows)]
    user_corpora.write_lines(folder / "metadata.jsonl", lines)
    for n in range(rows if data is not None else 0):
        (folder / f"{n}.jpg").write_bytes(data or b"")


def test_missing_media_are_reported_and_listed(tmp_path: Path, capsys: Any) -> None:
    write_images(tmp_path / "mine", 40, None)
    (tmp_path / "mine" / "images.zip").write_bytes(b"PK")
    said = run_prepare(tmp_path, capsys)
    assert "mine: 40 of 40 rows (100.0%) were rejected" in said
    assert "40 × the media file is missing" in said
    assert "images.zip is an archive: unpack it" in said
    listed = tmp_path / "data" / "mine.rejected.jsonl"
    lines = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
    assert [line["row"] for line in lines] == list(range(1, 41))
    # The advised limit is no help here, so no row is left.
    assert "no row is left to train on" in run_prepare(tmp_path, capsys, "--max_error_rate", "1")


def test_media_of_which_none_can_be_decoded_are_reported(tmp_path: Path, capsys: Any) -> None:
    write_images(tmp_path / "mine", 40, b"\xff\xd8\xff torn")
    said = run_prepare(tmp_path, capsys)
    assert "mine: no media file can be decoded; 14 of 40 were tried: 14 × " in said


def test_texts_that_cannot_be_used_are_reported(tmp_path: Path, capsys: Any) -> None:
    rows = [{"text": " ", "label": "a"}] * 5
    user_corpora.write_lines(tmp_path / "mine" / "train.jsonl", rows)
    assert "the field text is blank in the first rows" in run_prepare(tmp_path, capsys)
    (tmp_path / "mine" / "train.jsonl").unlink()
    assert "mine: an empty folder" in run_prepare(tmp_path, capsys)


def test_a_usable_corpus_reaches_ray(tmp_path: Path, capsys: Any) -> None:
    """One damaged file, and rows without media, do not stop a preparation."""
    write_images(tmp_path / "mine", 40, user_corpora.jpg(1, (32, 32)))
    (tmp_path / "mine" / "0.jpg").write_bytes(b"torn")
    (tmp_path / "mine" / "1.jpg").unlink()
    words = [f"--corpus=mine=folder:{tmp_path / 'mine'}", "--data", str(tmp_path / "data")]
    assert prepare.main(words) == 1
    assert "RayStartedError" in capsys.readouterr().err
    assert not (tmp_path / "data" / "mine.rejected.jsonl").exists()


def test_a_corpus_of_many_rows_is_checked_while_it_is_prepared(tmp_path, capsys, monkeypatch):
    """The first rows can all be bad: they lie close together."""
    write_images(tmp_path / "mine", 40, None)
    words = [f"--corpus=mine=folder:{tmp_path / 'mine'}", "--data", str(tmp_path / "data")]
    monkeypatch.setattr(preparation, "MAX_FIRST_ROWS", 39)
    assert prepare.main(words) == 1
    assert "RayStartedError" in capsys.readouterr().err
    monkeypatch.setattr(preparation, "MAX_FIRST_ROWS", 40)
    assert prepare.main(words) == 2
