"""One score of a run, by which lists of runs are sorted and sweeps choose.

:func:`compute_overall_score` is called at the end of a training run, and by the sweeps for each
evaluation of a trial.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.training.evaluation.tables import PRIMARY_METRICS, SCORED_METRICS, score_metric


def compute_overall_score(
    rows: Sequence[Mapping[str, Any]], split: str
) -> tuple[float | None, dict[str, float]]:
    """Return the mean score of the tasks on a split, and the score of each task.

    The score of a task is its accuracy, its recall at 10, or 1 − token error rate; see
    :func:`pipelines.training.evaluation.tables.score_metric`. Tasks without labels count only if no
    task has labels, as in a pretraining.

    Args:
        rows: evaluation rows of one system.
        split: that counts.

    Returns:
        None if no task has a row on the split.
    """
    chosen = [row for row in rows if row["split"] == split]
    scores = {
        str(row["task"]): score_metric(row["metric"], float(row["value"]))
        for row in chosen
        if row["metric"] in SCORED_METRICS
    }
    # The score of a loss is exp(-loss), between 0 and 1 for pixels as well. Of masked tokens it is
    # the geometric mean of their probabilities.
    scores = scores or {
        str(row["task"]): _score_unlabelled(row["metric"], float(row["value"]))
        for row in chosen
        if row["metric"] in PRIMARY_METRICS
    }
    return (average_scores(scores) if scores else None), scores


def _score_unlabelled(metric: str, value: float) -> float:
    return value if PRIMARY_METRICS[metric] else math.exp(-value)


def average_scores(scores: Mapping[str, float]) -> float:
    """Return the mean of the scores of tasks.

    Args:
        scores: task -> score; at least one.
    """
    return sum(scores.values()) / len(scores)
