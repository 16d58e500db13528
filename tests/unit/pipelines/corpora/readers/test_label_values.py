"""One value of a label is one class, and numbers as labels are reported."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from tokenizers import Tokenizer

from pipelines.corpora import open_external_corpus
from pipelines.corpora.base import RejectedRow, SourceArchives
from pipelines.corpora.readers.base import ExternalCorpus
from pipelines.corpora.readers.label_values import merge_equal_labels, parse_label
from pipelines.tokenizer import training as tokenizers


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
