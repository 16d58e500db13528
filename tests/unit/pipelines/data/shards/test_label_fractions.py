"""Label fractions: fewer rows of one task, by held-out unit; a smaller part of a larger one."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.config.folds import FoldConfig
from pipelines.data.shards.dataset import PreparedCorpus, open_corpus
from pipelines.data.shards.folds import list_row_units, open_fold, select_label_fraction
from pipelines.training.config.run import FinetuneConfig, TaskTraining
from pipelines.training.loading.dataloader import MultiTaskDataLoader
from pipelines.training.runs.identity import find_identity_differences, open_corpora
from skillnet_platform import config as configuration
from tests.helpers.small_corpora import small_config, write_corpora

TASK = "speech_recognition"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("labels"), rows=60, test_rows=20, pretrain=20)


def read_units(corpus: PreparedCorpus) -> list[str]:
    return list_row_units(corpus.splits["train"].table(), corpus.name)


@pytest.mark.parametrize("fold", [FoldConfig(), FoldConfig(3, 1, 0.3)], ids=["own splits", "fold"])
def test_fractions_are_nested_and_take_whole_units(data: Path, fold: FoldConfig) -> None:
    corpus = open_fold(open_corpus(data / "syllables"), fold)
    whole = read_units(corpus)
    largest = max(Counter(whole).values())
    parts = {
        share: read_units(select_label_fraction(corpus, ["train"], share, 0))
        for share in (0.001, 0.1, 0.3, 0.6, 1.0)
    }
    for smaller, larger in zip(parts.values(), list(parts.values())[1:], strict=False):
        assert set(smaller) <= set(larger)
        assert len(smaller) <= len(larger)
    for share, units in parts.items():
        assert units == [unit for unit in whole if unit in set(units)]
        assert share * len(whole) <= len(units) < share * len(whole) + largest
    other = read_units(select_label_fraction(corpus, ["train"], 0.3, 1))
    assert set(other) != set(parts[0.3])


def test_one_task_reads_fewer_rows_and_all_else_stays(data: Path) -> None:
    config = small_config(data)
    config.tasks[TASK] = replace(config.tasks[TASK], label_fraction=0.3)
    datasets = MultiTaskDataLoader(open_corpora(config), config.tasks, config.model, 0).datasets
    assert datasets[TASK].num_rows in (18, 19)
    assert datasets["text_classification"].num_rows == 60
    opened = open_corpus(data / "syllables")
    chosen = select_label_fraction(opened, ["train"], 0.3, 0)
    assert chosen.splits["validation"] is opened.splits["validation"]
    assert chosen.splits["test"] is opened.splits["test"]
    # The loader reads the chosen rows, not the first ones.
    stored = datasets[TASK].load_inputs(np.arange(datasets[TASK].num_rows))["frames"]
    assert stored.tolist() == chosen.splits["train"].column("frames").to_pylist()


def test_the_choice_depends_on_names_and_the_seed_alone(data: Path) -> None:
    corpus = open_corpus(data / "functions")
    chosen = select_label_fraction(corpus, ["train"], 0.1, 0)
    # Other values would change the rows of every finished run.
    expected = ["key train/34", "key train/46", "key train/51", "unit 10", "unit 7"]
    assert sorted(set(read_units(chosen))) == expected


def test_a_label_fraction_is_a_part_of_the_identity_of_a_run(data: Path) -> None:
    def build(*arguments: str) -> FinetuneConfig:
        given = ["--tasks.speech_recognition.corpus", "syllables", *arguments]
        return configuration.parse_config(FinetuneConfig, given, "skillnet finetune")

    key = f"tasks.{TASK}.label_fraction"
    assert find_identity_differences(build(), build(f"--{key}", "0.1")) == {key: (1.0, 0.1)}
    with pytest.raises(
        ValueError, match=r"label_fraction: expected a number above 0 and at most 1, got 0"
    ):
        TaskTraining("syllables", label_fraction=0)
