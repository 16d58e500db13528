"""Comparisons use the metric that runs choose for a task, or say that they use the primary one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.training.evaluation.evaluator import evaluate_model
from pipelines.training.runs.layout import CONFIG
from skillnet.model import SkillNet
from skillnet.objectives.base import NamedMetric, RowMetric, add_metrics
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_studies.analysis.finished_runs import compare_runs, read_run
from skillnet_studies.interpretation.ablation import measure_ablations
from skillnet_studies.report import references
from skillnet_studies.report.report import read_notices
from tests.helpers.small_corpora import small_config, write_corpora
from tests.helpers.synthetic_runs import write_run

TASK = "text_classification"


def measure_doubt(predictions: Any, targets: Any) -> tuple[Any, Any]:
    found = predictions[np.arange(len(predictions)), targets["labels"]]
    return 1 - found, np.ones(len(found))


DOUBT = RowMetric("classification", NamedMetric("doubt", higher_is_better=False), measure_doubt)


@pytest.fixture
def doubt() -> Iterator[None]:
    with add_metrics([DOUBT]):
        yield


def write_ranked(folder: Path, metric: str | None, **more: Any) -> Path:
    """A run that is ranked by a metric of its classification."""
    settings = configuration.load_yaml(write_run(folder, **more) / CONFIG)
    settings["tasks"][TASK]["metric"] = metric
    (folder / CONFIG).write_text(configuration.to_yaml(settings), encoding="utf-8")
    return folder


def compare_ranked(root: Path, *metrics: str | None) -> Any:
    folders = [
        write_ranked(root / f"{number}-{metric}", metric, system=system)
        for number, (system, metric) in enumerate(zip(("skillnet", "dense"), metrics, strict=True))
    ]
    return compare_runs([read_run(folder) for folder in folders])


@pytest.mark.usefixtures("doubt")
def test_a_share_of_a_package_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = compare_ranked(tmp_path / "plain", None, None)
    chosen = compare_ranked(tmp_path / "chosen", "doubt", "doubt")
    assert (chosen.metrics[TASK].name, chosen.metrics[TASK].label) == ("doubt", "1 − doubt")
    # The outcomes of these runs are equal, and count as shares of errors.
    for label in ("skillnet", "dense"):
        score, other = (each.find_score(label, TASK).value for each in (plain, chosen))
        assert score + other == pytest.approx(1)
        assert 0.5 < score < 1
    assert read_notices(chosen) == []
    # References are measured by the accuracy, so the task has none.
    found = {(task, "test"): 0.5 for task in (TASK, "text_to_image")}
    monkeypatch.setattr(references, "measure_references", lambda comparison: found)
    assert references.find_reference_scores(plain) == found
    assert set(references.find_reference_scores(chosen)) == {("text_to_image", "test")}


def test_a_metric_that_is_no_sum_over_rows_leaves_the_primary_one(tmp_path: Path) -> None:
    comparison = compare_ranked(tmp_path, "macro_f1", "macro_f1")
    assert comparison.metrics[TASK].name == "accuracy"
    (notice,) = read_notices(comparison)
    assert notice.startswith(
        "The runs rank text_classification by macro_f1, and this comparison uses accuracy"
    )


@pytest.mark.usefixtures("doubt")
@pytest.mark.parametrize("metric", ["macro_f1", "doubt"])
def test_runs_that_choose_different_metrics_are_refused(tmp_path: Path, metric: str) -> None:
    compare_ranked(tmp_path / "named", None, "accuracy")
    with pytest.raises(UserError, match=rf"{TASK} by different metrics \({metric} and accuracy\)"):
        compare_ranked(tmp_path / "other", None, metric)


def test_a_metric_of_a_package_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"tasks.{TASK}.metric is doubt, which no installed"):
        compare_ranked(tmp_path, "doubt", "doubt")


@pytest.mark.usefixtures("doubt")
def test_ablations_have_the_chosen_metric(tmp_path: Path) -> None:
    data = write_corpora(tmp_path / "data", rows=20, test_rows=12)
    model = SkillNet(small_config(data).model)
    evaluated = evaluate_model(model, data, [TASK], ["test"], bootstrap_samples=0)
    values = {row["metric"]: row["value"] for row in evaluated}
    rows = measure_ablations(model, data, [TASK], metrics={TASK: "doubt"}, swaps=False)
    assert {row["metric"] for row in rows} == {"doubt"}
    assert [row["before"] for row in rows] == pytest.approx([1 - values["doubt"]] * len(rows))
    (gone,) = [row for row in rows if (row["change"], row["skill"]) == ("remove", "text")]
    assert gone["score_drop"] == pytest.approx(gone["before"] - gone["after"])
