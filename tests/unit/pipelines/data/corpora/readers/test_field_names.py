"""Names of columns: capitals and blanks, equal names, and texts that would stay unread."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.corpora import open_external_corpus
from pipelines.data.corpora.readers.metadata_tables import find_file_field
from skillnet_platform.errors import UserError
from tests.helpers import user_corpora
from tests.unit.pipelines.data.corpora.readers.test_readers import read, sizes

WORDS = ("a man sleeps on the wide sofa", "two dogs run over the green hill")


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format of the file's ending; a saved dataset into a folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.suffix:
        datasets.Dataset.from_list(rows).save_to_disk(str(file))
    elif file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        file.write_text("\n".join(lines) + "\n")
    else:
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def open_rows(file: Path, **options: Any) -> Any:
    reader = "folder" if file.suffix else "hf_dataset"
    return open_external_corpus("mine", f"{reader}:{file}", options)


def everything(corpus: Any) -> list[dict[str, Any]]:
    rows, reasons = read(corpus)
    assert not reasons
    return [row for each in rows.values() for row in each]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet", "saved"])
@pytest.mark.parametrize(
    "fields", [("ID", " Text ", "Label"), ("id", "TEXT", "LABEL "), ("Id", "Sentence", "Category")]
)
def test_capitals_and_blanks_of_names_do_not_matter(
    tmp_path: Path, name: str, fields: tuple[str, str, str]
) -> None:
    rows = [dict(zip(fields, (n, f"words {n}", "ab"[n % 2]), strict=True)) for n in range(12)]
    corpus = open_rows(write(tmp_path / name, rows))
    assert corpus.task == "text_classification"
    found = {row["text"]: row["label"] for row in everything(corpus)}
    assert found == {f"words {n}": "ab"[n % 2] for n in range(12)}
    # The options take the name in any of these forms, too.
    again = open_rows(tmp_path / name, text=fields[1].strip().lower(), label=fields[2].upper())
    assert len(everything(again)) == 12


def test_files_can_write_names_differently(tmp_path: Path) -> None:
    names = {"train": ("Text", "Label"), "test": ("text", " LABEL")}
    for split, (text, label) in names.items():
        rows = [{text: f"{split} {n}", label: n % 2} for n in range(6)]
        write(tmp_path / f"{split}.jsonl", rows)
    corpus = open_external_corpus("mine", f"folder:{tmp_path}", {"validation": 0.0})
    found, reasons = read(corpus)
    assert not reasons
    assert sizes(found) == {"test": 6, "train": 6}
    assert [row["label"] for row in found["test"]] == ["0", "1"] * 3


def test_media_splits_and_speakers_in_capitals(tmp_path: Path) -> None:
    rows = [
        {"File_Name": f"{n}.wav", "Transcription": f"w {n}", "Speaker_ID": n // 2, "SPLIT ": split}
        for n, split in enumerate(["train"] * 4 + ["dev"] * 2 + ["test"] * 2)
    ]
    for n in range(8):
        (tmp_path / f"{n}.wav").write_bytes(user_corpora.wav(n))
    write(tmp_path / "metadata.csv", rows)
    corpus = open_external_corpus("mine", f"folder:{tmp_path}")
    assert corpus.task == "speech_recognition"
    found, reasons = read(corpus)
    assert not reasons
    assert sizes(found) == {"test": 2, "train": 4, "validation": 2}
    assert [row["unit"] for row in found["train"]] == ["0", "0", "1", "1"]
    by_name = {"split": "split", "split_by": "speaker_id", "text": "TRANSCRIPTION"}
    again, _ = read(open_external_corpus("mine", f"folder:{tmp_path}", by_name))
    assert again == found


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_names_that_differ_in_case_only_are_ambiguous(tmp_path: Path, name: str) -> None:
    rows = [{"Text": f"one {n}", "text": f"two {n}", "label": n % 2} for n in range(12)]
    file = write(tmp_path / name, rows)
    with pytest.raises(UserError, match=r"Text, text differ only in .*options\.mine\.text"):
        open_rows(file)
    for chosen, word in (("Text", "one"), ("text", "two")):
        assert {row["text"].split()[0] for row in everything(open_rows(file, text=chosen))} == {
            word
        }
    with pytest.raises(UserError, match="Text, text differ only in"):
        open_rows(file, text="TEXT")


@pytest.mark.parametrize(
    "header", ["text,label,text", "text, label ,label", "id,text,label,id", "text,label,x,y,x"]
)
def test_two_columns_of_one_name_are_refused(tmp_path: Path, header: str) -> None:
    names = [name.strip() for name in header.split(",")]
    repeated = next(name for name in names if names.count(name) > 1)
    first, second = (n for n, name in enumerate(names, start=1) if name == repeated)
    message = f"the columns {first} and {second} are both called {repeated}"
    line = ",".join(f"v{n}" for n in range(len(names)))
    (tmp_path / "rows.csv").write_text("\n".join([header, *[line] * 9]) + "\n")
    with pytest.raises(UserError, match=message):
        open_rows(tmp_path / "rows.csv")
    arrays = [pa.array(["x", "y"] * 6) for _ in names]
    table = pa.Table.from_arrays(arrays, names=names)
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=message):
        open_rows(tmp_path / "rows.parquet")
    write(tmp_path / "saved", [{"text": "x", "label": "y"}])
    (tmp_path / "saved" / "data-00000-of-00001.arrow").unlink()
    with pa.ipc.new_stream(tmp_path / "saved" / "data-00000-of-00001.arrow", table.schema) as out:
        out.write_table(table)
    _, reasons = read(open_rows(tmp_path / "saved"))
    assert list(reasons) == [f"{message}; rename one of them"]


def test_columns_without_a_name_may_repeat(tmp_path: Path) -> None:
    lines = ["text,label,,", *(f"words {n},{n % 2},," for n in range(9))]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    assert len(everything(open_rows(tmp_path / "rows.csv"))) == 9


#: Fields of two texts -> the field that is read by default, if there is one.
PAIRS = {
    ("text", "text_pair"): "text",
    ("title", "text"): "text",
    ("sentence", "notes"): "sentence",
    ("premise", "hypothesis"): None,
    ("question", "context"): None,
    ("Sentence1", "Sentence2"): None,
    ("review", "reply"): None,
}


@pytest.mark.parametrize("fields", PAIRS)
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet", "saved"])
def test_a_second_text_is_not_dropped_in_silence(
    tmp_path: Path, fields: tuple[str, str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            fields[0]: f"{WORDS[0]} {n}",
            fields[1]: f"{WORDS[1]} {n}",
            "label": ("same", "other")[n % 2],
            "source": "the daily news site",
            "url": f"https://host/{n}",
        }
        for n in range(12)
    ]
    file = write(tmp_path / name, rows)
    remedy = f"--options.mine.text {','.join(fields)}"
    if PAIRS[fields] is None:
        with pytest.raises(UserError, match=remedy):
            open_rows(file)
    else:
        assert everything(open_rows(file))[0]["text"] in [row[PAIRS[fields]] for row in rows]
        said = " ".join(capsys.readouterr().err.split())
        assert remedy in said
        assert "source" not in said
        open_rows(file, text=PAIRS[fields])
        assert "--options.mine.text" not in " ".join(capsys.readouterr().err.split())
    for order in (fields, fields[::-1]):
        joined = everything(open_rows(file, text=",".join(order)))
        expected = ["\n".join(row[each] for each in order) for row in rows]
        assert sorted(row["text"] for row in joined) == sorted(expected)


def test_blank_parts_are_left_out_and_blank_rows_rejected(tmp_path: Path) -> None:
    parts = [("a", "b"), ("", "b"), ("a", None), ("", "")]
    rows = [{"title": a, "text": b, "label": n % 2} for n, (a, b) in enumerate(parts * 3)]
    rows_by_split, reasons = read(open_rows(write(tmp_path / "r.jsonl", rows), text="title,text"))
    texts = [row["text"] for each in rows_by_split.values() for row in each]
    assert sorted(texts) == ["a"] * 3 + ["a\nb"] * 3 + ["b"] * 3
    assert reasons == {"an empty text": 3}


def test_joined_texts_are_checked(tmp_path: Path) -> None:
    rows = [{"premise": WORDS[0], "hypothesis": WORDS[1], "label": n % 2} for n in range(9)]
    file = write(tmp_path / "rows.csv", rows)
    with pytest.raises(UserError, match="no field 'hypotheses'; did you mean 'hypothesis'"):
        open_rows(file, text="premise,hypotheses")


def test_a_second_caption_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for n in range(6):
        (tmp_path / f"{n}.jpg").write_bytes(user_corpora.jpg(n))
        texts = {"caption": f"{WORDS[0]} {n}", "alt_text": f"{WORDS[1]} {n}"}
        rows.append({"file_name": f"{n}.jpg", **texts})
    write(tmp_path / "metadata.jsonl", rows)
    open_external_corpus("mine", f"folder:{tmp_path}")
    said = " ".join(capsys.readouterr().err.split())
    assert "not the texts of alt_text" in said
    with pytest.raises(UserError, match="several fields are joined for texts only"):
        open_external_corpus("mine", f"folder:{tmp_path}", {"text": "caption,alt_text"})


def test_field_of_files_in_capitals() -> None:
    assert find_file_field([{"Image": "a.JPG"}]) == ("Image", "jpg")
