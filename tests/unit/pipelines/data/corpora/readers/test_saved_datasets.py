"""Saved Hugging Face datasets, on a disk and in a store."""

from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pytest

from pipelines.data.corpora import detect_reader, open_external_corpus
from pipelines.data.io.directory import SourceDirectory
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from tests.helpers import user_corpora
from tests.helpers.object_store import ObjectStore
from tests.unit.pipelines.data.corpora.readers.test_readers import media, read, sizes


def test_media_bytes_are_read_in_place(tmp_path: Path, object_store: ObjectStore) -> None:
    texts = [f"图{n}" for n in range(12)]
    pictures = [{"bytes": user_corpora.jpg(n, (40 + n, 40)), "path": None} for n in range(12)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    whole = datasets.Dataset.from_dict({"image": pictures, "caption": texts}, features)
    parts = datasets.DatasetDict({"train": whole, "test": whole.select(range(3, 7))})
    parts.save_to_disk(str(tmp_path / "saved"))
    found = detect_reader(SourceDirectory(str(tmp_path / "saved")))
    assert found is not None
    assert found[0] == "hf_dataset"
    corpus = open_external_corpus(
        "pictures", f"hf_dataset:{tmp_path / 'saved'}", {"validation": 0.0}
    )
    assert (corpus.modality, corpus.task) == ("image", "text_to_image")
    rows, reasons = read(corpus)
    assert not reasons
    assert sizes(rows) == {"test": 4, "train": 12}
    assert [media(row) for row in rows["train"]] == [p["bytes"] for p in pictures]
    assert media(rows["test"][0]) == pictures[3]["bytes"]
    assert [row["row"] for row in rows["test"]] == [1, 2, 3, 4]
    place = f"{object_store.uri}/saved"
    for path in (tmp_path / "saved").rglob("*.*"):
        name = path.relative_to(tmp_path / "saved").as_posix()
        directories.write_bytes(f"{place}/{name}", path.read_bytes())
    there = open_external_corpus("pictures", f"hf_dataset:{place}", {"validation": 0.0})
    assert there.can_run_remotely()
    far, far_reasons = read(there)
    assert not far_reasons
    assert [media(row) for row in far["train"]] == [p["bytes"] for p in pictures]
    assert media(far["test"][0]) == pictures[3]["bytes"]
    keys = [[row["key"] for row in found["train"]] for found in (rows, far)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("in_store", [False, True])
def test_a_truncated_file_loses_only_its_end(tmp_path: Path, in_store: bool) -> None:
    rows = {"text": [f"第{n}条" for n in range(3000)], "label": [n % 2 for n in range(3000)]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 3 // 4])
    place = str(tmp_path / "saved")
    if in_store:
        fsspec.filesystem("memory").put(place, "/bucket/cut", recursive=True)
        place = "memory://bucket/cut"
    found, reasons = read(open_external_corpus("mine", f"hf_dataset:{place}"))
    assert sum(map(len, found.values())) in (1000, 2000)
    assert reasons == {"an Arrow file that is cut short or damaged": 1}


@pytest.mark.parametrize("in_store", [False, True])
def test_a_missing_file_is_named(tmp_path: Path, in_store: bool) -> None:
    rows = {"text": [f"第{n}条" for n in range(40)]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"), num_shards=20)
    (tmp_path / "saved" / "data-00007-of-00020.arrow").unlink()
    place = str(tmp_path / "saved")
    if in_store:
        fsspec.filesystem("memory").put(place, "/bucket/missing", recursive=True)
        place = "memory://bucket/missing"
    with pytest.raises(UserError, match=r"data-00007-of-00020\.arrow: state\.json lists it"):
        open_external_corpus("mine", f"hf_dataset:{place}")


def test_class_names_of_a_single_split(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["坏", "好"])}
    )
    rows = {"text": [f"第{n}条" for n in range(30)], "label": [n % 2 for n in range(30)]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "saved"))
    corpus = open_external_corpus("mine", f"hf_dataset:{tmp_path / 'saved'}")
    assert corpus.facts() == {"labels": ["坏", "好"]}
    found, _ = read(corpus)
    assert {row["label"] for row in found["train"]} == {"坏", "好"}
    assert set(found) == {"train", "validation", "test"}


def test_audio_bytes_and_paths(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    sounds = [{"bytes": user_corpora.wav(n), "path": f"{n}.wav"} for n in range(4)]
    outside = tmp_path / "outside.wav"
    outside.write_bytes(user_corpora.wav(9))
    sounds += [{"bytes": None, "path": str(outside)}]
    table = pa.table({"audio": pa.array(sounds, kind), "sentence": [f"第{n}句" for n in range(5)]})
    saved = datasets.Dataset(table).cast_column("audio", datasets.Audio(decode=False))
    saved.save_to_disk(str(tmp_path / "saved"))
    place = f"hf_dataset:{tmp_path / 'saved'}"
    rows, reasons = read(open_external_corpus("mine", place))
    read_back = [media(row) for each in rows.values() for row in each]
    # The library can embed the bytes of the outside file. A path that leads out of the
    # directory is not followed.
    assert reasons in ({}, {"no media file": 1})
    assert {s["bytes"] for s in sounds[:4]} <= set(read_back)


def labelled(labels: list[int], names: list[str] | None = None) -> datasets.Dataset:
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"text": datasets.Value("string"), "label": kind})
    rows = {"text": [f"第{n}条" for n in range(len(labels))], "label": labels}
    return datasets.Dataset.from_dict(rows, features)


@pytest.mark.parametrize("names", [["坏", "好"], None])
def test_labels_of_minus_one_mean_no_label(tmp_path: Path, names: list[str] | None) -> None:
    parts = {"train": labelled([0, 1] * 15, names), "test": labelled([-1] * 5, names)}
    parts["validation"] = labelled([0, 1] * 10, names)
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    corpus = open_external_corpus("mine", f"hf_dataset:{tmp_path / 'saved'}")
    rows, reasons = read(corpus)
    assert not reasons
    assert (len(rows["unlabelled"]), rows["unlabelled"][0]["label"]) == (5, None)
    assert len(rows["test"]) + len(rows["validation"]) == 20
    assert "label" not in corpus.schema("unlabelled").names


def test_minus_one_can_be_a_class(tmp_path: Path) -> None:
    parts = {"train": labelled([-1, 0, 1] * 5), "test": labelled([-1] * 4)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    rows, _ = read(open_external_corpus("mine", f"hf_dataset:{tmp_path / 'saved'}"))
    assert [row["label"] for row in rows["test"]] == ["-1"] * 4


def test_splits_with_longer_names(tmp_path: Path) -> None:
    names = {"train.clean.100": 9, "validation.clean": 3, "test.clean": 2, "other": 1}
    parts = {name: labelled([0, 1] * rows) for name, rows in names.items()}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    rows, _ = read(open_external_corpus("mine", f"hf_dataset:{tmp_path / 'saved'}"))
    assert sizes(rows) == {"other": 2, "test": 4, "train": 18, "validation": 6}


def test_a_split_field_is_used(tmp_path: Path) -> None:
    rows = {"text": [f"第{n}条" for n in range(9)], "part": ["train", "dev", "test"] * 3}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    corpus = open_external_corpus("mine", f"hf_dataset:{tmp_path / 'saved'}", {"split": "part"})
    found, _ = read(corpus)
    assert [row["text"] for row in found["test"]] == ["第2条", "第5条", "第8条"]
