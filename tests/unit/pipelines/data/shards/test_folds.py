"""Rotating folds: each unit is in one split of a fold, tested once, and a reserve stays unread."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.config.folds import FoldConfig
from pipelines.data.shards.dataset import PreparedCorpus, open_corpus
from pipelines.data.shards.folds import _place_row, open_fold
from pipelines.training.config.run import TaskTraining
from pipelines.training.evaluation.evaluator import evaluate_model
from pipelines.training.evaluation.outcomes import OutcomeTable
from pipelines.training.loading.dataloader import MultiTaskDataLoader
from pipelines.training.runs.identity import find_identity_differences, open_corpora
from skillnet.model import SkillNet
from skillnet_platform.errors import UserError
from tests.helpers.prepared_corpora import write_corpus
from tests.helpers.small_corpora import small_config, write_corpora

FOLDS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Names of units repeat in all splits, so an assignment by row would leak.
    return write_corpora(tmp_path_factory.mktemp("folds"), rows=60, test_rows=20, pretrain=20)


def read_units(corpus: PreparedCorpus, split: str) -> list[str]:
    table = corpus.splits[split].table()
    pairs = zip(table.column("unit").to_pylist(), table.column("key").to_pylist(), strict=True)
    return [unit or f"key {key}" for unit, key in pairs]


def read_keys(corpus: PreparedCorpus, split: str) -> list[str]:
    return [str(key) for key in corpus.splits[split].column("key").to_pylist()]


@pytest.mark.parametrize("name", ["headings", "syllables", "drawings", "functions"])
def test_each_row_is_tested_once_and_no_unit_is_in_two_splits(data: Path, name: str) -> None:
    corpus = open_corpus(data / name)
    pool = sorted(
        key for split in ("train", "validation", "test") for key in read_keys(corpus, split)
    )
    tested: list[str] = []
    for number in range(FOLDS):
        fold = open_fold(corpus, FoldConfig(FOLDS, number, 0.3))
        units = {split: set(read_units(fold, split)) for split in ("train", "validation", "test")}
        assert sum(map(len, units.values())) == len(set.union(*units.values()))
        rows = sorted(key for split in units for key in read_keys(fold, split))
        assert rows == pool
        if "pretrain" in fold.splits:
            held_out = units["validation"] | units["test"]
            assert not held_out & set(read_units(fold, "pretrain"))
        tested += read_keys(fold, "test")
    assert sorted(tested) == pool


def test_a_reserve_is_in_no_split_of_any_fold(data: Path) -> None:
    corpus = open_corpus(data / "functions")
    reserve = FoldConfig(FOLDS, 0, 0.3, reserve_part=True, reserve_units={"functions": ["unit 1*"]})
    opened = open_fold(corpus, reserve, with_reserve=True)
    kept = set(read_units(opened, "reserve"))
    assert {"unit 1", "unit 12"} <= kept
    assert any(unit.startswith("key ") for unit in kept)
    tested: Counter[str] = Counter(read_keys(opened, "reserve"))
    for number in range(FOLDS):
        fold = open_fold(corpus, replace(reserve, number=number))
        assert "reserve" not in fold.splits
        read = {unit for split in fold.splits for unit in read_units(fold, split)}
        assert not kept & read
        tested.update(read_keys(fold, "test"))
    assert len(tested) == 100
    assert set(tested.values()) == {1}


def test_the_own_reserve_of_a_corpus_stays_in_the_reserve() -> None:
    for units in ({}, {"voices": ["five"]}):
        fold = FoldConfig(FOLDS, reserve_units=units)
        assigned = fold.find_split("voices", "five")
        assert _place_row(fold, "voices", "reserve", "five", assigned, False) == "reserve"


def test_without_folds_the_own_reserve_of_a_corpus_is_not_read(data: Path) -> None:
    corpus = open_corpus(data / "drawings")
    more = dict.fromkeys(("reserve", "reserve_unseen_concept"), corpus.splits["test"])
    own = replace(corpus, splits={**corpus.splits, **more})
    assert open_fold(own, FoldConfig()).splits == corpus.splits
    assert open_fold(own, FoldConfig(), with_reserve=True).splits == own.splits
    fold = FoldConfig(2, validation_share=0.3, reserve_part=True)
    assert not [name for name in open_fold(own, fold).splits if name.startswith("reserve")]


def test_the_split_of_a_unit_follows_from_names_and_numbers_alone() -> None:
    parts = {
        unit: [FoldConfig(4, number).find_split("headings", unit) for number in range(4)]
        for unit in ("A", "B", "C")
    }
    # Other values would change the rows of every finished run.
    assert parts == {
        "A": ["train", "train", "train", "test"],
        "B": ["train", "test", "train", "train"],
        "C": ["test", "train", "train", "train"],
    }
    drawn = Counter(FoldConfig(4, 1).find_split("strokes", str(n)) for n in range(4000))
    assert drawn["test"] == pytest.approx(1000, abs=100)
    assert drawn["validation"] == pytest.approx(300, abs=60)


def test_a_labelled_corpus_holds_out_the_units_of_its_source(data: Path, tmp_path: Path) -> None:
    source = open_corpus(data / "drawings")
    tables = [[split.table()] for split in source.splits.values()]
    made = write_corpus(
        tmp_path / "topics",
        dict(zip(source.splits, tables, strict=True)),
        **{key: source.manifest[key] for key in ("modality", "pretraining", "preprocessing")},
        labelled={"corpora": {"drawings": source.digest}},
    )
    for number in range(FOLDS):
        fold = FoldConfig(FOLDS, number, 0.3)
        first, second = (open_fold(corpus, fold) for corpus in (source, open_corpus(made)))
        assert read_keys(first, "test") == read_keys(second, "test")
        assert read_keys(first, "train") == read_keys(second, "train")


def test_training_and_evaluation_read_the_splits_of_the_fold(data: Path) -> None:
    config = replace(small_config(data), fold=FoldConfig(FOLDS, 2, 0.3, reserve_part=True))
    corpora = open_corpora(config)
    fold = corpora["drawings"]
    settings = {"text_to_image": TaskTraining("drawings", 1.0, 5)}
    loader = MultiTaskDataLoader(corpora, settings, config.model, 0)
    dataset = loader.datasets["text_to_image"]
    assert dataset.num_rows == fold.splits["train"].rows
    rows = np.arange(dataset.num_rows)
    dataset.shard_table.open()
    stored = dataset.shard_table.column("pixels").take(rows)
    whole = open_corpus(data / "drawings")
    expected = {
        key: pixels
        for split in ("train", "validation", "test")
        for key, pixels in zip(
            read_keys(whole, split), whole.splits[split].column("pixels").to_pylist(), strict=True
        )
    }
    for key, pixels in zip(read_keys(fold, "train"), stored, strict=True):
        assert pixels.ravel().tolist() == expected[key]
    outcomes, model = OutcomeTable(), SkillNet(config.model)
    evaluate_model(
        model, data, ["text_to_image"], fold=config.fold, bootstrap_samples=0, outcomes=outcomes
    )
    assert len(outcomes["text_to_image", "test"]) == fold.splits["test"].rows
    with pytest.raises(UserError, match=r"reserve is read by the final evaluation"):
        evaluate_model(model, data, ["text_to_image"], ["reserve"], fold=config.fold)


def test_folds_are_a_part_of_the_identity_of_a_run(data: Path) -> None:
    config = small_config(data)
    first, second = (replace(config, fold=FoldConfig(FOLDS, number)) for number in (0, 1))
    assert find_identity_differences(first, second) == {"fold.number": (0, 1)}


def test_folds_that_cannot_be_made_are_rejected(data: Path) -> None:
    corpus = open_corpus(data / "strokes")
    with pytest.raises(UserError, match=r"fold\.reserve_units\.strokes: no unit is named"):
        open_fold(corpus, FoldConfig(2, reserve_units={"strokes": ["voice 5"]}))
    with pytest.raises(UserError, match=r"fold\.count: fold .* no rows in the split"):
        for number in range(100):
            open_fold(corpus, FoldConfig(100, number))
