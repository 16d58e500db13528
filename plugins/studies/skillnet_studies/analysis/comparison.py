"""Compare systems: score estimates, paired tests, relative scores and costs.

All computations use scores where higher is better: accuracy, 1 − token error rate (at least 0),
recall at 10; see :func:`pipelines.training.evaluation.tables.score_metric`.
Only the split ``test`` is tested; other test splits get intervals. :func:`compare_systems` is
called by ``skillnet compare``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.training.evaluation.outcomes import sum_outcomes
from pipelines.training.evaluation.tables import (
    SCORED_METRICS,
    score_label,
    score_metric,
    sort_rows,
)
from skillnet.unit_statistics import ScoreScale
from skillnet_platform.errors import UserError, check_known_names
from skillnet_studies.analysis import statistics
from skillnet_studies.analysis.finished_runs import PRETRAINED, FinishedRun, check_comparable
from skillnet_studies.analysis.statistics import (
    RunSample,
    SampleDifference,
    ScoreEstimate,
    SeedVariance,
)
from skillnet_studies.config.claims import MEAN_TASK

#: Split of significance tests, scores and costs.
SPLIT = "test"

#: Pseudo-task: the mean over the tasks that all systems have.
MEAN = MEAN_TASK

#: Significance level after correction.
ALPHA = 0.05

#: Seeds per system below which nothing is decided.
MIN_SEEDS = 3

#: Verdict of a paired test: the first system scores higher, lower, or neither is shown.
TestVerdict = Literal["higher", "lower", "not decided"]

#: Labels of the roles that the user did not name.
DEFAULT_REFERENCE, DEFAULT_SPECIALIST = "skillnet", "specialist"


class SystemRoles(NamedTuple):
    """Labels of the systems with a role in a comparison; a default label may be absent.

    Args:
        reference: label of the system that the others are tested against.
        specialist: label of the system whose scores count as 1.
    """

    reference: str
    specialist: str


class TaskCost(NamedTuple):
    """Cost of one example of a task in one system.

    Args:
        activated: parameters that the example reads.
        flops: floating-point operations of the forward pass.
    """

    activated: float
    flops: float


@dataclass(frozen=True)
class PairedTest:
    """A paired test of two systems on a task.

    Args:
        kind: ``system`` (a system against the reference) or ``pretraining`` (with against without).
        system: label of the first system.
        against: label of the second system.
        task: task name, or ``mean``.
        difference: score of ``system`` minus score of ``against``.
        p: two-sided p-value.
        p_corrected: p-value after Holm's correction over all tests of the comparison.
    """

    kind: Literal["system", "pretraining"]
    system: str
    against: str
    task: str
    difference: ScoreEstimate
    p: float
    p_corrected: float

    @property
    def verdict(self) -> TestVerdict:
        """What the test shows at 5 % after correction, with at least ``MIN_SEEDS`` seeds.

        Sentences, marks, figures and files of a report all state this verdict.
        """
        if self.difference.seeds < MIN_SEEDS or not self.p_corrected <= ALPHA:
            return "not decided"
        return "higher" if self.difference.value > 0 else "lower"

    def reverse(self) -> "PairedTest":
        """Return the same test from the view of the other system."""
        own = self.difference
        turned = own._replace(value=-own.value, low=-own.high, high=-own.low)
        return replace(self, system=self.against, against=self.system, difference=turned)


@dataclass(frozen=True)
class RelativeScore:
    """Geometric mean over tasks of a system's mean score divided by the specialists'.

    Args:
        against: label of the specialists.
        value: the estimate.
        without_one: smallest and largest value if one task is left out; None with one task.
    """

    against: str
    value: ScoreEstimate
    without_one: tuple[float, float] | None


@dataclass(frozen=True)
class SystemComparison:
    """All results that are computed from a set of finished runs.

    Args:
        systems: label -> its runs, by seed.
        reference: label of the system that the others are tested against.
        specialist: label of the system whose scores count as 1.
        tasks: all tasks, in order.
        common_tasks: tasks that every system has; means are over these tasks.
        metrics: task -> its primary metric.
        splits: task -> its test splits.
        samples: (label, task, split) -> score of every run.
        scores: (label, task, split) -> estimate; (label, "mean", "test") is the mean over tasks.
        relative: label -> relative score.
        tests: all paired tests.
        costs: (label, task) -> cost; (label, "mean") is the mean over tasks.
        spreads: (task, split) -> variance over seeds, pooled over systems.
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
    spreads: Mapping[tuple[str, str], SeedVariance | None]

    @property
    def runs(self) -> list[FinishedRun]:
        """All runs of all systems."""
        return [run for runs in self.systems.values() for run in runs]

    @property
    def has_folds(self) -> bool:
        """Whether each run tests a fold of its own."""
        return any(run.fold.count for run in self.runs)

    @property
    def repeat_noun(self) -> str:
        """What the runs of one system are: seeds, or replicates of a fold and a seed."""
        return "replicate" if self.has_folds else "seed"

    @property
    def seeds(self) -> int:
        """The smallest number of seeds, or of replicates, among the systems."""
        return min(len(runs) for runs in self.systems.values())

    @property
    def tested_tasks(self) -> list[str]:
        """Tasks with tests, and the mean; one common task is its own mean and is tested once."""
        return list_tested_tasks(self.tasks, self.common_tasks)

    def find_score(self, label: str, task: str, split: str = SPLIT) -> ScoreEstimate | None:
        """Return the estimate of a score, or None if the system lacks the task."""
        return self.scores.get((label, task, split))

    def has_task(self, task: str, *labels: str) -> bool:
        """Return whether some systems were evaluated on the test split of a task."""
        return all((label, task, SPLIT) in self.samples for label in labels)

    def subtract_scores(
        self, own: str, other: str, task: str
    ) -> tuple[SampleDifference, SeedVariance | None]:
        """Return the score of one system minus that of another, and the pooled seed variance.

        Args:
            own: label of one system.
            other: label of the other system.
            task: task name, or ``mean``.
        """
        left, right = self.samples[own, task, SPLIT], self.samples[other, task, SPLIT]
        return SampleDifference(left, right), self.spreads[task, SPLIT]

    def find_test(self, system: str, against: str, task: str) -> PairedTest | None:
        """Return the test of two systems on a task, in either order; None if there is none.

        Args:
            system: label of the system whose score is the minuend.
            against: label of the other system.
            task: task name, or ``mean``.
        """
        if task == MEAN and MEAN not in self.tested_tasks:
            (task,) = self.common_tasks
        for test in self.tests:
            if test.task == task and {test.system, test.against} == {system, against}:
                return test if test.system == system else test.reverse()
        return None


def choose_roles(
    labels: Sequence[str], reference: str | None = None, specialist: str | None = None
) -> SystemRoles:
    """Return the reference and the specialist of a comparison.

    Args:
        labels: labels of all systems.
        reference: label that the user named; None takes ``skillnet``.
        specialist: label that the user named; None takes ``specialist``.

    Raises:
        UserError: a named label is unknown, or both are the same.
    """
    # The name without the suffix stands for both variants.
    known = [*labels, *(label.removesuffix(PRETRAINED) for label in labels)]
    for option, label in (("--reference", reference), ("--specialist", specialist)):
        # An unknown name would drop all tests or relative scores from the report.
        if label is not None:
            check_known_names([label], known, option, "system")
    roles = SystemRoles(reference or DEFAULT_REFERENCE, specialist or DEFAULT_SPECIALIST)
    if roles.reference == roles.specialist:
        raise UserError(f"reference and specialist are both {roles.reference!r}; name two systems")
    return roles


def compare_systems(
    runs: Sequence[FinishedRun], reference: str | None = None, specialist: str | None = None
) -> SystemComparison:
    """Compare the systems of finished runs.

    Args:
        runs: runs of all systems and seeds; the runs of one system have one label.
        reference: label of the system that the others are tested against. A system whose label
            ends in ``-pretrained`` is tested against the pretrained variant of the reference.
        specialist: label of the system whose scores count as 1; same rule for variants.

    Raises:
        UserError: no runs, runs evaluated on different rows, no common task, or an unknown label.
    """
    if not runs:
        raise UserError("there are no finished runs to compare; name at least one")
    roles = choose_roles([run.label for run in runs], reference, specialist)
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
        # A row with another metric, such as macro F1, is not the primary score of its task.
        metrics |= {
            row["task"]: row["metric"] for row in run.rows if row["metric"] in SCORED_METRICS
        }
    tasks = [task for task in sort_rows(splits) if task in metrics]
    samples = _build_samples(systems, tasks, splits, metrics)
    common = [t for t in tasks if all((label, t, SPLIT) in samples for label in systems)]
    if not common:
        raise UserError(
            "the systems have no task in common that was evaluated on the split test; compare "
            "systems that share a task"
        )
    for label in systems:
        samples[label, MEAN, SPLIT] = statistics.average_samples(
            [samples[label, t, SPLIT] for t in common]
        )
    # One pooled variance per task and split: scores of different tasks vary differently.
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
            least=0.0,
            most=1.0,
            scale=_find_scale(metrics.get(task)),
        )
        for (label, task, split), sample in samples.items()
    }
    return SystemComparison(
        systems,
        roles.reference,
        roles.specialist,
        tasks,
        common,
        metrics,
        splits,
        samples,
        scores,
        _estimate_relative_scores(samples, list(systems), common, roles.specialist),
        _run_tests(samples, spreads, systems, list_tested_tasks(tasks, common), roles.reference),
        _collect_costs(systems, tasks, common),
        spreads,
    )


def list_tested_tasks(tasks: Sequence[str], common: Sequence[str]) -> list[str]:
    """Return the tasks that are tested, with ``mean`` if it is not the score of one of them.

    Args:
        tasks: all tasks.
        common: tasks of all systems, over which the mean is.
    """
    # A second test of the same numbers would double their corrected p-value.
    return [*tasks, MEAN] if len(common) > 1 else list(tasks)


def find_variant(base: str, label: str, labels: Sequence[str]) -> str | None:
    """Return the variant of ``base`` to compare ``label`` with: pretrained with pretrained.

    Args:
        base: label of the reference or specialist, without suffix.
        label: label of the other system.
        labels: all labels that were run.
    """
    wanted = base + PRETRAINED if label.endswith(PRETRAINED) else base
    # Without a variant of the same pretraining the other variant is the best available pair.
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
                parts = {run.replicate: sum_outcomes(run.outcomes[task, split]) for run in having}
                if having[0].fold.count:
                    scores = {
                        replicate: score_metric(metrics[task], part.value)
                        for replicate, part in parts.items()
                    }
                    ratio = having[0].fold.test_to_train
                    samples[label, task, split] = statistics.build_fold_sample(scores, ratio)
                    continue
                weight = next(iter(parts.values())).denominator
                more_is_better = SCORED_METRICS[metrics[task]]
                # Scores count what is right, so errors are subtracted from the weights.
                amounts = {
                    seed: part.numerator if more_is_better else weight - part.numerator
                    for seed, part in parts.items()
                }
                # All runs have equal units, see check_comparable.
                units = next(iter(parts.values())).unit
                sample = statistics.build_sample(amounts, weight, (task, split), units)
                samples[label, task, split] = statistics.clip_sample(sample)
    return samples


def _find_scale(metric: str | None) -> ScoreScale:
    # A mean over tasks is neither a share nor a rate.
    if metric is None:
        return "free"
    return "share" if SCORED_METRICS[metric] else "error_rate"


def _estimate_relative_scores(
    samples: Mapping[tuple[str, str, str], RunSample],
    labels: Sequence[str],
    common: Sequence[str],
    specialist: str,
) -> dict[str, RelativeScore]:
    logs = {
        (label, task): statistics.take_logarithm(samples[label, task, SPLIT])
        for label in labels
        for task in common
    }
    means = {
        label: statistics.average_samples([logs[label, task] for task in common])
        for label in labels
    }
    spread = statistics.pool_seed_variance(list(means.values()))
    nan, found = float("nan"), {}
    for label in labels:
        against = find_variant(specialist, label, labels)
        if against == label:
            # 1 by definition, so it has no interval.
            estimate = ScoreEstimate(1.0, nan, nan, nan, nan, len(means[label].seeds))
            found[label] = RelativeScore(against, estimate, None)
        elif against is not None:
            log = statistics.estimate_mean(SampleDifference(means[label], means[against]), spread)
            each = [SampleDifference(logs[label, t], logs[against, t]).value for t in common]
            found[label] = _build_relative_score(against, log, np.array(each))
    return found


def _build_relative_score(
    against: str, log: ScoreEstimate, logs_T: NDArray[np.float64]
) -> RelativeScore:
    """Return a geometric mean from its logarithm and the logarithms of its tasks."""
    value, low, high = (float(np.exp(x)) for x in log[:3])
    without_one = None
    if len(logs_T) > 1:
        rest = np.exp((logs_T.sum() - logs_T) / (len(logs_T) - 1))
        without_one = (float(rest.min()), float(rest.max()))
    estimate = ScoreEstimate(value, low, high, value * log.std_error, log.dof, log.seeds)
    return RelativeScore(against, estimate, without_one)


def _run_tests(
    samples: Mapping[tuple[str, str, str], RunSample],
    spreads: Mapping[tuple[str, str], SeedVariance | None],
    systems: Iterable[str],
    tasks: Sequence[str],
    reference: str,
) -> list[PairedTest]:
    labels = list(systems)
    pairs: list[tuple[Literal["system", "pretraining"], str, str]] = []
    for label in labels:
        against = find_variant(reference, label, labels)
        if against not in (None, label) and label.removesuffix(PRETRAINED) != reference:
            pairs.append(("system", label, str(against)))
    for label in labels:
        plain = label.removesuffix(PRETRAINED)
        # A reference that is a variant is tested against the other variant already.
        if plain != label and plain in labels and ("system", plain, label) not in pairs:
            pairs.append(("pretraining", label, plain))
    tests = []
    for kind, label, against in pairs:
        for task in tasks:
            left, right = samples.get((label, task, SPLIT)), samples.get((against, task, SPLIT))
            if left is None or right is None:
                continue
            change, spread = SampleDifference(left, right), spreads[task, SPLIT]
            estimate = statistics.estimate_mean(change, spread)
            p = statistics.compute_p_value(change, spread)
            tests.append((kind, label, against, task, estimate, p))
    # One correction over all tests, because the report shows them side by side.
    corrected = statistics.correct_p_values([p for *_, p in tests])
    return [PairedTest(*values, both) for values, both in zip(tests, corrected, strict=True)]


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
        # The mean is over common tasks, so that systems with fewer tasks are comparable.
        own = [costs[label, task] for task in common]
        costs[label, MEAN] = TaskCost(
            float(np.mean([cost.activated for cost in own])),
            float(np.mean([cost.flops for cost in own])),
        )
    return costs


def name_score(comparison: SystemComparison, task: str) -> str:
    """Return the name of a task's score, of which a higher one is better.

    Args:
        comparison: computed results.
        task: name of a task.
    """
    return score_label(comparison.metrics[task])
