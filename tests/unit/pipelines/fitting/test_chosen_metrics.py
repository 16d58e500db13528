"""A task names the metric that ranks its runs: of its objective, or of another package."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.evaluate import EvaluateConfig, evaluate_trained_model
from pipelines.fitting import TrainingData
from pipelines.serving.registration import registry_metrics
from pipelines.training.evaluation.outcomes import OUTCOMES_FILE, read_outcomes
from pipelines.training.evaluation.tables import (
    compute_overall_score,
    flat_metrics,
    run_description,
    score_chosen,
)
from skillnet.model import SkillNet
from skillnet.objectives.base import NamedMetric, RowMetric, add_metrics, find_objective
from skillnet_platform.errors import UserError
from skillnet_platform.tracking.champion import MetricEstimate
from sweeps.config.trials import ScoreConfig
from tests.unit.pipelines.fitting.test_class_weights import SIZES, make_rows

#: Share of the true class in the predictions, as a loss: lower is better, and not bounded.
SURPRISE = NamedMetric("surprise", higher_is_better=False, bounds=(0.0, math.inf))
#: Share of the other classes.
DOUBT = NamedMetric("doubt", higher_is_better=False)
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


def measure_doubt(predictions: Any, targets: Any) -> tuple[Any, Any]:
    found = predictions[np.arange(len(predictions)), targets["labels"]]
    return 1 - found, np.ones(len(found))


METRICS = [
    RowMetric("classification", SURPRISE, measure_surprise),
    RowMetric("classification", DOUBT, measure_doubt),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    rows = make_rows({"鱼": 30, "鸟": 30})
    return TrainingData({"kind": rows}, tmp_path_factory.mktemp("chosen"), vocabulary=300)


def make_model(data: TrainingData) -> SkillNet:
    torch.manual_seed(0)
    return SkillNet(data.config(**SIZES))


def test_a_run_is_stopped_and_ranked_by_the_metric_that_it_names(data: TrainingData) -> None:
    result = make_model(data).fit(data, SETTINGS, metrics=METRICS)
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


@pytest.mark.parametrize(
    ("chosen", "compared", "shown"),
    [
        ("doubt", "doubt", "kind doubt **{:.1%}**"),
        # No share of a package: rows of two runs are compared by the primary metric.
        ("surprise", "accuracy", "kind surprise **{:.4g}**"),
        ("macro_f1", "accuracy", "kind macro-F1 **{:.1%}**"),
        (None, "accuracy", "kind accuracy **{:.1%}**"),
    ],
)
def test_outcomes_page_and_registry_have_the_chosen_metric(
    data: TrainingData, tmp_path: Path, chosen: str | None, compared: str, shown: str
) -> None:
    settings = SETTINGS | {"tasks.kind.metric": chosen, "training.steps": 10}
    model = make_model(data)
    result = model.fit(data, settings, run_dir=tmp_path, metrics=METRICS)
    rows = [row for row in result["evaluation"] if row["split"] == "test"]
    values = {row["metric"]: row["value"] for row in rows}
    outcomes = read_outcomes(Path(result["run"]) / OUTCOMES_FILE)
    assert outcomes["kind", "test"].value == pytest.approx(values[compared])
    assert values["doubt"] != values["accuracy"]
    name = chosen or "accuracy"
    (row,) = [row for row in rows if row["metric"] == name]
    manifest = {"tasks": {"kind": {"corpus_digest": "d"}}}
    with add_metrics(METRICS):
        # Tasks of other objectives have other predictions.
        assert not find_objective("retrieval").further
        page = run_description(rows, [], model.config, 100)
        estimates = registry_metrics(rows, model.config.tasks, manifest)
        later = evaluate_trained_model(
            EvaluateConfig(
                result["run"], log=False, output=str(tmp_path / "a.csv"), simple_baselines=False
            )
        )
    text = shown.format(row["value"]).replace("%**", " %**")
    assert f"{text}." in page
    assert f"{name.replace('_f', '-F')} {'↓' if name in ('doubt', 'surprise') else '↑'}" in page
    is_more = name not in ("doubt", "surprise")
    bounds = pytest.approx((row["low"], row["high"]), nan_ok=True)
    found = estimates["kind"]
    assert (found.low, found.high) == bounds
    # No number equals NaN, the bounds of a share without an interval.
    expected = MetricEstimate(name, row["value"], 0.0, 0.0, is_more, "d")
    assert replace(found, low=0.0, high=0.0) == expected
    assert f"kind/test_{name}" in flat_metrics(rows)
    # An evaluation of the finished model is ranked by the same metric.
    scored = {row["metric"]: row["score"] for row in later.rows if "score" in row}
    assert scored == ({} if chosen is None else {chosen: pytest.approx(row["score"])})
