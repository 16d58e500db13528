"""Preparing an unchanged corpus reads no row: labels and symbols are in the manifest."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.corpora import ExternalCorpus, open_external_corpus
from pipelines.preprocessing import prepare as preparing
from pipelines.shards.format import manifest_digest, write_shard
from skillnet_platform import cluster
from tests.helpers import user_corpora


class Started(Exception):
    """Raised in place of the start of Ray."""


def pictures(folder: Path) -> Path:
    for number in range(6):
        home = folder / "train" / "ab"[number % 2]
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{number}.jpg").write_bytes(user_corpora.jpg(number))
    return folder


@pytest.fixture(params=[pictures, user_corpora.media_folder, user_corpora.aishell1])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def no_ray(*_: object) -> None:
        raise Started

    monkeypatch.setattr(cluster, "ensure_ray", no_ray)
    reader = "aishell1" if request.param is user_corpora.aishell1 else "folder"
    return f"{reader}:{request.param(tmp_path / 'given')}"


def put(data: Path, corpus: ExternalCorpus) -> None:
    """Write a manifest and an empty shard, as if the corpus was prepared."""
    corpus.scan_labels()
    home = data / corpus.name
    home.mkdir(parents=True)
    entry = write_shard(pa.table({"key": ["a"]}), home / "train-00000.arrow")
    manifest: dict[str, Any] = {
        "format_version": 1,
        "corpus": corpus.name,
        "modality": corpus.modality,
        "task": corpus.task,
        "splits": {"train": {"rows": 1, "shards": [entry]}},
        **preparing.build_corpus_identity(corpus, corpus.extra_sources(), data),
        **corpus.facts(),
        "rows_in": 1,
        "rows_out": 1,
        "quarantine": {},
    }
    manifest["digest"] = manifest_digest(manifest)
    (home / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def deaf(corpus: ExternalCorpus) -> ExternalCorpus:
    def rows(*_: object) -> Callable[..., None]:
        raise AssertionError("a row is read")

    corpus.rows = corpus._read_transcripts = rows  # type: ignore[method-assign, attr-defined]
    return corpus


def test_unchanged_listing_reads_no_row(place: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    put(data, open_external_corpus("mine", place))
    corpus = deaf(open_external_corpus("mine", place))
    done = preparing.prepare([], data, tmp_path, external=[corpus])
    assert done["mine"]["state"] == "cached"
    reported = json.loads((data / "mine" / "manifest.json").read_text())
    assert corpus.facts() == {key: reported[key] for key in corpus.facts()}


def test_added_file_is_read(place: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    put(data, open_external_corpus("mine", place))
    first = next(path for path in sorted((tmp_path / "given").rglob("*.*")) if path.is_file())
    first.with_name(f"new{first.suffix}").write_bytes(first.read_bytes() + b"\n")
    with pytest.raises(AssertionError, match="a row is read"):
        preparing.prepare([], data, tmp_path, external=[deaf(open_external_corpus("mine", place))])
    with pytest.raises(Started):
        preparing.prepare([], data, tmp_path, external=[open_external_corpus("mine", place)])


def test_labels_of_other_options_are_not_reused(place: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    put(data, open_external_corpus("mine", place))
    before = json.loads((data / "mine" / "manifest.json").read_text())
    changed = before | {"preprocessing_digest": "of other options", "labels": [], "symbols": []}
    changed["digest"] = manifest_digest(changed)
    (data / "mine" / "manifest.json").write_text(json.dumps(changed))
    corpus = open_external_corpus("mine", place)
    with pytest.raises(Started):
        preparing.prepare([], data, tmp_path, external=[corpus])
    assert corpus.facts() == {key: before[key] for key in corpus.facts()}
