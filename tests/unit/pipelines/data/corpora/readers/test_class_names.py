"""Numbers of classes mean the names of their own file, in every file of a corpus."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.corpora import open_external_corpus
from pipelines.data.corpora.base import RejectedRow, SourceArchives
from skillnet_platform.errors import UserError

NAMES = ["bad", "good", "odd"]
#: The same names in two other orders.
ORDERS = (NAMES, ["good", "odd", "bad"], ["odd", "good", "bad"])
#: Writes the rows of a part with its names: (folder, part -> names of its classes) -> corpus.
Writer = Callable[[Path, dict[str, Sequence[str] | None]], str]


def made_rows(names: Sequence[str], part: str) -> dict[str, Any]:
    """Return texts that state their class, with the number of the class in ``names``."""
    chosen = [names[n % len(names)] for n in range(12)]
    texts = [f"{name} {part} {n}" for n, name in enumerate(chosen)]
    return {"text": texts, "label": [names.index(name) for name in chosen]}


def write_parquet(folder: Path, parts: dict[str, Sequence[str] | None]) -> str:
    """Write a file of the Hub per part, without a description where the names are None."""
    (folder / "data").mkdir(exist_ok=True)
    for part, names in parts.items():
        features = {"label": {"names": names, "_type": "ClassLabel"}} if names else {}
        described = {"huggingface": json.dumps({"info": {"features": features}})}
        table = pa.table(made_rows(names or NAMES, part)).replace_schema_metadata(described)
        pq.write_table(table, folder / "data" / f"{part}.parquet")
    return f"folder:{folder}"


def save_split(names: Sequence[str] | None, part: str) -> datasets.Dataset:
    rows = made_rows(names or NAMES, part)
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({"text": datasets.Value("string"), "label": kind})
    return datasets.Dataset.from_dict(rows, features)


def save_splits(folder: Path, parts: dict[str, Sequence[str] | None]) -> str:
    """Save a split per part."""
    saved = {part: save_split(names, part) for part, names in parts.items()}
    datasets.DatasetDict(saved).save_to_disk(str(folder / "saved"))
    return f"hf_dataset:{folder / 'saved'}"


def save_shards(folder: Path, parts: dict[str, Sequence[str] | None]) -> str:
    """Save one split whose files come from one dataset per part."""
    target = folder / "saved"
    listed = []
    for part, names in parts.items():
        save_split(names, part).save_to_disk(str(folder / part))
        if not target.is_dir():
            (folder / part).rename(target)
            (target / "data-00000-of-00001.arrow").rename(target / f"{part}.arrow")
        else:
            (folder / part / "data-00000-of-00001.arrow").rename(target / f"{part}.arrow")
        listed.append({"filename": f"{part}.arrow"})
    (target / "state.json").write_text(json.dumps({"_data_files": listed}))
    return f"hf_dataset:{target}"


def read_labels(place: str, **options: Any) -> list[tuple[str, Any]]:
    """Return (text, names of its classes by the ids of its shard row) of all rows."""
    corpus = open_external_corpus("mine", place, options)
    corpus.scan_labels()
    rows = list(corpus.rows(SourceArchives.none()))
    assert not [row.reason for row in rows if isinstance(row, RejectedRow)]
    found = []
    for row in rows:
        assert isinstance(row, dict)
        values = [row["label"]] if "labels" in corpus.annotations_present else row["label_set"]
        ids = corpus._encode_labels(values)
        assert None not in ids
        found.append((row["text"], [corpus.labels[number or 0] for number in ids]))
    return found


@pytest.mark.parametrize("write", [write_parquet, save_splits, save_shards])
def test_each_file_maps_its_numbers_by_its_own_names(tmp_path: Path, write: Writer) -> None:
    parts: dict[str, Sequence[str] | None]
    parts = dict(zip(("train", "validation", "test"), ORDERS, strict=True))
    found = read_labels(write(tmp_path, parts))
    assert len(found) == 36
    for text, labels in found:
        assert labels == [text.split()[0]]


def test_shards_of_one_split_have_their_own_names(tmp_path: Path) -> None:
    shards = {f"train-{n:05d}-of-00003": names for n, names in enumerate(ORDERS)}
    found = read_labels(write_parquet(tmp_path, dict(shards)))
    assert len(found) == 36
    assert all(labels == [text.split()[0]] for text, labels in found)


@pytest.mark.parametrize("write", [write_parquet, save_splits, save_shards])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (["bad", "good", "fine"], r"fine.* odd"),
        (["bad", "good"], r"odd"),
        ([*NAMES, "more", "most"], r"more, most"),
        (["bad", "good", "odd", "bad"], r"'bad' occurs twice"),
    ],
)
def test_other_names_are_refused_with_both_files(
    tmp_path: Path, write: Writer, other: list[str], message: str
) -> None:
    if len(set(other)) < len(other) and write is not write_parquet:
        pytest.skip("the library refuses to save them")
    parts: dict[str, Sequence[str] | None] = {"train": NAMES, "test": other}
    place = write(tmp_path, parts)
    with pytest.raises(UserError, match=message) as caught:
        open_external_corpus("mine", place)
    assert "test" in str(caught.value)
    if "twice" not in message:
        assert "train" in str(caught.value) or "dataset_info.json" in str(caught.value)


@pytest.mark.parametrize("write", [write_parquet, save_splits])
def test_a_file_without_names_takes_those_of_the_others_and_says_so(
    tmp_path: Path, write: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    parts: dict[str, Sequence[str] | None] = {"train": None, "test": ORDERS[0]}
    found = read_labels(write(tmp_path, parts))
    assert all(labels == [text.split()[0]] for text, labels in found)
    said = " ".join("".join(capsys.readouterr()).split())
    assert "names no classes in the column label" in said


def nested_rows(names: Sequence[str]) -> dict[str, list[Any]]:
    chosen = [[names[n % 3], names[(n + 1) % 3]] for n in range(12)]
    texts = [f"{' '.join(sorted(each))} {n}" for n, each in enumerate(chosen)]
    return {"text": texts, "labels": [[names.index(name) for name in each] for each in chosen]}


@pytest.mark.parametrize("form", ["Sequence", "List", "list", "saved"])
def test_lists_of_classes_have_names_too(tmp_path: Path, form: str) -> None:
    for split, names in (("train", ORDERS[0]), ("test", ORDERS[1])):
        label: Any = {"names": names, "_type": "ClassLabel"}
        feature = {
            "Sequence": {"feature": label, "length": -1, "_type": "Sequence"},
            "List": {"feature": label, "_type": "List"},
        }.get(form, [label])
        described = {"huggingface": json.dumps({"info": {"features": {"labels": feature}}})}
        table = pa.table(nested_rows(names)).replace_schema_metadata(described)
        pq.write_table(table, tmp_path / f"{split}.parquet")
    place = f"folder:{tmp_path}"
    if form == "saved":
        classes = [datasets.ClassLabel(names=list(names)) for names in ORDERS[:2]]
        kinds = [
            datasets.Features({"text": datasets.Value("string"), "labels": datasets.Sequence(each)})
            for each in classes
        ]
        parts = {
            split: datasets.Dataset.from_dict(nested_rows(names), kind)
            for split, names, kind in zip(("train", "test"), ORDERS, kinds, strict=False)
        }
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
        place = f"hf_dataset:{tmp_path / 'saved'}"
    found = read_labels(place, task="label_sets")
    assert len(found) == 24
    for text, labels in found:
        assert sorted(labels) == text.split()[:2]


@pytest.mark.parametrize("kind", ["dictionary", "float"])
def test_numbers_of_other_column_types_have_names(tmp_path: Path, kind: str) -> None:
    for split, names in (("train", ORDERS[0]), ("test", ORDERS[2])):
        rows = made_rows(names, split)
        numbers = pa.array(rows["label"], pa.int32())
        column = numbers.dictionary_encode() if kind == "dictionary" else numbers.cast("float64")
        described = {"label": {"names": names, "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": described}})}
        table = pa.table({"text": rows["text"], "label": column}).replace_schema_metadata(metadata)
        pq.write_table(table, tmp_path / f"{split}.parquet")
    found = read_labels(f"folder:{tmp_path}")
    assert all(labels == [text.split()[0]] for text, labels in found)
