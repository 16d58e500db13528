"""Splits that a layout names are used, and a test without annotations is not evaluated."""

import json
from pathlib import Path

import pytest

from pipelines.data.corpora import open_external_corpus
from pipelines.data.corpora.readers.base import ExternalCorpus
from pipelines.data.preprocessing import inspection
from skillnet_platform.errors import UserError
from tests.helpers.user_corpora import write_lines
from tests.unit.pipelines.data.corpora.readers.test_readers import Rows, read, sizes


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


def test_splits_below_classes_are_rejected(tmp_path: Path) -> None:
    pictures(tmp_path, "cat/train/1.jpg", "cat/test/2.jpg", "dog/train/3.jpg", "dog/test/4.jpg")
    with pytest.raises(UserError, match="cat/test and cat/train name splits"):
        folder(tmp_path)


def test_a_single_folder_is_not_a_class(tmp_path: Path) -> None:
    pictures(tmp_path, *(f"audio/{n}.wav" for n in range(3)), "meta/notes.txt")
    corpus = folder(tmp_path)
    assert (corpus.task, corpus.annotations_present) == ("masked_sound", ())
    rows, reasons = read(corpus)
    assert (sum(sizes(rows).values()), reasons) == (3, {})


def test_images_of_a_test_without_classes(tmp_path: Path) -> None:
    pictures(tmp_path, *(f"train/{'cd'[n % 2]}/{n}.jpg" for n in range(60)))
    pictures(tmp_path, *(f"test/{n}.jpg" for n in range(9)))
    corpus = folder(tmp_path)
    rows, reasons = read(corpus)
    assert (len(rows["unlabelled"]), reasons) == (9, {})
    assert homes(rows, "/test/") == {"unlabelled"}
    assert {"train", "test"} <= set(rows)
    assert "label" not in corpus.schema("unlabelled").names


@pytest.mark.parametrize("name", ["metadata.jsonl", "train.jsonl", "Train/metadata.jsonl"])
def test_metadata_further_down_are_reported(tmp_path: Path, name: str) -> None:
    pictures(tmp_path, "corpus/1.jpg")
    write_lines(tmp_path / "corpus" / name, [{"file_name": "1.jpg", "caption": "图"}])
    with pytest.raises(UserError, match=f"but corpus/{name}; give {tmp_path}/corpus$"):
        folder(tmp_path)


def test_file_names_in_capitals(tmp_path: Path) -> None:
    for name in ("train.csv", "TEST.CSV"):
        (tmp_path / name).write_text("text,label\n一,a\n二,b\n")
    assert folder(tmp_path).named_splits == {"train", "test"}


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


def test_a_file_beside_split_folders_is_rejected(tmp_path: Path) -> None:
    names = ["train/1.jpg", "test/2.jpg", "more/3.jpg"]
    captioned(tmp_path, [{"file_name": name, "caption": "图"} for name in names])
    _, reasons = read(folder(tmp_path))
    assert reasons == {"a file in no folder that names a split": 1}


def test_a_field_named_split(tmp_path: Path) -> None:
    said = [{"file_name": f"{n}.jpg", "caption": f"图{n}"} for n in range(40)]
    captioned(tmp_path, [r | {"split": "Test" if n < 10 else "train"} for n, r in enumerate(said)])
    rows, _ = read(folder(tmp_path))
    assert [row["captions"] for row in rows["test"]] == [[f"图{n}"] for n in range(10)]
    captioned(tmp_path, [row | {"split": f"part {n}"} for n, row in enumerate(said)])
    assert folder(tmp_path).named_splits == frozenset()


def test_splits_by_files_override_a_split_field(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        lines = [{"text": f"{name} {n}", "label": "a", "split": "train"} for n in range(5)]
        write_lines(tmp_path / f"{name}.jsonl", lines)
    rows, _ = read(folder(tmp_path))
    assert sizes(rows) == {"test": 5, "train": 5, "validation": 5}


def test_a_given_split_field_can_lack_a_split(tmp_path: Path) -> None:
    lines = [{"text": f"第{n}句", "label": "a", "part": "train"} for n in range(200)]
    lines += [{"text": f"试{n}句", "label": "a", "part": "test"} for n in range(5)]
    write_lines(tmp_path / "metadata.jsonl", lines)
    rows, _ = read(folder(tmp_path, {"split": "part"}))
    assert len(rows["test"]) == 5
    assert rows["validation"]  # made from the training rows


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


def test_minus_one_is_a_class_if_training_rows_have_it(tmp_path: Path) -> None:
    write_lines(tmp_path / "test.jsonl", [{"text": f"问{n}", "label": -1} for n in range(5)])
    lines = [{"text": f"答{n}", "label": n % 3 - 1} for n in range(50)]
    write_lines(tmp_path / "train.jsonl", lines)
    rows, _ = read(folder(tmp_path))
    assert {row["label"] for row in rows["test"]} == {"-1"}


def test_a_test_without_captions_is_rejected(tmp_path: Path) -> None:
    for name, caption in (("test", {}), ("validation", {"caption": "图"})):
        said = [{"file_name": f"{n}.jpg"} | caption for n in range(12)]
        captioned(tmp_path / name, said)
    captioned(tmp_path / "train", [{"file_name": "1.jpg"}, {"file_name": "2.jpg", "caption": "图"}])
    rows, reasons = read(folder(tmp_path))
    assert reasons == {"an image without captions": 13}
    assert homes(rows, "/validation/") == {"validation", "test"}


@pytest.mark.parametrize("first", [{}, {"caption": None}, {"caption": ""}, {"caption": []}])
def test_the_first_row_does_not_decide_the_schema(tmp_path: Path, first: dict) -> None:
    said = [{"file_name": "0.jpg"} | first]
    captioned(tmp_path, said + [{"file_name": f"{n}.jpg", "caption": "图"} for n in range(1, 9)])
    corpus = folder(tmp_path)
    assert corpus.task == "text_to_image"
    rows, reasons = read(corpus)
    assert (sum(sizes(rows).values()), reasons) == (8, {"an image without captions": 1})


def test_unknown_fields_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captioned(tmp_path, [{"file_name": f"{n}.jpg", "文本": "图"} for n in range(3)])
    assert folder(tmp_path).task == "masked_image"
    assert "among the fields 文本" in capsys.readouterr().err
    assert folder(tmp_path, {"text": "文本"}).task == "text_to_image"
    assert not capsys.readouterr().err


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
