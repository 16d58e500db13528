"""Splits that a layout names are used, and a test without annotations is not evaluated."""

import json
from pathlib import Path

import pytest

from pipelines.data.corpora import open_external_corpus
from pipelines.data.corpora.readers.base import ExternalCorpus
from pipelines.data.preprocessing import inspection
from tests.helpers.corpus_rows import Rows, read
from tests.helpers.user_corpora import write_lines


def folder(place: Path, options: dict | None = None) -> ExternalCorpus:
    return open_external_corpus("mine", f"folder:{place}", options)


def pictures(home: Path, *names: str) -> None:
    for name in names:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(b"not looked at")


def homes(rows: Rows, named: str) -> set[str]:
    """Return the splits of rows whose path contains a name."""
    return {s for s, each in rows.items() for row in each if named in row["media"]["path"]}


@pytest.mark.parametrize("below", ["", "corpus", "a/b"])
@pytest.mark.parametrize("names", [("Train", "Test"), ("train", "VAL"), ("TRAINING", "Eval")])
def test_split_folders_in_capitals_or_unpacked_deeper(
    tmp_path: Path, below: str, names: tuple[str, str]
) -> None:
    train, other = names
    for number in range(40):
        pictures(tmp_path / below, f"{train}/{'cd'[number % 2]}/{number}.jpg")
        pictures(tmp_path / below, f"{other}/{'cd'[number % 2]}/x{number}.JPG")
    pictures(tmp_path, "__MACOSX/train/c/._1.jpg")
    corpus = folder(tmp_path)
    rows, reasons = read(corpus)
    assert not reasons
    assert corpus.named_splits == {"train", "validation" if other == "VAL" else "test"}
    wanted = {"test", "validation"} if other == "VAL" else {"test"}
    assert homes(rows, f"/{other}/") == wanted
    assert homes(rows, f"/{train}/") <= {"train", "validation"}
    corpus.scan_labels()
    assert corpus.labels == ("c", "d")


def captioned(home: Path, rows: list[dict]) -> None:
    pictures(home, *(row["file_name"] for row in rows))
    write_lines(home / "metadata.jsonl", rows)


def test_one_metadata_file_with_media_in_split_folders(tmp_path: Path) -> None:
    said = [{"file_name": f"train/{n}.jpg", "caption": f"图{n}"} for n in range(1200)]
    said += [{"file_name": f"Test/{n}.jpg", "caption": f"图{n}"} for n in range(10)]
    captioned(tmp_path, said)
    rows, reasons = read(folder(tmp_path))
    assert not reasons
    assert homes(rows, "/Test/") == {"test"}  # although the sampled rows contain none
    assert homes(rows, "/train/") == {"train", "validation"}
    assert inspection.inspect_corpus(str(tmp_path))["named_splits"] == ["test", "train"]


@pytest.mark.parametrize("nothing", [{}, {"label": None}, {"label": ""}, {"label": -1}])
def test_a_test_without_labels(tmp_path: Path, nothing: dict) -> None:
    """``test`` comes before ``train`` in the directory."""
    write_lines(tmp_path / "test.jsonl", [{"text": f"问{n}"} | nothing for n in range(20)])
    lines = [{"text": f"答{n}", "label": n % 3} for n in range(100)]
    write_lines(tmp_path / "train.jsonl", lines)
    corpus = folder(tmp_path)
    assert (corpus.task, corpus.unlabelled_splits) == ("text_classification", ("unlabelled",))
    rows, reasons = read(corpus)
    assert not reasons
    assert {row["text"] for row in rows["unlabelled"]} == {f"问{n}" for n in range(20)}
    assert {row["label"] for row in rows["unlabelled"]} == {None}
    assert set(rows) == {"train", "validation", "test", "unlabelled"}


def test_a_file_of_several_rows_lies_in_one_split(tmp_path: Path) -> None:
    lines = [{"file_name": f"{n}.jpg", "caption": f"图{n}{c}"} for n in range(60) for c in "甲乙丙"]
    captioned(tmp_path, lines)
    rows, _ = read(folder(tmp_path, {"test": 0.4}))
    sides = {s: {row["media"]["path"] for row in each} for s, each in rows.items()}
    assert len(sides) == 3
    assert sum(map(len, sides.values())) == 60


def test_absolute_paths_below_the_directory(tmp_path: Path) -> None:
    home, link = tmp_path / "real", tmp_path / "link"
    pictures(home, "train/1.jpg", "test/2.jpg", "test/3.jpg")
    pictures(tmp_path, "out.jpg")
    link.symlink_to(home)
    names = [str(home / "train/1.jpg"), str(home / "test/../test/2.jpg"), str(link / "test/3.jpg")]
    names += [str(tmp_path / "out.jpg"), str(home / "../out.jpg"), "/etc/passwd"]
    (home / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": name, "caption": "图"}) + "\n" for name in names)
    )
    rows, reasons = read(folder(link))
    assert reasons == {"a path that leads out of the folder": 3}
    assert {split: len(each) for split, each in rows.items()} == {"train": 1, "test": 2}
    assert homes(rows, str(link)) == {"train", "test"}
