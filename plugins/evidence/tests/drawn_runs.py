"""Runs with made-up outcomes, for tests of comparisons."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skillnet_evidence.comparison import SystemComparison, compare_systems
from skillnet_evidence.scores import ScoredMetric, ScoredRun, TaskCost
from skillnet_evidence.units import RowOutcomes

TASKS = (
    "text_classification",
    "speech_recognition",
    "text_to_image",
    "text_to_video",
    "text_to_code",
)
METRICS = {
    "text_classification": ScoredMetric("accuracy"),
    "speech_recognition": ScoredMetric("token_error_rate", False, "1 − token error"),
}


def draw_run(
    label: str,
    seed: int = 0,
    skill: float | Mapping[str, float] = 0.0,
    *,
    tasks: Sequence[str] = TASKS,
    rows: int = 200,
    by_seed: float = 0.05,
    draw: str = "",
    **more: Any,
) -> ScoredRun:
    """A run whose answers follow from how hard each row is, the seed, and the system's skill.

    ``skill`` shifts the share of right answers: 0 is about 0.6, 0.5 about 0.75. ``draw`` seeds the
    randomness, by default the label.
    """
    outcomes = {}
    for place, task in enumerate(tasks):
        shift = skill if isinstance(skill, float | int) else skill.get(task, 0.0)
        hard = np.random.default_rng(place).normal(0, 1, rows)
        own = np.random.default_rng([place, seed, *(draw or label).encode()])
        right = 0.3 + shift + own.normal(0, by_seed) + hard + own.normal(0, 0.5, rows) > 0
        weight = np.ones(rows)
        if task == "speech_recognition":
            weight, right = 1.0 + np.arange(rows) % 3, ~right
        rank = np.full(rows, np.nan)
        outcomes[task, "test"] = RowOutcomes(right * weight, weight, rank, np.arange(rows))
    given = {
        "metrics": {task: METRICS.get(task, ScoredMetric("recall_at_10")) for task in tasks},
        "name": f"{label}-seed{seed}",
        "costs": {task: TaskCost(1000, 100_000 * (n + 1)) for n, task in enumerate(tasks)},
        "steps": 12,
        "seconds": 3.5 + seed,
    }
    return ScoredRun(label, seed, outcomes, **given | more)


def compared(
    systems: Mapping[str, float | Mapping[str, float]],
    seeds: Sequence[int] = (0, 1, 2, 3),
    reference: str | None = None,
    **more: Any,
) -> SystemComparison:
    """Compare made-up runs of systems, label -> skill."""
    runs = [draw_run(label, seed, x, **more) for label, x in systems.items() for seed in seeds]
    return compare_systems(runs, reference)
