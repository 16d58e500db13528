"""Outcomes of single rows: they give the metrics of the evaluation, and a file keeps them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.training.evaluation.evaluator import evaluate_model
from pipelines.training.evaluation.outcomes import (
    SCHEMA,
    OutcomeTable,
    paired_difference,
    read_outcomes,
    write_outcomes,
)
from skillnet.model import SkillNet
from skillnet_evidence.units import RowOutcomes
from skillnet_platform.errors import UserError
from tests.helpers.readable_corpora import config, write_corpora

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
