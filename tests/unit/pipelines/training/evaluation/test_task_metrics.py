"""Metrics with intervals: held-out units are the observations, and each interval has a width.

Outcomes of single rows give the metrics of the evaluation, and a file keeps them.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.training.evaluation.evaluator import evaluate_model, read_unit_numbers
from pipelines.training.evaluation.outcomes import (
    SCHEMA,
    OutcomeTable,
    paired_difference,
    read_outcomes,
    write_outcomes,
)
from skillnet.metrics import MetricIntervals, TaskMetrics
from skillnet.model import SkillNet
from skillnet.objectives.ctc import RowTranscripts
from skillnet.objectives.heads import head_class
from skillnet.objectives.retrieval import rank_metrics
from skillnet.skills import SkillPlan, Task, default_tasks
from skillnet_evidence.units import RowOutcomes
from skillnet_platform.errors import UserError
from tests.helpers.readable_corpora import config, write_corpora

UNITS = np.repeat(np.arange(20), 10)


def classification_metrics(
    predicted: np.ndarray, labels: np.ndarray, units: np.ndarray | None = None
) -> TaskMetrics:
    spec = default_tasks()["text_classification"]
    intervals = MetricIntervals(units=units)
    return head_class(spec).evaluate(spec, np.eye(15)[predicted], {"labels": labels}, intervals)[0]


def error_rate_metrics(
    errors: np.ndarray, lengths: np.ndarray, units: np.ndarray | None = None
) -> TaskMetrics:
    """Metrics of transcripts with too many symbols, or with none of one length."""
    spec = default_tasks()["speech_recognition"]
    said = [[1] * int(length + error) for length, error in zip(lengths, errors, strict=True)]
    targets = {"symbols": np.ones((len(errors), lengths.max()), int), "symbols_lengths": lengths}
    predictions = RowTranscripts(said, np.ones(len(said)))
    return head_class(spec).evaluate(spec, predictions, targets, MetricIntervals(units=units))[0]


def test_units_of_equal_rows_have_the_interval_of_as_many_rows() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 20)
    predicted = np.where(random.random(20) < 0.6, labels, (labels + 1) % 3)
    few = classification_metrics(predicted, labels)
    said, right = np.repeat(predicted, 10), np.repeat(labels, 10)
    together = classification_metrics(said, right, units=UNITS)
    assert together["accuracy"] == pytest.approx(few["accuracy"])
    assert together["macro_f1"] == pytest.approx(few["macro_f1"], abs=0.03)
    apart = classification_metrics(said, right)
    assert apart["accuracy"].high - apart["accuracy"].low < 0.25
    assert few["accuracy"].high - few["accuracy"].low > 0.35


@pytest.mark.parametrize("right", [True, False])
def test_no_interval_has_a_width_of_zero(right: bool) -> None:
    labels = np.tile([0, 1], 100)
    errors, lengths = np.full(200, 0 if right else 3), np.full(200, 3)
    ranks = np.full(200, 1 if right else 50)
    found = classification_metrics(labels if right else 1 - labels, labels, units=UNITS)
    found |= error_rate_metrics(errors, lengths, UNITS)
    found |= rank_metrics(ranks, "", MetricIntervals(units=UNITS))
    for name, interval in found.items():
        # A median or a macro-F1 that no resample changes has no interval.
        if name in ("median_rank", "macro_f1"):
            assert np.isnan([interval.low, interval.high]).all()
        else:
            assert interval.low <= interval.value <= interval.high
            # Wilson's interval for 20 of 20 units, with Student's t.
            assert interval.high - interval.low > 0.15
    assert found["token_error_rate"].value == (0 if right else 1)


def test_an_error_rate_above_one_lies_in_its_interval() -> None:
    errors = np.random.default_rng(0).integers(5, 40, 50)
    found = error_rate_metrics(errors, np.full(50, 3))["token_error_rate"]
    assert 1 < found.low < found.value < found.high


def test_one_unit_has_values_and_no_intervals() -> None:
    found = classification_metrics(np.array([0, 1, 1]), np.array([0, 1, 0]), units=np.zeros(3, int))
    assert found["accuracy"].value == pytest.approx(2 / 3)
    for interval in found.values():
        assert np.isnan([interval.low, interval.high]).all()


def test_captions_of_a_row_are_one_unit_at_most() -> None:
    ranks, owners = np.array([1, 1, 50, 1, 50]), np.array([0, 0, 1, 2, 2])
    of_rows = rank_metrics(ranks, "", MetricIntervals(), owners)["recall_at_10"]
    assert of_rows == rank_metrics(ranks, "", MetricIntervals(units=owners))["recall_at_10"]
    together = rank_metrics(ranks, "", MetricIntervals(units=np.array([0, 0, 1])), owners)
    units = MetricIntervals(units=np.array([0, 0, 0, 1, 1]))
    assert together["recall_at_10"] == rank_metrics(ranks, "", units)["recall_at_10"]
    assert together["recall_at_10"] != of_rows


def test_rows_without_a_name_are_units_by_themselves() -> None:
    names = pa.chunked_array([["b", None, "a"], [None, "b"]], pa.string())
    assert read_unit_numbers(pa.table({"unit": names}), "x/test").tolist() == [0, 1, 2, 3, 0]
    nothing = pa.table({"unit": pa.nulls(3, pa.string())})
    assert read_unit_numbers(nothing, "x/test").tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"x/test: no column 'unit'. Prepare the corpus again."):
        read_unit_numbers(pa.table({"key": ["a"]}), "x/test")


def test_rows_without_labels_do_not_count_in_average_precision() -> None:
    """A row without labels has no ranking; counted as 0 it would lower the mean."""
    scores = np.array([[0.9, 0.1, 0.2], [0.1, 0.3, 0.8], [0.7, 0.6, 0.1], [0.2, 0.4, 0.3]])
    truth = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]])
    spec = Task("multi_label", {"input": SkillPlan(("general", "text"), "text")}, outputs=3)
    units = np.array([0, 0, 1, 2])

    def measure(rows: np.ndarray, samples: int = 200) -> TaskMetrics:
        intervals = MetricIntervals(samples=samples, units=units[rows])
        targets = {"label_sets": truth[rows]}
        return head_class(spec).evaluate(spec, scores[rows], targets, intervals).metrics

    everything = np.ones(4, bool)
    metric = measure(everything, 0)
    # The label of the first row is first, that of the third row second.
    assert metric["average_precision"].value == pytest.approx((1 + 1 / 2) / 2)
    alone, whole = measure(truth.any(1))["average_precision"], measure(everything)
    assert whole["average_precision"].value == pytest.approx(alone.value)
    assert whole["average_precision"].low > 0


PRIMARY_METRIC = {
    "text_classification": "accuracy",
    "speech_recognition": "token_error_rate",
    "text_to_image": "recall_at_10",
    "text_to_video": "recall_at_10",
    "text_to_code": "recall_at_10",
}


def test_the_primary_metric_of_a_split_follows_from_its_rows(tmp_path: Path):
    data = write_corpora(tmp_path / "corpora")
    torch.manual_seed(0)
    outcomes = OutcomeTable()
    rows = evaluate_model(SkillNet(config()), data, bootstrap_samples=0, outcomes=outcomes)
    write_outcomes(outcomes, tmp_path / "outcomes.parquet")
    assert pq.read_schema(tmp_path / "outcomes.parquet").equals(SCHEMA)
    again = read_outcomes(tmp_path / "outcomes.parquet")
    compared = 0
    for row in rows:
        if row["metric"] == PRIMARY_METRIC[row["task"]]:
            found = again[row["task"], row["split"]]
            assert found.value == pytest.approx(row["value"], abs=1e-6)
            assert np.isfinite(found.rank).all() == row["task"].startswith("text_to_")
            compared += 1
    assert compared == len(again) == 6
    # The units of the shards: two rows each, then rows by themselves.
    units = again["text_classification", "test"].unit
    assert units[:4].tolist() == [0, 0, 1, 1]
    assert len(set(units.tolist())) == 3 * len(units) // 4
    ranks = again["text_to_code", "test"].rank
    median = [r for r in rows if (r["task"], r["metric"]) == ("text_to_code", "median_rank")]
    assert np.median(ranks) == median[0]["value"]


def _table(rows: list[int]) -> pa.Table:
    count = len(rows)
    ones, zeros = [1.0] * count, [0.0] * count
    columns = [["a"] * count, ["test"] * count, rows, ones, ones, zeros, [0] * count]
    arrays = [pa.array(c, field.type) for c, field in zip(columns, SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def test_rows_are_read_in_their_order(tmp_path: Path):
    table = _table([2, 0, 1]).set_column(3, "numerator", pa.array([2.0, 0.0, 1.0], pa.float32()))
    pq.write_table(table, tmp_path / "o.parquet")
    assert read_outcomes(tmp_path / "o.parquet")["a", "test"].numerator.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("rows", [[0, 2], [0, 1, 1], [1]])
def test_missing_and_duplicated_rows_are_rejected(tmp_path: Path, rows: list[int]):
    pq.write_table(_table(rows), tmp_path / "o.parquet")
    with pytest.raises(UserError, match="a test: rows are missing or duplicated"):
        read_outcomes(tmp_path / "o.parquet")


def test_another_file_is_rejected_with_one_line(tmp_path: Path):
    path = tmp_path / "o.parquet"
    with pytest.raises(UserError, match="no such file"):
        read_outcomes(path)
    path.write_text("task,split\n")
    with pytest.raises(UserError, match="not a Parquet file"):
        read_outcomes(path)
    pq.write_table(_table([0]).drop_columns(["denominator"]), path)
    with pytest.raises(UserError, match="the column denominator is missing"):
        read_outcomes(path)


def test_a_paired_difference_is_narrower_than_an_unpaired_one() -> None:
    random = np.random.default_rng(0)
    hard = random.random(400)
    rest = (np.ones(400), np.full(400, np.nan), np.arange(400))
    one = RowOutcomes((hard < 0.6).astype(float), *rest)
    other = RowOutcomes((hard < 0.5).astype(float), *rest)
    found = paired_difference(one, other)
    assert found.value == pytest.approx(one.value - other.value)
    assert 0 < found.low < found.value < found.high < 0.15
    same = paired_difference(one, one)
    assert same.value == 0
    assert same.low == -same.high < 0
    with pytest.raises(ValueError, match="not of the same rows"):
        paired_difference(one, RowOutcomes(one.numerator[1:], *(each[1:] for each in rest)))


def test_a_paired_difference_counts_units_and_not_rows() -> None:
    """Ten rows of a unit that agree are one observation."""
    random = np.random.default_rng(1)
    better_40, unit = random.random(40) < 0.4, np.repeat(np.arange(40), 10)
    rest = (np.ones(400), np.full(400, np.nan))
    one = np.repeat(better_40, 10).astype(float)
    rows = paired_difference(*(RowOutcomes(x, *rest, np.arange(400)) for x in (one, np.zeros(400))))
    units = paired_difference(*(RowOutcomes(x, *rest, unit) for x in (one, np.zeros(400))))
    assert units.value == rows.value
    assert units.high - units.low == pytest.approx(10**0.5 * (rows.high - rows.low), rel=0.05)
    # Equal weights but other units are not the same rows.
    with pytest.raises(ValueError, match="not of the same rows"):
        paired_difference(RowOutcomes(one, *rest, unit), RowOutcomes(one, *rest, np.arange(400)))


def test_a_unit_is_the_number_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "o.parquet"
    pq.write_table(_table([0, 1]).set_column(6, "unit", pa.array([0, 7], pa.int32())), path)
    with pytest.raises(UserError, match="a test: a unit has no number of a row"):
        read_outcomes(path)
