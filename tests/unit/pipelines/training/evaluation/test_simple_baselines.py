"""Simple baselines: they exceed chance on rule-based data, chance is exact, results are cached."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.training.evaluation import simple_baselines
from pipelines.training.evaluation.simple_baselines import (
    evaluate_simple_baselines,
    random_ranking_metrics,
)
from pipelines.training.evaluation.tables import COLUMNS
from skillnet.config import SkillNetConfig
from skillnet.objectives.retrieval import retrieval_ranks
from skillnet.skills import SkillPlan, Task
from tests.helpers import small_corpora
from tests.helpers.readable_corpora import write_corpora
from tests.helpers.sixth_corpus import write_labelled_clips


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def rows(data: Path) -> list[dict]:
    return evaluate_simple_baselines(data, bootstrap_samples=0, use_cache=False)


@pytest.mark.parametrize(
    ("task", "metric", "sign"),
    [
        ("text_classification", "accuracy", 1),
        ("text_classification", "macro_f1", 1),
        ("speech_recognition", "token_error_rate", -1),
        ("text_to_image", "recall_at_1", 1),
        ("text_to_image", "reverse_recall_at_1", 1),
        ("text_to_video", "recall_at_5", 1),
        ("text_to_video", "reverse_recall_at_5", 1),
        ("text_to_code", "recall_at_1", 1),
    ],
)
def test_simple_baselines_exceed_chance_on_simple_rules(rows, task, metric, sign):
    by = {
        row["system"]: row["value"]
        for row in rows
        if (row["task"], row["metric"], row["split"]) == (task, metric, "test")
    }
    assert sign * by["simple_baseline"] > sign * by["chance"]


def test_video_classification_has_a_simple_baseline(tmp_path: Path):
    clips = small_corpora.write_corpora(tmp_path / "corpora", test_rows=30)
    write_labelled_clips(clips)
    tasks = {"counting": Task("classification", {"input": SkillPlan(("video",), "video")}, 3)}
    found = evaluate_simple_baselines(
        clips, tasks, corpora={"counting": "counts"}, bootstrap_samples=0, use_cache=False
    )
    value = {
        row["system"]: row["value"]
        for row in found
        if (row["split"], row["metric"]) == ("test", "accuracy")
    }
    assert value["simple_baseline"] > value["chance"]


def test_rows_have_the_columns_of_evaluations(rows):
    assert all(tuple(row) == COLUMNS for row in rows)
    assert {row["system"] for row in rows} == {"chance", "simple_baseline"}
    assert {row["task"] for row in rows} == set(SkillNetConfig().tasks)


@pytest.mark.parametrize("groups", [list(range(23)), [0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
def test_chance_equals_the_metrics_of_random_vectors(groups):
    ids = np.array(groups)
    expected = random_ranking_metrics(ids)
    random = np.random.default_rng(0)
    ranks = np.concatenate(
        [retrieval_ranks(*random.standard_normal((2, len(ids), 16)), ids, ids) for _ in range(400)]
    )
    for k in (1, 5, 10):
        assert expected[f"recall_at_{k}"].value == pytest.approx(np.mean(ranks <= k), abs=0.02)
    assert abs(expected["median_rank"].value - np.median(ranks)) <= 1


def test_results_are_cached_until_settings_change(data: Path, tmp_path: Path):
    import shutil

    copy = tmp_path / "corpora"
    shutil.copytree(data, copy)
    computed: list[str] = []
    tasks = {"text_to_code": SkillNetConfig().tasks["text_to_code"]}
    first = evaluate_simple_baselines(copy, tasks, bootstrap_samples=50, on_task=computed.append)
    again = evaluate_simple_baselines(copy, tasks, bootstrap_samples=50, on_task=computed.append)
    assert computed == ["text_to_code"]
    assert [r["value"] for r in again] == [r["value"] for r in first]
    assert np.isnan(again[0]["low"]) == np.isnan(first[0]["low"])
    evaluate_simple_baselines(copy, tasks, bootstrap_samples=60, on_task=computed.append)
    assert len(computed) == 2


def test_methods_are_fitted_once_for_all_splits(data: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[int] = []
    make = simple_baselines._tfidf
    monkeypatch.setattr(simple_baselines, "_tfidf", lambda *words: made.append(1) or make(*words))
    splits = ["test", "validation"]
    found = evaluate_simple_baselines(data, splits=splits, bootstrap_samples=0, use_cache=False)
    assert {row["split"] for row in found} == set(splits)
    # Recordings have no n-grams.
    assert len(made) == 4
