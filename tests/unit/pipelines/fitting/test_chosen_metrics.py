"""A task names the metric that ranks its runs: of its objective, or of another package."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.fitting import TrainingData
from pipelines.training.evaluation.tables import compute_overall_score, score_chosen
from skillnet.model import SkillNet
from skillnet.objectives.base import NamedMetric, RowMetric
from skillnet_platform.errors import UserError
from sweeps.config.trials import ScoreConfig
from tests.unit.pipelines.fitting.test_class_weights import SIZES, make_rows

#: Share of the true class in the predictions, as a loss: lower is better, and not bounded.
SURPRISE = NamedMetric("surprise", higher_is_better=False, bounds=(0.0, math.inf))
SETTINGS = {
    "training.steps": 40,
    "training.evaluate_every": 10,
    "training.patience": 20,
    "tasks.kind.batch_size": 8,
    "tasks.kind.metric": "surprise",
}


def measure_surprise(predictions: Any, targets: Any) -> tuple[Any, Any]:
    found = predictions[np.arange(len(predictions)), targets["labels"]]
    return -np.log(np.maximum(found, 1e-9)), np.ones(len(found))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    rows = make_rows({"鱼": 30, "鸟": 30})
    return TrainingData({"kind": rows}, tmp_path_factory.mktemp("chosen"), vocabulary=300)


def make_model(data: TrainingData) -> SkillNet:
    torch.manual_seed(0)
    return SkillNet(data.config(**SIZES))


def test_a_run_is_stopped_and_ranked_by_the_metric_that_it_names(data: TrainingData) -> None:
    metric = RowMetric("classification", SURPRISE, measure_surprise)
    result = make_model(data).fit(data, SETTINGS, metrics=[metric])
    # The accuracy reaches its end soon, and the surprise falls on.
    assert result["best_step"] == 40
    plain = make_model(data).fit(data, SETTINGS | {"tasks.kind.metric": None})
    assert plain["best_step"] < 40
    values = {row["metric"]: row["value"] for row in result["evaluation"]}
    expected = 1 / (1 + values["surprise"])
    assert compute_overall_score(result["evaluation"], "test") == (expected, {"kind": expected})
    rows = [row | {"split": "validation"} for row in result["evaluation"]]
    assert ScoreConfig().compute_score(rows)[0] == expected
    score, _ = compute_overall_score(plain["evaluation"], "test")
    assert score == {row["metric"]: row["value"] for row in plain["evaluation"]}["accuracy"]


def test_an_unknown_metric_is_named_before_training(data: TrainingData) -> None:
    with pytest.raises(UserError, match=r"tasks.kind.metric: unknown metric 'makro_f1'.*macro_f1"):
        make_model(data).fit(data, {"tasks.kind.metric": "makro_f1"})


@pytest.mark.parametrize(
    ("metric", "value", "score"),
    [
        (NamedMetric("accuracy"), 0.8, 0.8),
        (NamedMetric("correlation", bounds=(-1.0, 1.0)), -0.2, 0.0),
        (NamedMetric("error_rate", higher_is_better=False, bounds=(0.0, math.inf)), 0.3, 0.7),
        (NamedMetric("error_rate", higher_is_better=False, bounds=(0.0, math.inf)), 1.3, 0.0),
        (SURPRISE, 3.0, 0.25),
    ],
)
def test_a_higher_score_is_better(metric: NamedMetric, value: float, score: float) -> None:
    assert score_chosen(metric, value) == pytest.approx(score)
