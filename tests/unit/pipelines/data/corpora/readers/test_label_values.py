"""One value of a label is one class, and numbers as labels are reported.

Label ids follow one order for any kind of label.

Numbers of classes mean the names of their own file, in every file of a corpus.
"""

import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from pipelines.data.corpora import open_external_corpus
from pipelines.data.corpora.base import RejectedRow, SourceArchives
from pipelines.data.corpora.readers.base import (
    ExternalCorpus,
    merge_equal_labels,
    parse_label,
    sort_labels,
)
from pipelines.data.tokenizer import training as tokenizers
from skillnet_platform.errors import UserError


def labelled(folder: Path, labels: list[object]) -> ExternalCorpus:
    rows = (json.dumps({"text": f"text {n}", "label": x}) for n, x in enumerate(labels * 9))
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    return open_external_corpus("mine", f"folder:{folder}")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["1", "1.0", "True", "0", "false", "-0.0"], ["0", "1"]),
        (["True", "False"], ["True", "False"]),
        (["true", "mostly-true", "false"], ["true", "false", "mostly-true"]),
        (["1", "01", "1.50", "1.5"], ["1", "01", "1.5"]),  # 01 is a code
        (["1e2", "100", "1" + "0" * 700], ["100", "1" + "0" * 700]),
        (["a", "A", "nan", "inf"], ["A", "a", "inf", "nan"]),
    ],
)
def test_equal_values_are_one_class(labels: list[str], classes: list[str]) -> None:
    assert merge_equal_labels(labels) == classes
    assert len({parse_label(label) for label in labels}) == len(classes)


def test_rows_with_equal_values_get_one_class(tmp_path: Path) -> None:
    corpus = labelled(tmp_path, [1, 1.0, True, "1", 0, "0.0"])
    corpus.scan_labels()
    assert corpus.labels == ("0", "1")
    rows = [r for r in corpus.rows(SourceArchives.none()) if not isinstance(r, RejectedRow)]
    block = pa.Table.from_pylist(rows, schema=corpus.raw_schema)
    learnt = tokenizers.train_tokenizer([row["text"] for row in rows], [], size=300)
    found = corpus.transform(block, Tokenizer.from_str(learnt))
    assert found["rejected"].null_count == len(rows)
    wanted = [0 if row["label"] in ("0", "0.0") else 1 for row in rows]
    assert found["label"].to_pylist() == wanted


def prepared(
    tmp_path: Path, values: list[object], **options: object
) -> tuple[ExternalCorpus, pa.Table]:
    """Return a corpus of training texts with targets, and its finished columns."""
    lines = [json.dumps({"text": f"row {n}", "label": v}) for n, v in enumerate(values)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    given = {"validation": 0.0, "test": 0.0, **options}
    corpus = open_external_corpus("mine", f"folder:{tmp_path}", given)
    corpus.scan_labels()
    rows = [r for r in corpus.rows(SourceArchives.none()) if not isinstance(r, RejectedRow)]
    block = pa.Table.from_pylist(rows, schema=corpus.raw_schema)
    words = tokenizers.train_tokenizer([row["text"] for row in rows], [], size=300)
    return corpus, corpus.transform(block, Tokenizer.from_str(words))


def test_a_row_may_have_several_classes(tmp_path: Path) -> None:
    values = [["b", "a"], "a|c", '["b"]', [], "b | b", None, [["a"]]]
    corpus, found = prepared(tmp_path, values, task="label_sets")
    assert (corpus.labels, corpus.task) == (("a", "b", "c"), "text_multi_label")
    assert found["label_set"].to_pylist() == [[0, 1], [0, 2], [1], [], [1]]
    assert corpus.facts()["labels"] == ["a", "b", "c"]
    reasons = {r.reason for r in corpus.rows(SourceArchives.none()) if isinstance(r, RejectedRow)}
    assert reasons == {"no labels", "labels are no list of texts"}


def test_a_regression_has_numbers_and_the_scale_of_its_training_rows(tmp_path: Path) -> None:
    corpus, found = prepared(tmp_path, [1, "2.5", 4.0, "much", "inf", None], task="values")
    assert corpus.task == "text_regression"
    assert found["value"].type == pa.float32()
    assert found["value"].to_pylist() == [1, 2.5, 4]
    mean, deviation = corpus.facts()["value_scale"]
    assert (mean, round(deviation, 6)) == (2.5, 1.224745)
    reasons = {r.reason for r in corpus.rows(SourceArchives.none()) if isinstance(r, RejectedRow)}
    assert reasons == {"no number", "no finite number"}


def test_pairs_stay_in_one_split_and_count_as_one_unit(tmp_path: Path) -> None:
    rows = [{"code": f"def f{n}(): return {n}", "label": f"item {n % 4}"} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = {"task": "pairs", "validation": 0.3, "test": 0.3}
    corpus = open_external_corpus("mine", f"folder:{tmp_path}", given)
    found = [r for r in corpus.rows(SourceArchives.none()) if not isinstance(r, RejectedRow)]
    assert corpus.task == "code_to_code"
    assert "label" not in corpus.schema("train").names
    assert len(found) == 24
    assert len({row["group"] for row in found}) == 4
    assert len({(row["group"], row["split"], row["unit"]) for row in found}) == 4


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["10", "9", "1"], ["1", "9", "10"]),
        (
            ["1", "01", "001", "\uff11"],
            ["001", "01", "1", "\uff11"],
        ),  # four texts with the same value
        (["2", "②", "²"], ["2", "²", "②"]),  # digits that are not numbers
        (["2", "9" * 5000], ["2", "9" * 5000]),  # longer than Python converts
        (["b", "1", "a"], ["1", "a", "b"]),
        (["10.5", "-1", "2", "0.5"], ["-1", "0.5", "2", "10.5"]),
    ],
)
def test_labels_have_one_order_for_any_input_order(labels: list[str], order: list[str]) -> None:
    for shuffled in permutations(labels):  # the order of a set depends on the hash seed
        assert sort_labels(dict.fromkeys(shuffled).keys()) == order


NAMES = ["bad", "good", "odd"]
#: The same names in two other orders.
ORDERS = (NAMES, ["good", "odd", "bad"], ["odd", "good", "bad"])


def made_rows(names: Sequence[str], part: str) -> dict[str, Any]:
    """Return texts that state their class, with the number of the class in ``names``."""
    chosen = [names[n % len(names)] for n in range(12)]
    texts = [f"{name} {part} {n}" for n, name in enumerate(chosen)]
    return {"text": texts, "label": [names.index(name) for name in chosen]}


def save_split(names: Sequence[str] | None, part: str) -> datasets.Dataset:
    rows = made_rows(names or NAMES, part)
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({"text": datasets.Value("string"), "label": kind})
    return datasets.Dataset.from_dict(rows, features)


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


def test_each_shard_maps_its_numbers_by_its_own_names(tmp_path: Path) -> None:
    parts: dict[str, Sequence[str] | None]
    parts = dict(zip(("train", "validation", "test"), ORDERS, strict=True))
    found = read_labels(save_shards(tmp_path, parts))
    assert len(found) == 36
    for text, labels in found:
        assert labels == [text.split()[0]]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (["bad", "good", "fine"], r"fine.* odd"),
        (["bad", "good"], r"odd"),
        ([*NAMES, "more", "most"], r"more, most"),
    ],
)
def test_other_names_are_refused_with_both_files(tmp_path, other, message):
    parts: dict[str, Sequence[str] | None] = {"train": NAMES, "test": other}
    place = save_shards(tmp_path, parts)
    with pytest.raises(UserError, match=message) as caught:
        open_external_corpus("mine", place)
    assert "test" in str(caught.value)
    assert "train" in str(caught.value) or "dataset_info.json" in str(caught.value)


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
