"""Systems held against each other: estimates, paired tests, relative scores, what they cost.

Everything is computed on scores, of which more is better: accuracy, 1 - token error rate,
recall at 10. Only the split ``test`` is tested; other test splits get intervals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from pipelines.evaluation.tables import in_order
from skillnet_platform.errors import UserError
from sweeps.analysis import statistics
from sweeps.analysis.finished_runs import PRETRAINED, FinishedRun, check_comparable
from sweeps.analysis.statistics import RunSample, ScoreEstimate, SeedVariance
from sweeps.config.trials import PRIMARY_METRICS

SPLIT = "test"

#: Stands for the mean over the tasks that all systems have.
MEAN = "mean"

ALPHA = 0.05


class TaskCost(NamedTuple):
    """What one example of a task costs a system.

    Args:
        activated: parameters that it reads.
        flops: floating-point operations executed, forward.
    """

    activated: float
    flops: float


@dataclass(frozen=True)
class PairedTest:
    """A paired test of two systems on a task.

    Args:
        kind: ``system`` against SkillNet, or what ``pretraining`` added.
        system: label.
        against: label.
        task: name, or ``mean``.
        change: score of ``system`` less that of ``against``.
        p: two-sided p-value.
        corrected: the same after Holm's correction over all tests of the comparison.
    """

    __test__ = False  # pytest takes classes of this name for tests

    kind: Literal["system", "pretraining"]
    system: str
    against: str
    task: str
    difference: ScoreEstimate
    p: float
    p_corrected: float

    @property
    def is_significant(self) -> bool:
        """Whether the difference is not chance, at 5 % after correction."""
        return self.p_corrected <= ALPHA


@dataclass(frozen=True)
class RelativeScore:
    """Mean over tasks of a system's score divided by the specialists'."""

    against: str
    value: ScoreEstimate


@dataclass(frozen=True)
class SystemComparison:
    """All that is computed of a set of finished runs.

    Args:
        systems: label -> its runs, by seed.
        reference: label of the system that the others are tested against.
        specialist: label of the system whose scores count as 1.
        tasks: all tasks, in order.
        common: those that every system has; means are over them.
        metrics: task -> its primary metric.
        splits: task -> its test splits.
        samples: (label, task, split) -> score of every run.
        scores: (label, task, split) -> estimate; (label, "mean", "test") the mean over tasks.
        relative: label -> relative score.
        tests: all tests.
        costs: (label, task) -> cost; (label, "mean") the mean over tasks.
    """

    systems: Mapping[str, Sequence[FinishedRun]]
    reference: str
    specialist: str
    tasks: Sequence[str]
    common_tasks: Sequence[str]
    metrics: Mapping[str, str]
    splits: Mapping[str, Sequence[str]]
    samples: Mapping[tuple[str, str, str], RunSample]
    scores: Mapping[tuple[str, str, str], ScoreEstimate]
    relative: Mapping[str, RelativeScore]
    tests: Sequence[PairedTest]
    costs: Mapping[tuple[str, str], TaskCost]

    @property
    def runs(self) -> list[FinishedRun]:
        """All runs."""
        return [run for runs in self.systems.values() for run in runs]

    @property
    def seeds(self) -> int:
        """The smallest number of seeds of a system."""
        return min(len(runs) for runs in self.systems.values())

    def find_score(self, label: str, task: str, split: str = SPLIT) -> ScoreEstimate | None:
        """Estimate of a score, if the system has the task."""
        return self.scores.get((label, task, split))

    def find_test(self, system: str, against: str, task: str) -> PairedTest | None:
        """The test of two systems on a task, if there is one."""
        for test in self.tests:
            if (test.system, test.against, test.task) == (system, against, task):
                return test
        return None


def compare_systems(
    runs: Sequence[FinishedRun], reference: str = "skillnet", specialist: str = "specialist"
) -> SystemComparison:
    """Compare the systems of finished runs.

    Args:
        runs: of all systems and seeds; runs of one system have one label.
        reference: label of the system that the others are tested against. A system whose label
            ends in ``-pretrained`` is tested against the reference's pretrained variant.
        specialist: label of the system whose scores count as 1; in the same way.

    Raises:
        UserError: no runs, runs measured on different rows, or no task in common.
    """
    if not runs:
        raise UserError("there are no finished runs to compare")
    if reference == specialist:
        raise UserError(f"reference and specialist are both {reference!r}; name two systems")
    check_comparable(runs)
    systems: dict[str, list[FinishedRun]] = {}
    for run in runs:
        systems.setdefault(run.label, []).append(run)
    splits: dict[str, list[str]] = {}
    metrics: dict[str, str] = {}
    for run in runs:
        for task, split in run.outcomes:
            if split not in splits.setdefault(task, []):
                splits[task].append(split)
        metrics |= {
            row["task"]: row["metric"] for row in run.rows if row["metric"] in PRIMARY_METRICS
        }
    tasks = [task for task in in_order(splits) if task in metrics]
    samples = _build_samples(systems, tasks, splits, metrics)
    common = [t for t in tasks if all((label, t, SPLIT) in samples for label in systems)]
    if not common:
        raise UserError("the systems have no task in common that was measured on the split test")
    for label in systems:
        samples[label, MEAN, SPLIT] = statistics.average_samples(
            [samples[label, t, SPLIT] for t in common]
        )
    spreads = {
        key: statistics.pool_seed_variance(
            [sample for own, sample in samples.items() if own[1:] == key]
        )
        for key in dict.fromkeys(key[1:] for key in samples)
    }
    scores = {
        (label, task, split): statistics.estimate_mean(
            sample,
            spreads[task, split],
            # More symbols may be wrong than there are: that score has no lower end.
            least=-np.inf if metrics.get(task) == "token_error_rate" else 0.0,
            most=1.0,
        )
        for (label, task, split), sample in samples.items()
    }
    return SystemComparison(
        systems,
        reference,
        specialist,
        tasks,
        common,
        metrics,
        splits,
        samples,
        scores,
        _estimate_relative_scores(samples, list(systems), common, specialist),
        _run_tests(samples, spreads, list(systems), [*tasks, MEAN], reference),
        _collect_costs(systems, tasks, common),
    )


def find_variant(base: str, label: str, labels: Sequence[str]) -> str | None:
    """The variant of ``base`` that ``label`` is held against: pretrained against pretrained."""
    wanted = base + PRETRAINED if label.endswith(PRETRAINED) else base
    for name in (wanted, base, base + PRETRAINED):
        if name in labels:
            return name
    return None


def _build_samples(
    systems: Mapping[str, Sequence[FinishedRun]],
    tasks: Sequence[str],
    splits: Mapping[str, Sequence[str]],
    metrics: Mapping[str, str],
) -> dict[tuple[str, str, str], RunSample]:
    samples = {}
    for label, runs in systems.items():
        for task in tasks:
            for split in splits[task]:
                having = [run for run in runs if (task, split) in run.outcomes]
                if not having:
                    continue
                parts = {run.seed: run.outcomes[task, split] for run in having}
                weight = next(iter(parts.values())).weight
                more_is_better = PRIMARY_METRICS[metrics[task]]
                amounts = {
                    seed: part.amount if more_is_better else weight - part.amount
                    for seed, part in parts.items()
                }
                samples[label, task, split] = statistics.build_sample(
                    amounts, weight, (task, split)
                )
    return samples


def _estimate_relative_scores(
    samples: Mapping[tuple[str, str, str], RunSample],
    labels: Sequence[str],
    common: Sequence[str],
    specialist: str,
) -> dict[str, RelativeScore]:
    means: dict[str, tuple[str, RunSample]] = {}
    for label in labels:
        against = find_variant(specialist, label, labels)
        if against is None:
            continue
        ratios = [
            statistics.divide_samples(samples[label, task, SPLIT], samples[against, task, SPLIT])
            for task in common
        ]
        means[label] = (against, statistics.average_samples(ratios))
    spread = statistics.pool_seed_variance(
        [own for label, (against, own) in means.items() if label != against]
    )
    return {
        label: RelativeScore(
            against, statistics.estimate_mean(own, spread if label != against else None)
        )
        for label, (against, own) in means.items()
    }


def _run_tests(
    samples: Mapping[tuple[str, str, str], RunSample],
    spreads: Mapping[tuple[str, str], SeedVariance | None],
    labels: Sequence[str],
    tasks: Sequence[str],
    reference: str,
) -> list[PairedTest]:
    pairs: list[tuple[Literal["system", "pretraining"], str, str]] = []
    for label in labels:
        against = find_variant(reference, label, labels)
        if against is not None and label.removesuffix(PRETRAINED) != reference:
            pairs.append(("system", label, against))
    for label in labels:
        if label.endswith(PRETRAINED) and label.removesuffix(PRETRAINED) in labels:
            pairs.append(("pretraining", label, label.removesuffix(PRETRAINED)))
    found = []
    for kind, label, against in pairs:
        for task in tasks:
            left, right = samples.get((label, task, SPLIT)), samples.get((against, task, SPLIT))
            if left is None or right is None:
                continue
            change = statistics.subtract_samples(left, right)
            pooled = spreads[task, SPLIT]
            spread = pooled.for_difference() if pooled else None
            estimate = statistics.estimate_mean(change, spread)
            p = statistics.compute_p_value(change, spread)
            found.append((kind, label, against, task, estimate, p))
    corrected = statistics.correct_p_values([p for *_, p in found])
    return [PairedTest(*values, both) for values, both in zip(found, corrected, strict=True)]


def _collect_costs(
    systems: Mapping[str, Sequence[FinishedRun]], tasks: Sequence[str], common: Sequence[str]
) -> dict[tuple[str, str], TaskCost]:
    costs = {}
    for label, runs in systems.items():
        for task in tasks:
            rows = [
                row
                for run in runs
                for row in run.rows
                if (row["task"], row["split"]) == (task, SPLIT)
            ]
            if rows:
                costs[label, task] = TaskCost(
                    float(np.mean([row["activated_params"] for row in rows])),
                    float(np.mean([row["flops_per_example"] for row in rows])),
                )
        own = [costs[label, task] for task in common]
        costs[label, MEAN] = TaskCost(
            float(np.mean([cost.activated for cost in own])),
            float(np.mean([cost.flops for cost in own])),
        )
    return costs
