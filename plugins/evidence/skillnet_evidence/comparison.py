"""Compare systems: score estimates, paired tests, relative scores and costs.

All computations use scores where higher is better: accuracy, 1 − token error rate (at least 0),
recall at 10; see :class:`skillnet_evidence.scores.ScoredMetric`. Only the split ``test`` is tested;
other test splits get intervals. :func:`compare_systems` takes plain runs and is called by
``skillnet compare`` and ``skillnet-evidence compare``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from skillnet_evidence import statistics
from skillnet_evidence.errors import EvidenceError, require_known
from skillnet_evidence.format import format_plural
from skillnet_evidence.scores import SPLIT, ScoredMetric, ScoredRun, TaskCost
from skillnet_evidence.statistics import (
    Contrast,
    RunSample,
    ScoreEstimate,
    SeedVariance,
)
from skillnet_evidence.units import RowOutcomes, ScoreScale, has_equal_rows, sum_outcomes

#: Pseudo-tasks: the mean over the tasks that all systems of the report have, the mean over those
#: that the systems of one part of a claim share, and the mean over all tasks of one system.
MEAN, SHARED_MEAN, OWN_MEAN = "mean", "shared_mean", "own_mean"

#: Suffix of the label of a system whose runs start from a pretraining.
PRETRAINED = "-pretrained"

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
    """All results that are computed from a set of runs.

    Args:
        systems: label -> its runs, by seed.
        reference: label of the system that the others are tested against.
        specialist: label of the system whose scores count as 1.
        tasks: all tasks, in order.
        common_tasks: tasks that every system has; means are over these tasks.
        metrics: task -> its primary metric.
        splits: task -> its test splits.
        samples: (label, task, split) -> score of every run.
        scores: (label, task, split) -> estimate; (label, "mean", "test") is the mean over common
            tasks. Where tasks differ, (label, "own_mean", "test") is that over the system's own.
        relative: label -> relative score.
        tests: all paired tests.
        costs: (label, task) -> cost; (label, "mean") is the mean over common tasks.
        spreads: (task, split) -> variance over seeds, pooled over systems.
    """

    systems: Mapping[str, Sequence[ScoredRun]]
    reference: str
    specialist: str
    tasks: Sequence[str]
    common_tasks: Sequence[str]
    metrics: Mapping[str, ScoredMetric]
    splits: Mapping[str, Sequence[str]]
    samples: Mapping[tuple[str, str, str], RunSample]
    scores: Mapping[tuple[str, str, str], ScoreEstimate]
    relative: Mapping[str, RelativeScore]
    tests: Sequence[PairedTest]
    costs: Mapping[tuple[str, str], TaskCost]
    spreads: Mapping[tuple[str, str], SeedVariance | None]

    @property
    def runs(self) -> list[ScoredRun]:
        """All runs of all systems."""
        return [run for runs in self.systems.values() for run in runs]

    @property
    def has_folds(self) -> bool:
        """Whether each run tests a fold of its own."""
        return self.test_to_train is not None

    @property
    def test_to_train(self) -> float | None:
        """Test rows per training row of each fold; None without folds."""
        return next(iter(self.systems.values()))[0].fold.test_to_train

    @property
    def repeat_noun(self) -> str:
        """What the runs of one system are: seeds, or replicates of a fold and a seed."""
        return "replicate" if self.has_folds else "seed"

    @property
    def seeds(self) -> int:
        """The smallest number of seeds, or of replicates, among the systems."""
        return min(len(runs) for runs in self.systems.values())

    @property
    def has_unequal_tasks(self) -> bool:
        """Whether some system lacks a task of another one."""
        return len(self.common_tasks) < len(self.tasks)

    @property
    def tested_tasks(self) -> list[str]:
        """Tasks with tests, and the mean; one common task is its own mean and is tested once."""
        return list_tested_tasks(self.tasks, self.common_tasks)

    def sort(self, order: Sequence[str]) -> "SystemComparison":
        """Return a comparison whose systems, relative scores and tests have one order of labels.

        Args:
            order: all labels.
        """
        kinds = list(dict.fromkeys(test.kind for test in self.tests))
        return replace(
            self,
            systems={label: self.systems[label] for label in order},
            relative={each: self.relative[each] for each in order if each in self.relative},
            tests=sorted(
                self.tests, key=lambda test: (kinds.index(test.kind), order.index(test.system))
            ),
        )

    def find_score(self, label: str, task: str, split: str = SPLIT) -> ScoreEstimate | None:
        """Return the estimate of a score, or None if the system lacks the task."""
        return self.scores.get((label, task, split))

    def has_task(self, task: str, *labels: str) -> bool:
        """Return whether some systems were evaluated on the test split of a task."""
        return task == SHARED_MEAN or all((label, task, SPLIT) in self.samples for label in labels)

    def list_tasks(self, task: str, *labels: str) -> list[str]:
        """Return the tasks over which a score is a mean; of a single task itself.

        Args:
            task: task name, ``mean``, or ``shared_mean`` or ``own_mean`` of some systems.
            labels: these systems.
        """
        if task in (SHARED_MEAN, OWN_MEAN):
            return [each for each in self.tasks if self.has_task(each, *labels)]
        return list(self.common_tasks) if task == MEAN else [task]

    def name_score(self, task: str, *labels: str) -> str:
        """Return words for a task or a mean; where tasks differ, a mean states their number.

        Args:
            task: task name, or a mean as for :meth:`list_tasks`.
            labels: systems of the mean.
        """
        if task not in (MEAN, SHARED_MEAN, OWN_MEAN):
            return task.replace("_", " ")
        count = len(self.list_tasks(task, *labels))
        return f"mean of {format_plural(count, 'task')}" if self.has_unequal_tasks else "mean"

    def subtract_scores(
        self, own: str, other: str, task: str, beyond: Sequence[str] = ()
    ) -> tuple[Contrast, SeedVariance | None]:
        """Return the score of one system minus that of another, and the pooled seed variance.

        Args:
            own: label of one system.
            other: label of the other system.
            task: task name, ``mean``, or ``shared_mean`` of all systems that are named.
            beyond: two more labels, whose difference is subtracted from the first one.
        """
        labels = (own, other, *beyond)
        if task == SHARED_MEAN:
            samples, spread = _average_peers(
                self.samples, self.systems, self.list_tasks(task, *labels)
            )
        else:
            samples = {label: self.samples[label, task, SPLIT] for label in labels}
            spread = self.spreads[task, SPLIT]
        change = samples[own] - samples[other]
        # All systems answer the same units, so the difficulty of a unit cancels here, too.
        return change - (samples[beyond[0]] - samples[beyond[1]]) if beyond else change, spread

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
        EvidenceError: a named label is unknown, or both are the same.
    """
    # The name without the suffix stands for both variants.
    known = [*labels, *(label.removesuffix(PRETRAINED) for label in labels)]
    for option, label in (("--reference", reference), ("--specialist", specialist)):
        # An unknown name would drop all tests or relative scores from the report.
        if label is not None:
            require_known([label], known, option, "system")
    roles = SystemRoles(reference or DEFAULT_REFERENCE, specialist or DEFAULT_SPECIALIST)
    if roles.reference == roles.specialist:
        raise EvidenceError(
            f"reference and specialist are both {roles.reference!r}; name two systems"
        )
    return roles


def compare_systems(
    runs: Sequence[ScoredRun],
    reference: str | None = None,
    specialist: str | None = None,
    first_tasks: Sequence[str] = (),
) -> SystemComparison:
    """Compare the systems of runs.

    Args:
        runs: runs of all systems and seeds; the runs of one system have one label.
        reference: label of the system that the others are tested against. A system whose label
            ends in ``-pretrained`` is tested against the pretrained variant of the reference.
        specialist: label of the system whose scores count as 1; same rule for variants.
        first_tasks: tasks that come first, in this order.

    Raises:
        EvidenceError: no runs, runs evaluated on different rows, no common task, or an unknown
            label.
    """
    if not runs:
        raise EvidenceError("there are no finished runs to compare; name at least one")
    roles = choose_roles([run.label for run in runs], reference, specialist)
    _check_rows(runs)
    systems: dict[str, list[ScoredRun]] = {}
    splits: dict[str, list[str]] = {}
    metrics: dict[str, ScoredMetric] = {}
    for run in runs:
        systems.setdefault(run.label, []).append(run)
        metrics |= run.metrics
        for task, split in run.outcomes:
            if split not in splits.setdefault(task, []):
                splits[task].append(split)
    ordered = [*(task for task in first_tasks if task in splits), *splits]
    tasks = [task for task in dict.fromkeys(ordered) if task in metrics]
    samples = _build_samples(systems, tasks, splits, metrics)
    common = [t for t in tasks if all((label, t, SPLIT) in samples for label in systems)]
    if not common:
        raise EvidenceError(
            "the systems have no task in common that was evaluated on the split test; compare "
            "systems that share a task"
        )
    for label in systems:
        samples[label, MEAN, SPLIT] = _average_tasks(samples, label, common)
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
    if len(common) < len(tasks):
        for label in systems:
            own = [task for task in tasks if (label, task, SPLIT) in samples]
            peers, spread = _average_peers(samples, systems, own)
            scores[label, OWN_MEAN, SPLIT] = statistics.estimate_mean(
                peers[label], spread, least=0.0, most=1.0
            )
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


def _check_rows(runs: Sequence[ScoredRun]) -> None:
    """Raise EvidenceError unless all runs were evaluated on the same rows, fold by fold."""
    first = runs[0]
    for run in runs:
        if run.fold[1:] != first.fold[1:]:
            raise EvidenceError(
                f"{run.name} and {first.name} were evaluated on different folds: the keys of fold "
                "differ. Compare runs of one study"
            )
    # Runs of folds are paired by replicate.
    has_folds = first.fold.test_to_train is not None
    for pair in combinations(dict.fromkeys(run.label for run in runs), 2) if has_folds else ():
        if not find_common_replicates(runs, pair):
            raise EvidenceError(
                f"{' and '.join(pair)} have no fold and seed in common, so no row was answered by "
                "both; run one of them on folds and seeds of the other"
            )
    known: dict[tuple[int, str, str], tuple[RowOutcomes, ScoredRun]] = {}
    for run in runs:
        for key, outcomes in run.outcomes.items():
            own = sum_outcomes(outcomes)
            # Each fold has test rows of its own.
            rows, other = known.setdefault((run.fold.number, *key), (own, run))
            # Each row contributes its number of symbols or queries, and its unit.
            if not has_equal_rows(own, rows):
                raise EvidenceError(
                    f"{run.name} and {other.name} were evaluated on different rows of "
                    f"{' '.join(key)} ({len(own)} and {len(rows)} units); compare runs of one "
                    "version, by a metric whose denominators do not depend on the answers"
                )


def find_common_replicates(runs: Sequence[Any], labels: Sequence[str]) -> set[int]:
    """Return the replicates that all of some systems have.

    Args:
        runs: results of these and other systems, with a label and a replicate each.
        labels: names of the systems in tables.
    """
    return set.intersection(
        *({run.replicate for run in runs if run.label == label} for label in labels)
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
    systems: Mapping[str, Sequence[ScoredRun]],
    tasks: Sequence[str],
    splits: Mapping[str, Sequence[str]],
    metrics: Mapping[str, ScoredMetric],
) -> dict[tuple[str, str, str], RunSample]:
    samples, keys = {}, [(task, split) for task in tasks for split in splits[task]]
    for label, runs in systems.items():
        for task, split in keys:
            having = [run for run in runs if (task, split) in run.outcomes]
            if not having:
                continue
            parts = {run.replicate: sum_outcomes(run.outcomes[task, split]) for run in having}
            ratio = having[0].fold.test_to_train
            if ratio is not None:
                scores = {each: metrics[task].score(part.value) for each, part in parts.items()}
                samples[label, task, split] = statistics.build_fold_sample(scores, ratio)
                continue
            # All runs have equal weights and units.
            first = next(iter(parts.values()))
            # Scores count what is right, so errors are subtracted from the weights.
            amounts = {
                seed: part.numerator
                if metrics[task].is_higher_better
                else first.denominator - part.numerator
                for seed, part in parts.items()
            }
            sample = statistics.build_sample(amounts, first.denominator, (task, split), first.unit)
            samples[label, task, split] = statistics.clip_sample(sample)
    return samples


def _average_tasks(
    samples: Mapping[tuple[str, str, str], RunSample], label: str, tasks: Sequence[str]
) -> RunSample:
    return statistics.average_samples([samples[label, task, SPLIT] for task in tasks])


def _average_peers(
    samples: Mapping[tuple[str, str, str], RunSample], labels: Iterable[str], tasks: Sequence[str]
) -> tuple[dict[str, RunSample], SeedVariance | None]:
    """Return the mean over tasks of each system that has all of them, and their pooled variance."""
    peers = [label for label in labels if all((label, t, SPLIT) in samples for t in tasks)]
    means = {label: _average_tasks(samples, label, tasks) for label in peers}
    return means, statistics.pool_seed_variance(list(means.values()))


def _find_scale(metric: ScoredMetric | None) -> ScoreScale:
    # A mean over tasks is neither a share nor a rate.
    if metric is None:
        return "free"
    return "share" if metric.is_higher_better else "error_rate"


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
            log = statistics.estimate_mean(means[label] - means[against], spread)
            each = [(logs[label, t] - logs[against, t]).value for t in common]
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
            change, spread = left - right, spreads[task, SPLIT]
            estimate = statistics.estimate_mean(change, spread)
            p = statistics.compute_p_value(change, spread)
            tests.append((kind, label, against, task, estimate, p))
    # One correction over all tests, because the report shows them side by side.
    corrected = statistics.correct_p_values([p for *_, p in tests])
    return [PairedTest(*values, both) for values, both in zip(tests, corrected, strict=True)]


def _collect_costs(
    systems: Mapping[str, Sequence[ScoredRun]], tasks: Sequence[str], common: Sequence[str]
) -> dict[tuple[str, str], TaskCost]:
    costs = {}
    for label, runs in systems.items():
        for task in tasks:
            known = [run.costs[task] for run in runs if task in run.costs]
            if known:
                costs[label, task] = _average_costs(known)
        # The mean is over common tasks, so that systems with fewer tasks are comparable.
        if all((label, task) in costs for task in common):
            costs[label, MEAN] = _average_costs([costs[label, task] for task in common])
        own = [task for task in tasks if any((task, SPLIT) in run.outcomes for run in runs)]
        if len(common) < len(tasks) and all((label, task) in costs for task in own):
            costs[label, OWN_MEAN] = _average_costs([costs[label, task] for task in own])
    return costs


def _average_costs(costs: Sequence[TaskCost]) -> TaskCost:
    return TaskCost(*(float(np.mean(each)) for each in zip(*costs, strict=True)))
