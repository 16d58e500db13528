"""Names of columns: capitals and blanks, equal names, and texts that would stay unread."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.corpora import open_external_corpus
from skillnet_corpora.readers.metadata_tables import find_file_field
from skillnet_platform.errors import UserError
from tests.helpers.corpus_rows import read

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


def test_field_of_files_in_capitals() -> None:
    assert find_file_field([{"Image": "a.JPG"}]) == ("Image", "jpg")
