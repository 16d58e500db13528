"""Evaluation over several ranks: each row once, and the figures of one process."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipelines.training.evaluation import inference
from pipelines.training.evaluation.evaluator import evaluate_model
from pipelines.training.evaluation.inference import EvaluationRanks
from pipelines.training.evaluation.outcomes import OutcomeTable
from pipelines.training.loop.loop import share_score
from skillnet.model import SkillNet
from skillnet.skills import default_tasks, masked_tasks
from tests.helpers.readable_corpora import config, write_corpora
from tests.integration.ranks import run_ranks

pytestmark = pytest.mark.integration


class CountingRanks(EvaluationRanks):
    """Keeps the rows of the batches of this rank, one list per tower of a split."""

    counted: list[list[int]]

    def select(self, batches: Iterable) -> Iterator:
        rows: list[int] = []
        self.counted.append(rows)
        for batch in super().select(batches):
            rows.extend(np.atleast_1d(batch).tolist())
            yield batch


def evaluate(ranks: EvaluationRanks | None, data: str) -> tuple[list[dict], dict]:
    torch.manual_seed(0)
    model = SkillNet(replace(config(), tasks=default_tasks() | masked_tasks())).eval()
    # Batches of unequal numbers of rows, not a multiple of the ranks.
    inference.BATCH_LIMITS["cpu"] = (70, 4)
    inference.BATCH_ROWS = 7
    outcomes = OutcomeTable()
    corpora = {f"masked_{m}": c for m, c in MASKED.items()}
    rows = evaluate_model(
        model,
        data,
        precision="fp32",
        bootstrap_samples=20,
        outcomes=outcomes,
        ranks=ranks,
        corpora=corpora,
    )
    return rows, {key: outcomes[key] for key in outcomes}


MASKED = {
    "text": "headings",
    "sound": "syllables",
    "image": "drawings",
    "video": "strokes",
    "code": "functions",
}


def compare_with_one_process(rank: int, world: int, data: str) -> None:
    ranks = CountingRanks(rank, world)
    object.__setattr__(ranks, "counted", [])
    found, outcomes = evaluate(ranks, data)
    counted: list[Any] = [None] * world
    dist.all_gather_object(counted, ranks.counted)
    assert len({len(lists) for lists in counted}) == 1
    for parts in zip(*counted, strict=True):
        rows = sorted(row for part in parts for row in part)
        assert len(rows) == len(set(rows)), "a row was inferred twice"
    assert all(any(parts) for parts in counted), "every rank infers"
    if rank:
        assert not found
        assert not outcomes
        return
    expected, expected_outcomes = evaluate(None, data)
    assert len(expected) > 20
    assert [repr(row) for row in found] == [repr(row) for row in expected]
    assert outcomes.keys() == expected_outcomes.keys()
    for key, one in expected_outcomes.items():
        for name in ("numerator", "denominator", "rank"):
            np.testing.assert_array_equal(getattr(outcomes[key], name), getattr(one, name))


def test_ranks_evaluate_as_one_process_does(tmp_path: Path) -> None:
    run_ranks(3, compare_with_one_process, str(write_corpora(tmp_path / "corpora")))


def compare_score(rank: int, world: int) -> None:
    row = {"task": "topic", "split": "validation", "metric": "accuracy", "value": 0.6}
    assert share_score([] if rank else [row], world, torch.device("cpu")) == 0.6


def test_all_ranks_stop_by_the_score_of_the_first() -> None:
    run_ranks(2, compare_score)
