"""One value of a label is one class, and numbers as labels are reported."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from tokenizers import Tokenizer

from pipelines.data.corpora import open_external_corpus
from pipelines.data.corpora.base import RejectedRow, SourceArchives
from pipelines.data.corpora.readers.base import ExternalCorpus, merge_equal_labels, parse_label
from pipelines.data.tokenizer import training as tokenizers


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


def test_numbers_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled(tmp_path, [n / 10 for n in range(10)]).scan_labels()
    printed = " ".join(capsys.readouterr().err.split())
    assert "the labels are numbers, 10 values from 0.0 to 0.9. Each value is a class" in printed
    assert "regression" in printed
    labelled(tmp_path, ["good", "1"]).scan_labels()
    assert "numbers" not in capsys.readouterr().err


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


def test_a_list_of_labels_names_the_option_that_reads_it(tmp_path: Path) -> None:
    corpus, _ = prepared(tmp_path, ["a", "b", ["a", "b"]])
    (rejected,) = [r for r in corpus.rows(SourceArchives.none()) if isinstance(r, RejectedRow)]
    assert rejected.reason == "several labels; the option task label_sets reads them"


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
