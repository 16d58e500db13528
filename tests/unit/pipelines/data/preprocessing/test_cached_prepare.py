"""Preparing an unchanged corpus reads no row: labels and symbols are in the manifest."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.data.corpora import ExternalCorpus, open_external_corpus
from pipelines.data.preprocessing import prepare as preparing
from skillnet_platform import cluster
from tests.helpers import user_corpora
from tests.helpers.prepared_corpora import change_corpus, write_empty_corpus


class Started(Exception):
    """Raised in place of the start of Ray."""


def no_ray(*_: object) -> None:
    raise Started


def pictures(folder: Path) -> Path:
    for number in range(6):
        home = folder / "train" / "ab"[number % 2]
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{number}.jpg").write_bytes(user_corpora.jpg(number))
    return folder


@pytest.fixture(params=[pictures, user_corpora.media_folder, user_corpora.aishell1])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cluster, "ensure_ray", no_ray)
    reader = "aishell1" if request.param is user_corpora.aishell1 else "folder"
    return f"{reader}:{request.param(tmp_path / 'given')}"


def deaf(corpus: ExternalCorpus) -> ExternalCorpus:
    def rows(*_: object) -> Callable[..., None]:
        raise AssertionError("a row is read")

    corpus.rows = corpus._read_transcripts = rows
    return corpus


def test_unchanged_listing_reads_no_row(place: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_empty_corpus(data, open_external_corpus("mine", place))
    corpus = deaf(open_external_corpus("mine", place))
    done = preparing.prepare([], data, tmp_path, external=[corpus])
    assert done["mine"]["state"] == "cached"
    reported = json.loads((data / "mine" / "manifest.json").read_text())
    assert corpus.facts() == {key: reported[key] for key in corpus.facts()}


def test_added_file_is_read(place: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_empty_corpus(data, open_external_corpus("mine", place))
    first = next(path for path in sorted((tmp_path / "given").rglob("*.*")) if path.is_file())
    first.with_name(f"new{first.suffix}").write_bytes(first.read_bytes() + b"\n")
    with pytest.raises(AssertionError, match="a row is read"):
        preparing.prepare([], data, tmp_path, external=[deaf(open_external_corpus("mine", place))])
    with pytest.raises(Started):
        preparing.prepare([], data, tmp_path, external=[open_external_corpus("mine", place)])


def test_labels_of_other_options_are_not_reused(place: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_empty_corpus(data, open_external_corpus("mine", place))
    before = change_corpus(data / "mine")
    other = {"preprocessing_digest": "of other options", "labels": [], "symbols": []}
    change_corpus(data / "mine", **other)
    corpus = open_external_corpus("mine", place)
    with pytest.raises(Started):
        preparing.prepare([], data, tmp_path, external=[corpus])
    assert corpus.facts() == {key: before[key] for key in corpus.facts()}


def test_unread_files_and_numbers_as_labels_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "ensure_ray", no_ray)
    rows = [{"file_name": f"{n}.jpg", "label": n / 10} for n in range(10)] * 4
    user_corpora.write_lines(tmp_path / "given" / "metadata.jsonl", rows)
    for row in rows:
        (tmp_path / "given" / row["file_name"]).write_bytes(user_corpora.jpg(1))
    (tmp_path / "given" / "boxes.json").write_text("[]")
    corpus = open_external_corpus("mine", f"folder:{tmp_path / 'given'}")
    with pytest.raises(Started):
        preparing.prepare([], tmp_path / "data", tmp_path, external=[corpus])
    printed = " ".join(capsys.readouterr().err.split())
    assert "annotation files that are not read: boxes.json" in printed
    assert "the labels are numbers" in printed
