"""``skillnet inspect``: sizes, source fields, examples, and time limits."""

import dataclasses
import re
import shlex
import threading
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from pipelines import init_task, inspect, prepare
from pipelines.data import corpora
from pipelines.data.io.directory import DirectoryEntry, SourceDirectory
from pipelines.data.preprocessing import inspection
from skillnet_platform.errors import UserError
from tests.helpers import user_corpora
from tests.helpers import video_files as clips
from tests.helpers.installed_entries import forget_entries, install_entries
from tests.helpers.video_files import encode_video
from tests.unit.pipelines.data.transforms.test_transforms import held

POEMS = EntryPoint("poems", "tests.corpora_package.poem_files:Poems", corpora.ENTRY_POINT_GROUP)


@pytest.fixture
def poems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    install_entries(monkeypatch, POEMS)
    for number in range(12):
        text = f"{'唐宋'[number % 2]}\n白日依山尽{number}\n黄河入海流\n"
        (tmp_path / f"{number:02d}.poem").write_text(text, encoding="utf-8")
    yield tmp_path
    forget_entries()


def test_image_sizes_are_reported(tmp_path: Path) -> None:
    for number in range(4):
        home = tmp_path / "train" / "ab"[number % 2]
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{number}.jpg").write_bytes(user_corpora.jpg(number, (1600, 1200)))
    found = inspection.inspect_corpus(str(tmp_path))
    assert (found["media"]["width"], found["media"]["height"]) == ("1600", "1200")
    (home / "3.jpg").write_bytes(held(6))
    found = inspection.inspect_corpus(str(tmp_path))
    assert found["media"]["width"].startswith("32 to 1600")
    assert found["media"]["height"].startswith("64 to 1200")


def test_upright_video_is_higher_than_wide(tmp_path: Path) -> None:
    home = tmp_path / "train" / "waving"
    home.mkdir(parents=True)
    wide = encode_video(np.zeros((4, 24, 32, 1), np.uint8))
    (home / "1.mp4").write_bytes(clips.held(wide, 0, 1, -1, 0))
    media = inspection.inspect_corpus(str(tmp_path))["media"]
    assert (media["width"], media["height"]) == ("96", "128")


def test_rows_of_each_split_and_the_fields_of_the_source_are_shown(tmp_path: Path) -> None:
    found = inspection.inspect_corpus(str(user_corpora.tnews(tmp_path)))
    assert found["source"] == {
        "label": "100",
        "label_desc": "news_story",
        "sentence": "news_story的新闻研究0",
        "keywords": "研究",
    }
    assert len({row["split"] for row in found["examples"]}) == 3
    assert found["texts"]["texts"].endswith("characters")


def test_code_lengths_and_tar_fields_are_reported(tmp_path: Path) -> None:
    found = inspection.inspect_corpus(str(user_corpora.codesearchnet(tmp_path / "code")))
    assert found["texts"]["lines of code"] == "6"
    assert {"docstring", "func_name", "code"} <= set(found["source"])
    found = inspection.inspect_corpus(str(user_corpora.webdataset(tmp_path / "tars")))
    assert set(found["source"]) == {"txt"}
    merged = user_corpora.vatex(tmp_path / "vatex", merged=True)
    assert {"enCap", "chCap"} <= set(inspection.inspect_corpus(str(merged))["source"])


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Shorten the time limits; the event releases a hanging reader."""
    monkeypatch.setattr(inspection, "READ_TIMEOUT_S", 0.2)
    monkeypatch.setattr(inspection, "COUNT_TIMEOUT_S", 0.2)
    free = threading.Event()
    yield free
    free.set()


def test_endless_listing_is_interrupted(tmp_path, impatient, monkeypatch):
    folder = user_corpora.vatex(tmp_path)

    def walk(
        self: SourceDirectory, relative: str = "", depth: int = 16
    ) -> Iterator[DirectoryEntry]:
        yield DirectoryEntry("a.mp4", 7)
        impatient.wait(60)

    monkeypatch.setattr(SourceDirectory, "walk", walk)
    found = inspection.inspect_corpus(f"vatex:{folder}")
    assert (found["rows"], found["complete"]) == (0, False)
    assert (found["files"], found["bytes"], found["counted"]) == (1, 7, False)
    inspection.show_inspection(found)


def test_time_limit_is_checked_at_every_row(poems, impatient, monkeypatch):
    lines = SourceDirectory.lines

    def slow(self: SourceDirectory, relative: str = "") -> Iterator[tuple[int, bytes]]:
        if relative == "05.poem":
            impatient.wait(60)
        return lines(self, relative)

    monkeypatch.setattr(SourceDirectory, "lines", slow)
    found = inspection.inspect_corpus(f"poems:{poems}")
    assert (found["rows"], found["complete"]) == (5, False)


def test_reader_error_is_raised(poems: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: SourceDirectory, relative: str = "") -> Iterator[tuple[int, bytes]]:
        raise UserError("no such file")

    monkeypatch.setattr(SourceDirectory, "lines", broken)
    with pytest.raises(UserError, match="no such file"):
        inspection.inspect_corpus(f"poems:{poems}")


def test_third_party_reader_is_found_by_name(poems, capsys):
    found = inspection.inspect_corpus(f"poems:{poems}", {"poems": {"verses": 1}})
    assert (found["reader"], found["evidence"], found["rows"]) == ("poems", "named", 12)
    assert found["example"]["text"] == "白日依山尽0"
    with pytest.raises(UserError, match="did you mean 'poems'"):
        inspection.inspect_corpus(f"pomes:{poems}")
    assert inspect.main([f"poems:{poems}"]) == 0
    assert "--corpus poems=" in capsys.readouterr().err


@pytest.mark.parametrize("words", [{"tnews": {"keywords": True}}, {"mine": {}}])
def test_options_of_another_reader_are_rejected(tmp_path: Path, words: dict[str, Any]) -> None:
    folder = user_corpora.codesearchnet(tmp_path)
    with pytest.raises(UserError, match=r"is read as codesearchnet .*--options\.codesearchnet"):
        inspection.inspect_corpus(str(folder), words)


def test_numbers_as_labels_and_unread_files_are_reported(tmp_path, capsys):
    labels = ["1", "1.0", "0.0", "0.5"] * 5
    rows = [{"file_name": f"{n}.jpg", "label": label} for n, label in enumerate(labels)]
    user_corpora.write_lines(tmp_path / "metadata.jsonl", rows)
    for row in rows:
        (tmp_path / row["file_name"]).write_bytes(user_corpora.jpg(1))
    (tmp_path / "boxes.xml").write_text("<boxes/>")
    found = inspection.inspect_corpus(str(tmp_path))
    assert found["labels"] == {"1": 10, "0.0": 5, "0.5": 5}
    assert found["numeric_labels"].startswith("the labels are numbers, 3 values from 0.0 to 1.")
    assert found["unread"] == "boxes.xml"
    inspection.show_inspection(found)
    printed = capsys.readouterr()
    assert "boxes.xml" in printed.out + printed.err
    assert "regression" in printed.err


def test_command_keeps_the_given_options(tmp_path, capsys):
    folder = user_corpora.tnews(tmp_path / "with space")
    options = ["--options.tnews.keywords", "true", "--options.tnews.max_tokens", "64"]
    assert inspect.main([str(folder), *options]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"to prepare it: skillnet prepare --corpus 'tnews={folder}'" in said
    assert said.endswith(" ".join(options))


@pytest.mark.parametrize(
    ("folder", "name"), [("my reviews", "my-reviews"), ("folder", "my-folder"), ("影评", "mine")]
)
def test_two_directories_get_two_names(tmp_path: Path, folder: str, name: str) -> None:
    """A second corpus of the name "folder" would replace the first one."""
    rows = [{"text": f"row {number}", "label": "ab"[number % 2]} for number in range(4)]
    user_corpora.write_lines(tmp_path / folder / "rows.jsonl", rows)
    place = tmp_path / folder
    report = inspection.inspect_corpus(str(place), {"folder": {"text": "text"}})
    words = ["skillnet", "prepare", "--corpus", f"{name}=folder:{place}"]
    assert shlex.split(report["command"]) == [*words, f"--options.{name}.text", "text"]
    reader, path = corpora.parse_reader_prefix(f"folder:{place}") or ("", "")
    corpora.open_external_corpus(name, f"{reader}:{path}", {"text": "text"})


def test_no_command_is_suggested_if_every_row_would_be_rejected(tmp_path, capsys):
    missing = [{"file_name": f"{number}.jpg", "text": "一"} for number in range(3)]
    user_corpora.write_lines(tmp_path / "missing" / "metadata.jsonl", missing)
    (tmp_path / "missing" / "images.zip").write_bytes(b"PK")
    for number in range(4):
        home = tmp_path / "torn" / "train" / "ab"[number % 2]
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{number}.jpg").write_bytes(b"\xff\xd8\xff torn")
    for name in ("missing", "torn"):
        assert inspect.main([str(tmp_path / name)]) == 0
        shown = capsys.readouterr()
        assert "to prepare it" not in shown.err
        assert "prepare would fail: no row can be used" in " ".join(shown.err.split())
        assert ("images.zip: unpack them" in " ".join(shown.out.split())) == (name == "missing")


def test_damaged_rows_above_the_limit_and_duplicates_are_counted(tmp_path, capsys):
    rows = [{"text": f"文{number % 6}", "label": "ab"[number % 2]} for number in range(8)]
    user_corpora.write_lines(tmp_path / "train.jsonl", [*rows, {"text": "", "label": "a"}])
    assert inspect.main([str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "duplicate rows 2 (equal content" in " ".join(shown.out.replace("│", " ").split())
    said = " ".join(shown.err.split())
    assert "1 of 9 rows are damaged, more than 10.0%" in said
    assert "to prepare it" in said


def test_media_are_shown_by_size_and_format(tmp_path: Path) -> None:
    data = user_corpora.jpg(1, (40, 30))
    for number in range(4):
        home = tmp_path / "files" / "train" / "ab"[number % 2]
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{number}.jpg").write_bytes(data)
    size = f"{len(data):,} bytes, JPEG"
    found = inspection.inspect_corpus(str(tmp_path / "files"))
    assert found["example"]["media"]["content"] == size
    cells = pa.array([{"bytes": data, "path": "1.jpg"}] * 3)
    (tmp_path / "embedded").mkdir()
    table = pa.table({"image": cells, "text": ["一", "二", "三"]})
    parquet.write_table(table, tmp_path / "embedded" / "train.parquet")
    found = inspection.inspect_corpus(str(tmp_path / "embedded"))
    assert found["example"]["media"]["content"] == size


def test_empty_folder_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "empty" / "below").mkdir(parents=True)
    with pytest.raises(UserError, match="an empty folder"):
        inspection.inspect_corpus(str(tmp_path / "empty"))


def write_split_texts(folder: Path, test: list[tuple[str, str]]) -> Path:
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(1500)]
    user_corpora.write_lines(folder / "train.jsonl", rows)
    user_corpora.write_lines(
        folder / "test.jsonl", [{"text": text, "label": label} for text, label in test]
    )
    return folder


def test_rows_of_the_training_in_a_test_are_reported(tmp_path, capsys, monkeypatch):
    """Equal texts under another label, and equal media files under another name."""
    monkeypatch.setenv("COLUMNS", "400")
    test = [("text 7", "b"), ("text 1499", "a"), ("unseen", "a")]
    found = inspection.inspect_corpus(str(write_split_texts(tmp_path / "texts", test)))
    assert found["shared"]["test"] == {"train": 2}
    for split, numbers in (("train", range(8)), ("test", (6, 7, 8, 9))):
        for number in numbers:
            home = tmp_path / "media" / split / "ab"[number % 2]
            home.mkdir(parents=True, exist_ok=True)
            (home / f"{split}-{number}.jpg").write_bytes(user_corpora.jpg(number))
    found = inspection.inspect_corpus(str(tmp_path / "media"))
    assert (found["shared"]["test"], found["compared"]) == ({"train": 2}, True)
    inspection.show_inspection(found)
    shown = capsys.readouterr()
    assert "rows of test also in" in shown.out
    assert "2 of 4 rows of test (50.0 %) have the input of a row of train" in shown.err


@pytest.mark.parametrize(
    ("test", "sentence"),
    [
        ([("one", "a"), ("two", "a")], "all rows of test (2) have the same label"),
        ([("one", "a"), ("two", "b")], ""),
    ],
)
def test_a_test_of_one_class_is_reported(tmp_path, test, sentence):
    warnings = inspection.inspect_corpus(str(write_split_texts(tmp_path, test)))["warnings"]
    assert sentence in " ".join(warnings)
    assert bool(warnings) == bool(sentence)


def test_one_class_is_reported(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": "only"} for n in range(30)]
    user_corpora.write_lines(tmp_path / "rows.jsonl", rows)
    (said,) = inspection.inspect_corpus(str(tmp_path))["warnings"]
    assert said.startswith("one class, 'only': every answer is right")


def test_all_rows_count_and_not_the_first_thousand(tmp_path, capsys):
    """Rows are sorted by class, so the first thousand hold two of ten."""
    rows = [{"text": f"text {n}", "label": str(n // 500)} for n in range(5000)]
    user_corpora.write_lines(tmp_path / "rows.jsonl", rows)
    found = inspection.inspect_corpus(str(tmp_path))
    assert found["labels"] == {str(n): 500 for n in range(10)}
    assert "10 values from 0 to 9" in found["numeric_labels"]
    found = inspection.inspect_corpus(str(tmp_path), {"folder": {"task": "values"}})
    assert found["values"] == "0 to 9, mean 4.5"
    inspection.show_inspection(found)
    assert "texts (of the first 1,000 rows)" in capsys.readouterr().out


def test_folders_with_numbers_as_names_are_classes(tmp_path: Path) -> None:
    for number in range(8):
        home = tmp_path / "train" / str(number % 4)
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{number}.jpg").write_bytes(user_corpora.jpg(number))
    found = inspection.inspect_corpus(str(tmp_path))
    assert set(found["labels"]) == {"0", "1", "2", "3"}
    assert found["numeric_labels"] is None


@pytest.mark.parametrize("command", [inspect, prepare, init_task])
def test_options_in_examples_exist(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    keys = re.findall(r"--options\.(\w+)\.(\w+)", capsys.readouterr().out)
    assert keys
    for reader, key in keys:
        found = corpora._find_class(reader if reader in corpora.list_formats() else "folder")
        assert key in {option.name for option in dataclasses.fields(found.Options)}
