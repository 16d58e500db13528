"""Objectives: one of a third party trains and is evaluated, and outputs come from the manifest."""

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import label_ranking_average_precision_score, r2_score

from pipelines.data.shards.dataset import open_corpus
from pipelines.training.config.run import FinetuneConfig, TaskTraining
from pipelines.training.evaluation.evaluator import evaluate_model
from pipelines.training.evaluation.outcomes import OutcomeTable
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.runs.model_tasks import resolve_model_tasks
from skillnet.config import SkillNetConfig
from skillnet.metrics import MetricIntervals
from skillnet.model import SkillNet
from skillnet.objectives import base, heads
from skillnet.objectives.base import Objective
from skillnet.objectives.heads import head_class
from skillnet.objectives.multi_label import average_precision_of_rows
from skillnet.objectives.regression import RegressionHead
from skillnet.skills import SkillPlan, Task
from skillnet.vocabulary import ModelVocabulary, parse_vocabulary
from skillnet_planning.example_batches import build_example_batch
from tests.helpers.small_corpora import small_config, write_corpora

TEXT = {"input": SkillPlan(("general", "text"), "text")}

ROOT = Path(__file__).parents[3]
#: Complete files of the page of plug-ins: title -> source.
PLUGINS = dict(
    re.findall(
        r'^```python title="([^"]+)"\n(.*?)^```$',
        (ROOT / "docs" / "reference" / "plugins.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora") / "data")


@pytest.fixture
def margin_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package with an entry point, as pip leaves it."""
    source = PLUGINS["margin_objective.py"]
    (tmp_path / "margin_objective.py").write_text(source, encoding="utf-8")
    about = tmp_path / "margin-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: margin\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        f"[{base.GROUP}]\nmargin = margin_objective:MARGIN\nother = margin_objective:MARGIN\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    _forget_entries()
    yield
    sys.modules.pop("margin_objective", None)
    _forget_entries()


def _forget_entries() -> None:
    base.find_objective.cache_clear()
    base._other_entries.cache_clear()


def run_of(data: Path, task: Task) -> FinetuneConfig:
    """Return a run of one task on the texts, with the outputs of the manifest."""
    config = small_config(data, steps=3)
    config.tasks = {"subject": TaskTraining("headings", batch_size=8)}
    config.model = replace(config.model, tasks={"subject": task})
    return resolve_model_tasks(config, {"headings": open_corpus(data / "headings").manifest})


@pytest.mark.usefixtures("margin_package")
def test_an_objective_of_another_package_trains_and_is_evaluated(data: Path) -> None:
    config = run_of(data, Task("margin", TEXT))
    assert config.model.tasks["subject"].outputs == 15
    assert build_example_batch(config, "subject", 2, 2).targets["labels"].shape == (2,)
    model = train_model(ResolvedRun(config)).model
    outcomes = OutcomeTable()
    (row,) = evaluate_model(
        model, data, corpora={"subject": "headings"}, splits=["test"], outcomes=outcomes
    )
    assert (row["metric"], row["low"] <= row["value"] <= row["high"]) == ("margin_hits", True)
    assert outcomes["subject", "test"].value == row["value"]


def test_the_page_of_plug_ins_shows_the_packages_that_tests_install() -> None:
    files = [*ROOT.glob("tests/*_package/*.py")]
    assert files
    for path in files:
        assert PLUGINS[path.name] == path.read_text(encoding="utf-8"), path.name


@pytest.mark.usefixtures("margin_package")
@pytest.mark.parametrize("wrong", [0, 1, 7, 8])
def test_the_interval_of_another_packages_accuracy_stays_in_range(wrong: int) -> None:
    task = Task("margin", TEXT, outputs=2)
    labels = np.array([0] * wrong + [1] * (8 - wrong))
    predictions = np.tile([0.0, 1.0], (8, 1))
    found = head_class(task).evaluate(task, predictions, {"labels": labels}, MetricIntervals())
    value, low, high = found.metrics["margin_hits"]
    assert 0 <= low <= value <= high <= 1
    assert value == 1 - wrong / 8
    assert low < high


@pytest.mark.parametrize(
    ("metric", "bounds", "scale"),
    [
        ("accuracy", (0.0, 1.0), "share"),
        ("word_error_rate", (0.0, math.inf), "error_rate"),
        ("perplexity", (1.0, math.inf), "free"),
        ("correlation", (-1.0, 1.0), "free"),
    ],
)
def test_bounds_decide_the_scale_of_a_metric(
    metric: str, bounds: tuple[float, float], scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Objective("made", "skillnet.objectives.heads:TaskHead", metric, bounds=bounds)
    assert made.scale == scale
    monkeypatch.setattr(heads, "find_objective", lambda _: made)
    # Three rows of very different scores have an interval far beyond the bounds.
    monkeypatch.setattr(
        "skillnet.objectives.heads.TaskHead.score_rows",
        classmethod(lambda *_: (np.array([0.9, 1.0, 0.2]), np.ones(3))),
    )
    spec = Task("regression", TEXT)
    found = heads.TaskHead.evaluate(spec, None, {}, MetricIntervals())
    value, low, high = found.metrics[metric]
    assert bounds[0] <= low or low == value
    assert value <= high <= bounds[1]


@pytest.mark.usefixtures("margin_package")
def test_an_entry_point_names_the_objective_of_its_own_name() -> None:
    with pytest.raises(ValueError, match=r"skillnet\.objectives:other names no Objective"):
        Task("other", TEXT)


def test_a_task_without_outputs_takes_those_of_its_corpus(data: Path) -> None:
    config = run_of(data, Task("classification", TEXT))
    assert config.model.tasks["subject"].outputs == 15
    # A number that the user gives stays, and validation compares it with the corpus.
    assert run_of(data, Task("classification", TEXT, 7)).model.tasks["subject"].outputs == 7


def test_a_task_whose_outputs_nobody_knows_is_named() -> None:
    config = SkillNetConfig(tasks={"mood": Task("classification", TEXT)})
    with pytest.raises(ValueError, match=r"model\.tasks\.mood\.outputs is 0: .* of its labels"):
        SkillNet(config)


def test_average_precision_equals_that_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    truth = random.random((40, 6)) < 0.3
    truth[~truth.any(1), 0] = True
    scores = random.integers(0, 4, truth.shape) / 4  # with equal scores
    ours = average_precision_of_rows(scores, truth)
    assert ours.mean() == pytest.approx(label_ranking_average_precision_score(truth, scores))
    assert average_precision_of_rows(scores[:1], np.zeros((1, 6), bool)).tolist() == [0]


def test_the_score_of_a_regression_is_r_squared() -> None:
    random = np.random.default_rng(1)
    right, predicted = random.normal(5, 2, 50), random.normal(5, 2, 50)
    numerator, denominator = RegressionHead.score_rows(predicted[:, None], {"numbers": right})
    assert numerator.sum() / denominator.sum() == pytest.approx(r2_score(right, predicted))


def test_the_scale_of_a_regression_is_saved_with_the_model() -> None:
    vocabulary = ModelVocabulary("digest", {"topic": ("a",)}, {"price": (3.5, 0.25)})
    assert parse_vocabulary(vocabulary.to_dict()) == vocabulary
    assert vocabulary.restrict_to(["price"]).scales == {"price": (3.5, 0.25)}
    # Files of models without a regression keep their bytes.
    assert "scales" not in ModelVocabulary("digest").to_dict()
    for wrong in ([1.0], [1.0, 0.0], [float("nan"), 1.0], ["1", 2.0]):
        with pytest.raises(ValueError, match=r"vocabulary\.scales\.price"):
            parse_vocabulary(vocabulary.to_dict() | {"scales": {"price": wrong}})
