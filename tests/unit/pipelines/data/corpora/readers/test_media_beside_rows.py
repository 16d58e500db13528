"""Media beside rows, or inside them, are read or asked about, and never dropped in silence."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.corpora import detect_reader, open_external_corpus
from pipelines.data.io.directory import SourceDirectory
from skillnet_platform.errors import UserError
from tests.helpers import user_corpora
from tests.helpers.archive_files import tarred
from tests.helpers.hub_repositories import MEDIA_STRUCT, embed
from tests.unit.pipelines.data.corpora.readers.test_field_names import write
from tests.unit.pipelines.data.corpora.readers.test_readers import media, read


def write_pictures(folder: Path, names: list[str]) -> dict[str, bytes]:
    made = {}
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        made[name] = user_corpora.jpg(number, (40 + number, 40))
        (folder / name).write_bytes(made[name])
    return made


#: Names of pictures by number, the value of the row, and the field: nothing names them as usual.
LAYOUTS = {
    "ids without ending": ("train/{n:05d}.jpg", "{n:05d}", "id"),
    "numbers": ("train/{n}.jpg", 1, "id"),
    "unknown field": ("pictures/{n}.jpg", "{n}.jpg", "photo"),
    "unknown field with folders": ("a/b/{n}.jpg", "a/b/{n}.jpg", "location"),
    "part of the path": ("a/b/c/{n}.jpg", "c/{n}", "location"),
    "known field without ending": ("images/{n}.png", "{n}", "image"),
    "beside the rows": ("{n}.jpg", "{n}", "key"),
    "dots in the name": ("train/v1.{n}.jpg", "v1.{n}", "id"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("text", [{}, {"text": "words"}])
def test_the_field_that_names_media_is_asked_for(
    tmp_path: Path, layout: str, ending: str, text: dict[str, str]
) -> None:
    place, value, field = LAYOUTS[layout]
    made = write_pictures(tmp_path, [place.format(n=n) for n in range(12)])
    rows = [
        {
            field: n if isinstance(value, int) else value.format(n=n),
            **{key: f"{words} {n % 2}" for key, words in text.items()},
            "label": f"class {n % 2}",
        }
        for n in range(12)
    ]
    write(tmp_path / f"train.{ending}", rows)
    found = detect_reader(SourceDirectory(str(tmp_path)))
    assert found is not None
    remedy = (
        rf"12 media files lie beside .* the field {field} names them.*options\.mine\.file {field}"
    )
    with pytest.raises(UserError, match=remedy):
        open_external_corpus("mine", f"folder:{tmp_path}")
    options = {"file": field, "task": "labels"}
    corpus = open_external_corpus("mine", f"folder:{tmp_path}", options)
    assert (corpus.modality, corpus.task) == ("image", "image_classification")
    read_rows, reasons = read(corpus)
    assert not reasons
    pairs = [(media(row), row["label"]) for each in read_rows.values() for row in each]
    expected = [(made[place.format(n=n)], f"class {n % 2}") for n in range(12)]
    assert sorted(pairs) == sorted(expected)


def embedded_lists(kind: str) -> pa.Table:
    pictures = [[embed(user_corpora.jpg(2 * n + k)) for k in range(2)] for n in range(24)]
    columns: dict[str, Any] = {"text": [f"words {n}" for n in range(24)], "label": list("ab" * 12)}
    if kind == "bytes":
        cells = [[each["bytes"] for each in row] for row in pictures]
        columns["images"] = pa.array(cells, pa.list_(pa.binary()))
    elif kind == "struct":
        inner = pa.struct([("pictures", pa.list_(MEDIA_STRUCT)), ("note", pa.string())])
        columns["images"] = pa.array([{"pictures": row, "note": "x"} for row in pictures], inner)
    else:
        columns["images"] = pa.array(pictures, pa.list_(MEDIA_STRUCT))
    table = pa.table(columns)
    if kind == "features":
        features = {"images": {"feature": {"_type": "Image"}, "_type": "List"}}
        described = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(described)
    return table


@pytest.mark.parametrize("kind", ["structs", "bytes", "struct", "features"])
def test_several_media_in_a_cell_are_refused(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(embedded_lists(kind), tmp_path / "train.parquet")
    message = r"train\.parquet: the column images holds .*one row per media file.*modality text"
    with pytest.raises(UserError, match=message):
        open_external_corpus("mine", f"folder:{tmp_path}")
    corpus = open_external_corpus("mine", f"folder:{tmp_path}", {"modality": "text"})
    rows, reasons = read(corpus)
    assert not reasons
    assert sum(map(len, rows.values())) == 24
    assert "media in the column images are not read" in " ".join(capsys.readouterr().err.split())


def test_several_media_in_a_saved_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [[embed(user_corpora.jpg(n))] * 2 for n in range(12)]
    features = datasets.Features(
        {"text": datasets.Value("string"), "images": datasets.Sequence(datasets.Image())}
    )
    rows = {"text": [f"words {n}" for n in range(12)], "images": pictures}
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "saved"))
    place = f"hf_dataset:{tmp_path / 'saved'}"
    with pytest.raises(UserError, match=r"the column images holds .*one row per media file"):
        open_external_corpus("mine", place)
    assert open_external_corpus("mine", place, {"modality": "text"}).modality == "text"
    assert "media in the column images are not read" in " ".join(capsys.readouterr().err.split())


def test_a_tar_of_texts_with_media_further_on(tmp_path: Path) -> None:
    files = {f"{n:04d}.txt": b"words" for n in range(120)}
    files |= {f"{n:04d}.cls": b"1" for n in range(120)}
    files["0119.jpg"] = user_corpora.jpg(1)
    packed = tarred({name: files[name] for name in sorted(files)})
    (tmp_path / "x.tar.gz").write_bytes(packed)
    _, reasons = read(open_external_corpus("webdataset", str(tmp_path)))
    assert sum(reasons.values()) == 1
    assert "a media file in a sample" in next(iter(reasons))


def test_a_tar_of_media_read_as_texts_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"1.jpg": user_corpora.jpg(1), "1.txt": b"words", "1.cls": b"1"}
    (tmp_path / "x.tar.gz").write_bytes(tarred(files))
    corpus = open_external_corpus("webdataset", str(tmp_path), {"modality": "text"})
    assert corpus.modality == "text"
    assert "the media in the samples (.jpg) are not read" in " ".join(
        capsys.readouterr().err.split()
    )
