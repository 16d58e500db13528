"""README.md of a repository of the Hub: configurations, classes, and files that are missing."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.corpora import detect_reader, open_external_corpus
from pipelines.data.corpora.readers.hub_repository import match_pattern
from pipelines.data.io.directory import SourceDirectory
from skillnet_platform.errors import UserError
from tests.helpers import user_corpora
from tests.unit.pipelines.data.corpora.readers.test_readers import read, sizes


def write_rows(file: Path, count: int, start: int = 0, label: Any = None) -> None:
    """Write texts of the file's own name, as JSON lines or CSV."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"text": f"{file.name} {n}", "label": n % 2 if label is None else label(n)}
        for n in range(start, start + count)
    ]
    if file.suffix == ".csv":
        lines = ["text,label", *(f"{row['text']},{row['label']}" for row in rows)]
        file.write_text("\n".join(lines) + "\n")
    else:
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_card(folder: Path, header: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\nlicense: mit\n{header}---\n# Rows\n\n---\nmore\n")


#: Forms of one statement: the first three files are train, the other ones are test.
STATEMENTS = {
    "splits": """configs:
- config_name: default
  data_files:
  - split: train
    path: ["parts/a.csv", "parts/deep/*.csv"]
  - split: test
    path: held_out/**
""",
    "mapping": """configs:
- data_files: {train: [parts/**], test: "held_out/[st]*.csv"}
""",
    "folder": """configs:
- config_name: main
  data_dir: parts
  data_files: [{split: train, path: "**/*.csv"}]
- config_name: rest
  data_dir: held_out
""",
    "default": """configs:
- config_name: rest
  data_files: held_out/second.csv
- config_name: main
  default: true
  data_files:
  - split: train
    path: parts/**
  - split: test
    path: held_out/*
""",
}


@pytest.mark.parametrize("form", STATEMENTS)
def test_the_card_decides_files_and_splits(tmp_path: Path, form: str) -> None:
    for name, count in (("parts/a.csv", 3), ("parts/deep/b.csv", 4), ("parts/deep/c.csv", 5)):
        write_rows(tmp_path / name, count)
    write_rows(tmp_path / "held_out/second.csv", 2)
    write_rows(tmp_path / "held_out/third.csv", 6)
    write_rows(tmp_path / "train.csv", 1)  # the card does not list it
    write_card(tmp_path, STATEMENTS[form])
    found = detect_reader(SourceDirectory(str(tmp_path)))
    assert found is not None
    assert found[0] == "folder"
    options: dict[str, Any] = {"validation": 0.0}
    if form == "folder":
        with pytest.raises(UserError, match=r"main, rest\. Give .*--options.mine.configuration m"):
            open_external_corpus("mine", f"folder:{tmp_path}", options)
        options |= {"configuration": "main", "test": 0.0}
    rows, reasons = read(open_external_corpus("mine", f"folder:{tmp_path}", options))
    assert not reasons
    assert sizes(rows) == {"train": 12} | ({} if form == "folder" else {"test": 8})
    if form == "default":
        options["configuration"] = "rest"
        rest, _ = read(open_external_corpus("mine", f"folder:{tmp_path}", options))
        assert sum(sizes(rest).values()) == 2
    with pytest.raises(UserError, match=r"no configuration 'mian'; (did you mean|known)"):
        open_external_corpus("mine", f"folder:{tmp_path}", {"configuration": "mian"})


CLASSES = {
    "README.md": """dataset_info:
  features:
  - {name: text, dtype: string}
  - name: label
    dtype:
      class_label:
        names: {"0": bad, "1": good}
  splits:
  - {name: train, num_examples: 8}
  - {name: test, num_examples: 4}
""",
    "one of several": """dataset_info:
- config_name: zh
  features:
  - {name: label, dtype: {class_label: {names: {"0": no, "1": "yes"}}}}
- config_name: default
  features:
  - {name: label, dtype: {class_label: {names: [bad, good]}}}
""",
}


@pytest.mark.parametrize("form", [*CLASSES, "dataset_infos.json"])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_the_card_names_classes(tmp_path: Path, form: str, ending: str) -> None:
    write_rows(tmp_path / "data" / f"train.{ending}", 8)
    write_rows(tmp_path / "data" / f"test.{ending}", 4)
    if form in CLASSES:
        write_card(tmp_path, CLASSES[form])
    else:
        label = {"names": ["bad", "good"], "_type": "ClassLabel"}
        infos = {"default": {"features": {"label": label}}}
        (tmp_path / form).write_text(json.dumps(infos))
    corpus = open_external_corpus("mine", f"folder:{tmp_path}")
    assert corpus.facts() == {"labels": ["bad", "good"]}
    rows, reasons = read(corpus)
    assert not reasons
    assert [row["label"] for row in rows["test"]] == ["bad", "good"] * 2


def test_names_in_rows_are_kept_beside_numbers(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.csv", 8, label=lambda n: ("good", "bad", "0", "1")[n % 4])
    write_card(tmp_path, CLASSES["README.md"])
    rows, _ = read(open_external_corpus("mine", f"folder:{tmp_path}", {"validation": 0.0}))
    found = {row["text"]: row["label"] for each in rows.values() for row in each}
    assert [found[f"train.csv {n}"] for n in range(4)] == ["good", "bad", "bad", "good"]


def test_a_split_without_a_file_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "data" / "train.csv", 8)
    write_card(tmp_path, CLASSES["README.md"])
    open_external_corpus("mine", f"folder:{tmp_path}")
    said = " ".join("".join(capsys.readouterr()).split())
    assert "names the split test, and no file holds it" in said


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("configs:\n- data_files: [{split: train, path: a/none-*.csv}]\n", "lists a/none-.* for"),
        ("configs:\n- data_files: ../other.csv\n", r"'../other.csv' is not a path in the repos"),
        ("configs:\n- data_files: /etc/passwd\n", "'/etc/passwd' is not a path"),
        ("configs:\n- data_files: 'https://host/a.csv'\n", "is not a path in the repository"),
        ("configs:\n- data_files: [5]\n", "data_files of default are not paths by split"),
        ("configs:\n- data_dir: gone\n", "in the folder gone, which is missing"),
        ("configs:\n- data_dir: [a]\n", "data_dir of default is not a folder"),
        ("configs: 5\n", "configs is not a list"),
        ("configs: [\n", "cannot be read: while parsing"),
        ("configs: !!python/object/apply:os.system [true]\n", "cannot be read: could not determ"),
        (f"configs: {'[' * 200}\n", "cannot be read: .*deeper"),
        (f"dataset_info: {'x' * 600_000}\n", "cannot be read"),
        (
            "configs:\n- data_files: {train: '*.csv', test: a*.csv}\n",
            "a.csv belongs to the splits train and test",
        ),
        (
            "dataset_info:\n  features:\n  - {name: label, dtype: {class_label: {names: "
            '{"0": a, "2": b}}}}\n',
            "classes of label are not numbered",
        ),
    ],
)
def test_odd_cards_are_a_user_error(tmp_path: Path, header: str, message: str) -> None:
    write_rows(tmp_path / "a.csv", 4)
    write_rows(tmp_path / "b.csv", 4)
    write_card(tmp_path, header)
    with pytest.raises(UserError, match=message) as caught:
        open_external_corpus("mine", f"folder:{tmp_path}")
    assert "README.md" in str(caught.value)


@pytest.mark.parametrize("text", ["# Rows\nconfigs: 5\n", "---\nlicense: [\n---\n", ""])
def test_other_texts_do_not_matter(tmp_path: Path, text: str) -> None:
    write_rows(tmp_path / "train.csv", 8)
    (tmp_path / "README.md").write_text(text)
    rows, _ = read(open_external_corpus("mine", f"folder:{tmp_path}"))
    assert sum(sizes(rows).values()) == 8


def test_a_card_that_lists_media_leaves_them_to_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / "1.jpg").write_bytes(user_corpora.jpg(1))
    write_card(tmp_path, "configs:\n- data_files: [{split: train, path: train/**}]\n")
    rows, _ = read(open_external_corpus("mine", f"folder:{tmp_path}", {"validation": 0.0}))
    assert sizes(rows) == {"test": 2, "train": 2}
    assert "lists media" in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train-00000-of-00003", "train-00002-of-00003"], "1 of 3 shards missing: .*train-00001-"),
        (["train-00001-of-00002"], "train-00000-of-00002"),
        (["train-00001-of-00003", "train-00003-of-00003"], "train-00002-of-00003"),
        (["train-00000-of-00002-0123456789abcdef"], "train-00001-of-00002"),
        (["train-00000-of-00001", "test-00000-of-00002"], "test-00001-of-00002"),
        (["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"], "several vers"),
        (["train-00000-of-00001-0123456789abcdef", "train-00000-of-00001"], "several versions"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_missing_shards_are_named(
    tmp_path: Path, files: list[str], message: str, ending: str
) -> None:
    for number, file in enumerate(files):
        write_rows(tmp_path / "data" / f"{file}.{ending}", 4, 4 * number)
    write_card(tmp_path, "")
    with pytest.raises(UserError, match=message):
        open_external_corpus("mine", f"folder:{tmp_path}")
    # A file that the user names is the whole corpus.
    open_external_corpus("mine", f"folder:{tmp_path}/data/{files[0]}.{ending}")


def test_shards_that_count_from_one_are_complete(tmp_path: Path) -> None:
    for number in (1, 2):
        write_rows(tmp_path / "data" / f"train-{number:05d}-of-00002.csv", 4, 4 * number)
    write_card(tmp_path, "")
    rows, _ = read(open_external_corpus("mine", f"folder:{tmp_path}"))
    assert sum(sizes(rows).values()) == 8


@pytest.mark.parametrize(
    ("pattern", "file", "is_match"),
    [
        ("**", "a/b/c.csv", True),
        ("**/*.csv", "c.csv", True),
        ("a/**/c.csv", "a/c.csv", True),
        ("a/**/c.csv", "a/x/y/c.csv", True),
        ("*.csv", "a/c.csv", False),
        ("a/*", "a/b/c.csv", False),
        ("a/?.csv", "a/b.csv", True),
        ("a/**/b/**/d", "a/b/c/c/d", True),
        ("a/**/b", "b", False),
        ("/".join(["**", "a*"] * 40) + "/b", "/".join(["a"] * 200), False),
    ],
)
def test_patterns_match_as_in_glob(pattern: str, file: str, is_match: bool) -> None:
    assert match_pattern(pattern, file) == is_match
