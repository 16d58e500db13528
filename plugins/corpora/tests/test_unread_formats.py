"""Formats that no reader reads are named with the remedy; partitioned tables are read."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.corpora import open_external_corpus
from pipelines.data.preprocessing.inspection import inspect_corpus
from skillnet_platform.errors import UserError
from tests.helpers import user_corpora
from tests.helpers.corpus_rows import read, sizes

ROWS = "text,label\na,x\nb,y\n"


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
    return folder


#: Name of a file -> parts of the message.
FILES = {
    "train.xlsx": r"train\.xlsx.*Excel.*save it as CSV",
    "Train.XLS": r"Train\.XLS.*Excel.*save it as CSV",
    "sheet.ods": "save it as CSV",
    "rows.sqlite3": r"SQLite.*-csv",
    "rows.db": "SQLite",
    "train.tfrecord": r"TFRecord.*Parquet",
    "train.tfrecord-00000-of-00001": r"TFRecord.*Parquet",
    "data.mdb": r"LMDB.*Parquet",
    "rows.pkl": r"pickle.*run code.*Parquet",
    "model.pt": r"pickle.*run code",
    "train.npz": r"NumPy.*Parquet",
    "train.h5": r"HDF5.*Parquet",
    "rows.feather": r"Feather.*Parquet",
    "rows.arrow": r"Arrow.*Parquet",
    "rows.orc": "ORC",
    "rows.avro": "Avro",
    "train.rec": "RecordIO",
    "rows.jsonl.zst": r"Zstandard.*unzstd",
    "train-images-idx3-ubyte": "IDX",
    "train-images-idx3-ubyte.gz": "IDX",
    "rows.sav": "SPSS",
    "rows.rds": "R data",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_an_unread_format_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, {f"alone/{name}": b"PK\x03\x04", f"below/data/{name}": b"\0\1"})
    for place in ("alone", f"alone/{name}", "below"):
        for reader in ("", "folder:"):
            with pytest.raises(UserError, match=FILES[name]) as caught:
                inspect_corpus(f"{reader}{tmp_path}/{place}")
            assert "neither a metadata" not in str(caught.value)
            assert "no readable row" not in str(caught.value)


def test_an_unread_file_beside_rows_is_reported_with_its_remedy(tmp_path: Path) -> None:
    write(tmp_path, {"train.csv": ROWS, "test.xlsx": b"PK\x03\x04", "more.h5": b"x"})
    report = inspect_corpus(f"folder:{tmp_path}")
    assert "test.xlsx (Excel: save it as CSV)" in report["unread"]
    assert "more.h5 (HDF5: " in report["unread"]


def test_leftovers_of_windows_are_no_database(tmp_path: Path) -> None:
    write(tmp_path, {"train.csv": ROWS, "Thumbs.db": b"x"})
    assert not inspect_corpus(f"folder:{tmp_path}")["unread"]


DETECTION = {
    "images": [{"id": 1, "file_name": "1.jpg"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 1]}],
    "categories": [{"id": 3, "name": "cat"}],
}
PICTURE = user_corpora.jpg(1)
#: Layout -> its files, and parts of the message.
LAYOUTS: dict[str, tuple[dict[str, str | bytes], str]] = {
    "Delta": (
        {"_delta_log/00000000000000000000.json": "{}", "part-00000.snappy.parquet": b"x"},
        r"a Delta table.*removed rows.*Parquet",
    ),
    "Iceberg": (
        {"metadata/v1.metadata.json": "{}", "data/00000-0.parquet": b"x"},
        r"an Iceberg table.*Parquet",
    ),
    "Kaldi": (
        {
            **{f"{s}/wav.scp": "u1 /w/u1.wav\n" for s in ("train", "test")},
            **{f"{s}/text": "u1 words\n" for s in ("train", "test")},
            "wav/s1/u1.wav": b"x",
            "wav/s2/u2.wav": b"x",
        },
        r"Kaldi \(test/wav\.scp\).*metadata\.jsonl.*transcription",
    ),
    "Kaldi in one folder": ({"wav.scp": "u1 u1.wav\n", "text": "u1 w\n"}, r"Kaldi \(wav\.scp\)"),
    "COCO detection": (
        {
            "annotations/instances_train2017.json": json.dumps(DETECTION),
            "train2017/1.jpg": PICTURE,
            "val2017/2.jpg": PICTURE,
        },
        r"COCO.*instances_train2017\.json.*boxes.*metadata\.csv.*captions_",
    ),
    "Roboflow": (
        {
            "train/_annotations.coco.json": json.dumps(DETECTION),
            "train/1.jpg": PICTURE,
            "valid/2.jpg": PICTURE,
        },
        r"COCO.*_annotations\.coco\.json.*boxes",
    ),
    "YOLO": (
        {
            "data.yaml": "names: [cat]\n",
            "images/train/1.jpg": PICTURE,
            "images/val/2.jpg": PICTURE,
            "labels/train/1.txt": "0 0.5 0.5 0.1 0.1\n",
            "labels/val/2.txt": "",
        },
        r"YOLO.*labels/train/1\.txt.*boxes.*metadata\.csv",
    ),
    "YOLO by split": (
        {
            "train/images/1.jpg": PICTURE,
            "train/labels/1.txt": "0 0.5 0.5 0.1 0.1\n1 0.1 0.1 0.2 0.2\n",
            "valid/images/2.jpg": PICTURE,
            "valid/labels/2.txt": "1 0.5 0.5 0.1 0.1\n",
        },
        r"YOLO.*labels.*boxes",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_is_not_read_is_named(tmp_path: Path, layout: str) -> None:
    files, message = LAYOUTS[layout]
    write(tmp_path, files)
    for reader in ("", "folder:"):
        with pytest.raises(UserError, match=message):
            inspect_corpus(f"{reader}{tmp_path}")


@pytest.mark.parametrize("name", ["instances_val.json", "boxes.json"])
def test_a_file_of_boxes_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, {name: json.dumps(DETECTION)})
    with pytest.raises(UserError, match=r"COCO.*boxes"):
        inspect_corpus(f"{tmp_path}/{name}")


def test_captions_beside_boxes_are_read(tmp_path: Path) -> None:
    captions = DETECTION | {"annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]}
    files = {
        "annotations/instances_train2017.json": json.dumps(DETECTION),
        "annotations/captions_train2017.json": json.dumps(captions),
        "train2017/1.jpg": PICTURE,
    }
    report = inspect_corpus(str(write(tmp_path, files)))
    assert (report["task"], report["rows"]) == ("text_to_image", 1)


def test_metadata_beside_another_layout_are_read(tmp_path: Path) -> None:
    files, _ = LAYOUTS["YOLO"]
    rows = "file_name,label\nimages/train/1.jpg,cat\nimages/val/2.jpg,dog\n"
    report = inspect_corpus(str(write(tmp_path, {**files, "metadata.csv": rows})))
    assert report["task"] == "image_classification"


#: Folders of a partitioned table -> splits of its rows.
PARTITIONS = {
    "split=train/part-0.{}": "train",
    "split=train/part-1.{}": "train",
    "split=dev/part-0.{}": "validation",
    "split=test/part-0.{}": "test",
}


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_partition_is_a_split(tmp_path: Path, ending: str) -> None:
    for name in PARTITIONS:
        write_part(tmp_path / name.format(ending), [{"text": name, "label": "x"}] * 3)
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / "split=train" / "_metadata").write_text("")
    found, reasons = read(open_external_corpus("mine", f"folder:{tmp_path}"))
    assert not reasons
    assert sizes(found) == {"test": 3, "train": 6, "validation": 3}
    assert all(PARTITIONS[row["text"]] == split for split in found for row in found[split])
    assert inspect_corpus(str(tmp_path))["rows"] == 12


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("order", ["split={s}/label={c}/0.{e}", "label={c}/Split={s}/0.{e}"])
def test_a_partition_is_a_value_of_its_rows(tmp_path: Path, ending: str, order: str) -> None:
    for split in ("train", "test"):
        for name in ("good", "very%20bad"):
            place = order.format(s=split, c=name, e=ending)
            write_part(tmp_path / place, [{"text": f"{split} {name} {n}"} for n in range(4)])
    corpus = open_external_corpus("mine", f"folder:{tmp_path}", {"validation": 0.0})
    assert corpus.task == "text_classification"
    found, reasons = read(corpus)
    assert not reasons
    assert sizes(found) == {"test": 8, "train": 8}
    for split, rows in found.items():
        for row in rows:
            assert row["text"].startswith(split)
            assert row["label"] == ("good" if "good" in row["text"] else "very bad")


def test_the_default_partition_has_no_value(tmp_path: Path) -> None:
    for value in ("a", "b", "__HIVE_DEFAULT_PARTITION__"):
        write_part(tmp_path / f"label={value}" / "0.csv", [{"text": f"{value} {n}"} for n in "xyz"])
    _, reasons = read(open_external_corpus("mine", f"folder:{tmp_path}"))
    assert reasons == {"no label": 3}


def write_part(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        file.write_text("\n".join(lines) + "\n")
    else:
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
