"""Rows of the training in a test, and metrics that cannot fail: said, and not registered."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.data.config.folds import FoldConfig
from pipelines.serving.registration import WeakTestError, register_model
from pipelines.training.evaluation.tables import run_description
from pipelines.training.evaluation.weak_tests import find_weak_tests
from pipelines.training.runs.model_source import ModelSource, TrainingRead, list_training_reads
from skillnet.model import SkillNet
from skillnet.skills import default_tasks
from tests.helpers.prepared_corpora import change_corpus
from tests.helpers.readable_corpora import config, write_corpora

TEXTS, CLIPS = "text_classification", "text_to_video"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_corpora(tmp_path / "corpora")


def change_rows(folder: Path, split: str, change: Any) -> None:
    """Write the only shard of a split again."""
    change_corpus(folder, lambda name, table: change(table) if name == split else table)


def find(data: Path, task: str, *reads: tuple[str, str, str], **options: Any) -> list[str]:
    tasks = {task: default_tasks()[task]}
    found = find_weak_tests(data, tasks, [TrainingRead(*each) for each in reads], **options)
    # Only rows of the training forbid a registration.
    assert all(each.is_seen == ("train" in each.sentence) for each in found)
    return [each.sentence for each in found]


def test_a_good_test_is_not_weak(data: Path) -> None:
    for task, corpus in ((TEXTS, "headings"), (CLIPS, "strokes")):
        assert not find(data, task, (task, corpus, "train"), splits=["test"])


@pytest.mark.parametrize(
    ("read", "splits", "sentence"),
    [
        ((TEXTS, "headings", "test"), ["test"], "the split test of headings was the training data"),
        (("other", "headings", "test"), ["test"], "--tasks.other.split train"),
        ((TEXTS, "headings", "train"), ["train"], "the split train of headings was the training"),
        ((TEXTS, "headings", "train"), ["test"], "5 of 24 rows of test (20.8 %) have the input"),
        (("masked", "headings", "pretraining"), ["test"], "which the task masked was trained on"),
        ((TEXTS, "headings", "validation"), ["test"], ""),
        ((TEXTS, "other", "train"), ["test"], ""),
    ],
)
def test_rows_of_the_training_are_found(data, read, splits, sentence):
    change_corpus(
        data / "headings",
        row_checks={"shared": {"test": {"train": 5}}},
        pretraining=["pretrain", "train"],
    )
    found = find(data, TEXTS, read, splits=splits)
    assert sentence in " ".join(found)
    assert bool(found) == bool(sentence)


def test_a_fold_has_other_splits_than_prepare_compared(data: Path) -> None:
    change_corpus(data / "headings", row_checks={"shared": {"test": {"train": 5}}})
    fold = FoldConfig(count=3, number=0)
    read = (TEXTS, "headings", "train")
    assert find(data, TEXTS, read, splits=["test"])
    assert not find(data, TEXTS, read, splits=["test"], fold=fold)


def test_a_test_of_one_class_is_weak(data: Path) -> None:
    def keep_one_class(table: pa.Table) -> pa.Table:
        labels = table["label"].to_pylist()
        return table.filter(pa.array([label == labels[0] for label in labels]))

    change_rows(data / "headings", "test", keep_one_class)
    (said,) = find(data, TEXTS, splits=["test"])
    assert "have one label, so a constant answer is right for all of them" in said


@pytest.mark.parametrize(("rows", "certain"), [(12, ""), (9, "R@10"), (4, "R@5, R@10")])
def test_a_recall_that_cannot_fail_is_weak(data: Path, rows: int, certain: str) -> None:
    change_rows(data / "strokes", "test", lambda table: table.slice(0, rows))
    found = find(data, CLIPS, splits=["test"])
    assert bool(found) == bool(certain)
    assert not certain or f"{CLIPS}: {certain} is 100 % for every model" in found[0]


def test_training_is_followed_to_the_models_it_started_from(tmp_path: Path) -> None:
    home = tmp_path / "runs" / "parent"
    SkillNet(config()).save_pretrained(home / "model")
    settings = {"tasks": {TEXTS: {"corpus": "headings", "split": "test"}}, "init_from": str(home)}
    (home / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    tasks = {"kept": {"corpus": "a", "eval_only": True}, "new": {"corpus": "b"}, "gone": None}
    reads = list_training_reads({"tasks": tasks, "init_from": str(home)})
    assert reads == [("new", "b", "train"), (TEXTS, "headings", "test")]


def test_a_model_with_a_weak_test_is_not_registered(data: Path, tmp_path: Path) -> None:
    SkillNet(config()).save_pretrained(tmp_path / "saved")
    split = {"corpus": "headings", "split": "test"}
    source = ModelSource("mine", tmp_path / "saved", settings={"tasks": {TEXTS: split}})
    with pytest.raises(WeakTestError, match=r"register mine --allow_weak_test"):
        register_model(source, data)
    clean = replace(source, settings={})
    with pytest.raises(WeakTestError, match="the split test of headings"):
        register_model(clean, data, parents=[source])


def test_the_page_of_a_weak_test_claims_no_held_out_data() -> None:
    row = {"task": TEXTS, "metric": "accuracy", "split": "test", "system": "skillnet"}
    rows = [row | {"value": 0.995, "low": 0.9, "high": 1.0, "activated_params": 10}]
    assert "On held-out data" in run_description(rows, [], config(), 100)
    page = run_description(rows, [], config(), 100, weak_tests=["its rows were read"])
    assert "held-out data" not in page.replace("held-out units", "")
    assert "its rows were read" in page
