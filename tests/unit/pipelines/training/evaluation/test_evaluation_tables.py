"""Tables and figures of a run: cells equal the rows, figures show every task and skill."""

from typing import Any

import numpy as np
import pytest

from pipelines.training.evaluation import tables
from pipelines.training.evaluation.tables import compute_overall_score
from skillnet.config import SkillNetConfig
from skillnet.skills import default_tasks
from skillnet_evidence.cells import markdown_table
from skillnet_evidence.plot_kit import smooth_series
from sweeps.config.trials import ScoreConfig


def row(task: str, metric: str, value: float, system: str = "skillnet", **more) -> dict:
    base = {"split": "test", "low": value - 0.02, "high": value + 0.02, "activated_params": 25}
    return {"task": task, "metric": metric, "value": value, "system": system} | base | more


ROWS = [
    row("text_to_image", "recall_at_10", 0.4),
    row("text_to_image", "recall_at_10", 0.2, split="test_unseen_concept"),
    row("text_to_image", "reverse_recall_at_10", 0.3),
    row("text_to_image", "median_rank", 17.5, low=12.0, high=20.0),
    row("text_classification", "accuracy", 0.6),
    row("text_classification", "macro_f1", 0.55),
]
BASELINE_ROWS = [
    row("text_to_image", "recall_at_10", 0.026, "chance", low=float("nan"), high=float("nan")),
    row("text_to_image", "recall_at_10", 0.35, "simple_baseline"),
]


def test_the_summary_holds_one_line_per_task_in_the_papers_order():
    columns, cells = tables.summary_cells(ROWS, BASELINE_ROWS, default_tasks(), total_params=100)
    assert columns[2:4] == ["chance", "simple baseline"]
    assert cells == [
        ["text_classification", "accuracy ↑", "–", "–", "60.0 % (58.0–62.0)", "25 %"],
        ["text_to_image", "R@10 ↑", "2.6 %", "35.0 %", "40.0 % (38.0–42.0)", "25 %"],
    ]
    columns, cells = tables.summary_cells(ROWS, [], default_tasks(), total_params=100)
    assert columns == ["task", "metric", "SkillNet (95 % interval)", "active"]
    assert [len(line) for line in cells] == [4, 4]


def test_results_keep_splits_and_directions_apart():
    _, cells = tables.result_cells(ROWS)
    assert [line[:2] for line in cells] == [
        ["text_to_image", "test"],
        ["text_to_image", "test_unseen_concept"],
        ["text_to_image", "test, reverse"],
        ["text_classification", "test"],
    ]
    metrics = [line[2].replace("\u00a0", " ") for line in cells]
    assert "median rank 17.5 (12–20)" in metrics[0]
    assert "accuracy 60.0 % (58.0–62.0)" in metrics[3]


def test_a_final_evaluation_has_one_metric_per_task_and_a_validation_all():
    # MLflow draws a chart of each metric: of a final figure it would have one point.
    assert tables.flat_metrics(ROWS) == {
        "text_to_image/test_recall_at_10": 0.4,
        "text_classification/test_accuracy": 0.6,
    }
    curve = tables.flat_metrics([{**row, "split": "validation"} for row in ROWS])
    assert "text_to_image/validation_median_rank" in curve
    assert not [name for name in curve if name.endswith(("_low", "_high"))]


@pytest.mark.parametrize("split", ["test", "validation"])
def test_the_score_of_a_run_is_that_of_a_sweep(split: str):
    rows = [{**row, "split": split} for row in ROWS if row["split"] == "test"]
    score, scores = compute_overall_score(rows, split)
    assert scores == {"text_to_image": 0.4, "text_classification": 0.6}
    assert score == pytest.approx(0.5)
    if split == "validation":
        assert ScoreConfig().compute_score(rows) == (score, scores)
    assert compute_overall_score(rows, "other") == (None, {})


def test_a_pretraining_is_scored_by_its_masked_losses():
    def masked(task: str, loss: float) -> dict[str, Any]:
        return {"task": task, "split": "validation", "metric": "masked_loss", "value": loss}

    low, _ = compute_overall_score([masked("a", 1.0), masked("b", 2.0)], "validation")
    high, _ = compute_overall_score([masked("a", 0.5), masked("b", 2.0)], "validation")
    assert low is not None
    assert high is not None
    assert 0 < low < high < 1


def test_markdown_cells_cannot_break_the_table():
    text = markdown_table(["a", "b"], [["x|y", "z"]])
    assert [line.replace("\\|", "").count("|") for line in text.splitlines()] == [3, 3, 3]


def test_the_description_names_results_activation_and_facts():
    text = tables.run_description(ROWS, BASELINE_ROWS, SkillNetConfig(), 11_300_000, {"steps": 150})
    assert "11.3 M parameters in 7 skills" in text
    assert "40.0 % (38.0–42.0)" in text
    assert text.index("text_to_image R@10 **40.0 %**") < text.index("| task")
    assert "- steps: 150" in text
    line = next(x for x in text.splitlines() if x.startswith("| text_to_video, candidate"))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells == ["●", "", "", "", "●", "", "●"]


def test_smoothing_keeps_a_constant_and_the_length():
    np.testing.assert_allclose(smooth_series(np.full(50, 2.5)), 2.5)
    values = np.random.default_rng(0).standard_normal(200)
    smoothed = smooth_series(values)
    assert len(smoothed) == 200
    assert smoothed.std() < values.std()
    np.testing.assert_allclose(smoothed[100], values[95:106].mean())
