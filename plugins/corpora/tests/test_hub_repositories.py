"""Repositories of the Hugging Face Hub, and Parquet files with embedded media.

Media beside rows, or inside them, are read or asked about, and never dropped in silence.
"""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.corpora import detect_reader, open_external_corpus
from pipelines.data.corpora.base import JOINED_ROW, SourceArchives
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.preprocessing.blocks import ReadSummary, RowBlock, read_blocks
from pipelines.data.preprocessing.inspection import inspect_corpus
from skillnet_corpora.readers.hub_repository import match_pattern
from skillnet_platform.errors import UserError
from tests.helpers import user_corpora
from tests.helpers.corpus_rows import media, read, sizes
from tests.helpers.hub_repositories import MEDIA_STRUCT, embed, write_repository

TEXT = pa.string()


def pictures(count: int, start: int = 0, **fields: Any) -> list[dict[str, Any]]:
    """Return rows with different images."""
    made = []
    for number in range(start, start + count):
        image = user_corpora.jpg(number, (40 + number, 40))
        row = {name: value(number) for name, value in fields.items()}
        made.append({"image": embed(image, f"{number}.jpg"), **row})
    return made


def test_images_with_class_names_in_sharded_splits(tmp_path: Path) -> None:
    columns = {"image": "Image", "kind": ["circle", "square", "line"]}
    splits = {
        "train": pictures(12, kind=lambda n: n % 3),
        "validation": pictures(4, 20, kind=lambda n: n % 3),
        "test": pictures(5, 40, kind=lambda n: n % 3),
    }
    write_repository(tmp_path, columns, splits, shards=3)
    found = detect_reader(SourceDirectory(str(tmp_path)))
    assert found[0] == "folder"
    corpus = open_external_corpus("mine", f"folder:{tmp_path}")
    assert (corpus.modality, corpus.task) == ("image", "image_classification")
    assert corpus.facts() == {"labels": ["circle", "square", "line"]}
    assert corpus.num_source_files() == 9
    rows, reasons = read(corpus)
    assert not reasons
    assert sizes(rows) == {"test": 5, "train": 12, "validation": 4}
    assert [media(row) for row in rows["train"]] == [r["image"]["bytes"] for r in splits["train"]]
    assert [row["label"] for row in rows["test"]] == ["square", "line", "circle", "square", "line"]
    (first, second) = rows["train"][3:5]
    assert (first["file"], first["row"]) == ("data/train-00000-of-00003.parquet", 4)
    assert (second["file"], second["row"]) == ("data/train-00001-of-00003.parquet", 1)


def test_audio_with_transcripts(tmp_path: Path) -> None:
    columns = {"audio": "Audio", "speaker_id": pa.int64(), "transcription": TEXT}
    rows = [
        {
            "audio": embed(user_corpora.wav(n, 8000 + n)),
            "speaker_id": n,
            "transcription": f"第{n}句",
        }
        for n in range(9)
    ]
    write_repository(tmp_path, columns, {"train": rows[:6], "test": rows[6:]})
    corpus = open_external_corpus("mine", f"folder:{tmp_path}", {"validation": 0.0})
    assert (corpus.modality, corpus.task) == ("sound", "speech_recognition")
    found, reasons = read(corpus)
    assert not reasons
    assert sizes(found) == {"test": 3, "train": 6}
    assert [media(row) for row in found["test"]] == [row["audio"]["bytes"] for row in rows[6:]]
    assert found["test"][0]["text"] == "第6句"
    corpus.scan_labels()
    built = corpus.build_columns(pa.Table.from_pylist(found["test"], corpus.raw_schema))
    assert built["rejected"].to_pylist() == [None] * 3
    assert min(built["frames"].to_pylist()) > 10


@pytest.mark.parametrize("kind", ["struct", "bytes"])
@pytest.mark.parametrize("place", ["", "pictures.parquet"])
def test_embedded_images_without_features(tmp_path: Path, kind: str, place: str) -> None:
    rows = pictures(8, caption=lambda n: f"图{n}")
    cells = [row["image"] if kind == "struct" else row["image"]["bytes"] for row in rows]
    column = pa.array(cells, MEDIA_STRUCT if kind == "struct" else pa.binary())
    texts = [row["caption"] for row in rows]
    table = pa.table({"picture": column, "caption": texts, "mask": column})
    pq.write_table(table, tmp_path / (place or "train.parquet"))
    corpus = open_external_corpus("mine", f"folder:{tmp_path / place}")
    assert (corpus.modality, corpus.task) == ("image", "text_to_image")
    found, reasons = read(corpus)
    assert not reasons
    everything = [row for each in found.values() for row in each]
    read_back = {row["captions"][0]: media(row) for row in everything}
    assert read_back == {row["caption"]: row["image"]["bytes"] for row in rows}


def test_damaged_and_missing_media_are_rejected(tmp_path: Path) -> None:
    rows = pictures(9, label=lambda n: n % 2)
    rows[2]["image"] = embed(None)
    rows[3]["image"] = embed(b"")
    rows[4]["image"] = embed(b"\xff\xd8\xff cut short")
    rows[5]["image"] = None
    write_repository(tmp_path, {"image": "Image", "label": ["a", "b"]}, {"train": rows})
    corpus = open_external_corpus("mine", f"folder:{tmp_path}")
    found, reasons = read(corpus)
    assert reasons == {"no media file": 2}
    kept = [row for each in found.values() for row in each]
    built = corpus.build_columns(pa.Table.from_pylist(kept, corpus.raw_schema))
    rejected = [reason for reason in built["rejected"].to_pylist() if reason]
    assert len(kept) == 7
    assert "an empty file" in rejected
    assert len(rejected) == 2


def test_media_of_an_unknown_format_need_the_modality(tmp_path: Path) -> None:
    column = pa.array([embed(f"?{n}".encode()) for n in range(4)], MEDIA_STRUCT)
    pq.write_table(pa.table({"thing": column, "label": list("abab")}), tmp_path / "train.parquet")
    with pytest.raises(
        UserError, match=r"train\.parquet: the format of .* column thing .*modality"
    ):
        open_external_corpus("mine", f"folder:{tmp_path}")
    corpus = open_external_corpus("mine", f"folder:{tmp_path}", {"modality": "sound"})
    assert corpus.task == "sound_classification"


def test_images_alone_are_for_pretraining(tmp_path: Path) -> None:
    write_repository(tmp_path, {"image": "Image"}, {"train": pictures(5)})
    corpus = open_external_corpus("mine", f"folder:{tmp_path}")
    assert (corpus.task, len(list(corpus.rows(SourceArchives.none())))) == ("masked_image", 5)


def test_inspect_shows_no_bytes_of_media(tmp_path: Path) -> None:
    rows = pictures(6, caption=lambda n: f"图{n}")
    write_repository(tmp_path, {"image": "Image", "caption": TEXT}, {"train": rows})
    report = inspect_corpus(str(tmp_path))
    assert (report["reader"], report["task"]) == ("folder", "text_to_image")
    assert not any(isinstance(value, bytes) for value in report["source"].values())
    assert report["media"]["decoded"] == 6
    assert not report["media"]["rejected"]


def test_prepared_counts_are_complete(tmp_path: Path) -> None:
    """Rows in are rows out and rejected rows, each with its reason."""
    rows = pictures(10, caption=lambda n: f"图{n}") * 2
    rows += [{"image": embed(b"\xff\xd8\xff cut short"), "caption": "damaged"}] * 3
    rows += [{"image": embed(None), "caption": "none"}, {"image": rows[0]["image"], "caption": ""}]
    write_repository(tmp_path, {"image": "Image", "caption": TEXT}, {"train": rows}, shards=2)
    corpus = open_external_corpus("mine", f"folder:{tmp_path}")
    *blocks, summary = read_blocks(corpus, SourceArchives.none(), tmp_path / "rejected.jsonl")
    assert isinstance(summary, ReadSummary)
    assert summary.rows == len(rows)
    assert summary.rejections == {
        JOINED_ROW: 12,
        "no media file": 1,
        "an image without captions": 1,
    }
    assert summary.errors == {"no media file": 1}
    tables = [block.table for block in blocks if isinstance(block, RowBlock)]
    built = [corpus.build_columns(table)["rejected"].to_pylist() for table in tables]
    reasons = [reason for each in built for reason in each]
    assert len(reasons) == 11
    assert sum(reason is not None for reason in reasons) == 1


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
def test_several_media_in_a_cell_are_refused(tmp_path, kind, capsys):
    pq.write_table(embedded_lists(kind), tmp_path / "train.parquet")
    message = r"train\.parquet: the column images holds .*one row per media file.*modality text"
    with pytest.raises(UserError, match=message):
        open_external_corpus("mine", f"folder:{tmp_path}")
    corpus = open_external_corpus("mine", f"folder:{tmp_path}", {"modality": "text"})
    rows, reasons = read(corpus)
    assert not reasons
    assert sum(map(len, rows.values())) == 24
    assert "media in the column images are not read" in " ".join(capsys.readouterr().err.split())


def test_several_media_in_a_saved_dataset(tmp_path, capsys):
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
