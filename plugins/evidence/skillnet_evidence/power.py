"""What a study could decide, given the variances of an earlier one.

An earlier comparison of the same tasks gives, for each task, the variance over seeds and that over
held-out units of a difference; one of folds gives the variance over replicates, for a study of
folds. :func:`plan_power` computes from them, for each part of each claim,
the difference that the planned seeds find in 80 of 100 studies, and how often equal systems would
be shown to be no worse. Called by ``skillnet compare --power``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from scipy import stats

from skillnet_evidence import statistics
from skillnet_evidence.claims import Claim, ClaimsConfig, Condition
from skillnet_evidence.comparison import (
    PRETRAINED,
    SPLIT,
    SystemComparison,
    find_variant,
    list_tested_tasks,
)
from skillnet_evidence.errors import EvidenceError
from skillnet_evidence.format import format_signed_points

#: Share of studies in which a detectable difference is found.
POWER = 0.8


@dataclass(frozen=True)
class PlannedTest:
    """What a planned test of a claim could decide.

    Args:
        claim: name of the claim.
        system: label of the system that the claim is about.
        against: label of the other system.
        task: task name, or ``mean``.
        seeds: seeds of the system with fewer seeds.
        margin: margin of the test; 0 for "higher".
        error: expected standard error of the difference.
        detectable: true difference from minus the margin that is found with ``POWER``.
        shown_if_equal: probability that the part is shown if both systems are equal.
    """

    claim: str
    system: str
    against: str
    task: str
    seeds: int
    margin: float
    error: float
    detectable: float
    shown_if_equal: float


@dataclass(frozen=True)
class PowerPlan:
    """What a study could decide.

    Args:
        study: name of the planned study.
        earlier: the runs whose variances are expected again.
        tests: planned tests.
        time: expected time of the final runs.
    """

    study: str
    earlier: str
    tests: Sequence[PlannedTest]
    time: "StudyTime"


@dataclass(frozen=True)
class StudyTime:
    """Expected time of the final runs of a study, one after the other, with their pretrainings.

    Args:
        runs: number of final runs.
        hours: at the step rates of the earlier study, on its machine.
        unknown: systems that the earlier study lacks; they count with the mean of the others.
    """

    runs: int
    hours: float
    unknown: Sequence[str]

    def describe(self) -> str:
        """Return the time in a sentence."""
        text = (
            f"{self.runs} final runs take {self.hours:.1f} hours one after the other, without "
            "tuning, at the step rates of the earlier study"
        )
        return text + (f"; assumed for {', '.join(self.unknown)}" if self.unknown else "")


def plan_power(
    earlier: SystemComparison,
    claims: ClaimsConfig,
    replicates: Mapping[str, int],
    test_to_train: float | None = None,
) -> list[PlannedTest]:
    """Return what each part of each claim could decide, per task.

    Args:
        earlier: comparison whose variances are expected again.
        claims: claims of the planned study.
        replicates: label -> planned runs: one for each seed, or for each fold and seed.
        test_to_train: test rows per training row of the folds of the planned study; None without
            folds. The test set of a fold is expected to vary as that of the earlier study.

    Raises:
        EvidenceError: the earlier comparison has one seed per system, or lacks a task.
    """
    planned = []
    stated = claims.stated or _state_differences(earlier, list(replicates))
    for name, claim in stated.items():
        for part in claim.parts:
            counts = (replicates[part.system], replicates[part.against])
            for task in part.tasks or earlier.common_tasks:
                margin = claims.find_margin(part, task)
                error, dof = _expect_error(earlier, part, task, counts, test_to_train)
                quantile = float(stats.t.ppf(1 - claims.alpha / 2, dof))
                planned.append(
                    PlannedTest(
                        name,
                        part.system,
                        part.against,
                        task,
                        min(counts),
                        margin,
                        error,
                        (quantile + float(stats.t.ppf(POWER, dof))) * error,
                        float(stats.nct.sf(quantile, dof, margin / error)),
                    )
                )
    return planned


def estimate_time(
    earlier: SystemComparison, replicates: Mapping[str, int], steps: Mapping[str, int]
) -> StudyTime:
    """Return the time of the final runs of a planned study.

    Args:
        earlier: comparison whose runs state their time.
        replicates: label -> planned runs.
        steps: label -> planned steps of a run.
    """
    known = {}
    for label, runs in earlier.systems.items():
        if label in replicates:
            rate = float(np.mean([run.seconds / run.steps for run in runs]))
            before = [run.pretraining_seconds or 0.0 for run in runs]
            known[label] = rate * steps[label] + float(np.mean(before))
    mean = float(np.mean(list(known.values()))) if known else float("nan")
    seconds = sum(known.get(label, mean) * count for label, count in replicates.items())
    unknown = [label for label in replicates if label not in known]
    return StudyTime(sum(replicates.values()), seconds / 3600, unknown)


def _expect_fold_error(
    earlier: SystemComparison,
    pairs: Sequence[tuple[str, str]],
    task: str,
    count: int,
    test_to_train: float | None,
) -> tuple[float, float]:
    """Return the error of a study of folds, from the variance of the replicates of another one."""
    if test_to_train is None:
        raise EvidenceError(
            "--power: the earlier study has folds, so the variances of seeds and units are not "
            "known apart. Name a study without folds, or plan one with folds"
        )
    once, overlap = [], earlier.test_to_train or 0.0
    for own, other in pairs:
        found = statistics.estimate_mean(*earlier.subtract_scores(own, other, task))
        once.append(found.std_error**2 / (1 / found.seeds + overlap))
    if np.isnan(once).any():
        raise EvidenceError("--power: the earlier study has one replicate; name one with more")
    error = np.sqrt((1 / count + test_to_train) * float(np.mean(once)))
    return float(error), float(max(count - 1, 1))


def tabulate_power(planned: Sequence[PlannedTest]) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells of a table with a line per planned test, in points.

    A claim of several tests has a line more: the probability that all of them are shown. The tests
    depend on each other in an unknown way, so it lies between two bounds (Fréchet).

    Args:
        planned: result of :func:`plan_power`.
    """
    columns = ["claim", "difference", "task", "seeds", "std error", "margin"]
    columns += [f"found at {100 * POWER:.0f} %", "shown if equal"]
    cells = []
    for claim, members in groupby(planned, lambda each: each.claim):
        tests = list(members)
        cells += [
            [
                claim,
                f"{each.system} − {each.against}",
                each.task,
                str(each.seeds),
                f"{100 * each.error:.1f}",
                f"{100 * each.margin:g}",
                format_signed_points(each.detectable - each.margin),
                f"{100 * each.shown_if_equal:.0f} %",
            ]
            for each in tests
        ]
        if len(tests) > 1:
            shown = [each.shown_if_equal for each in tests]
            least = max(1 - sum(1 - each for each in shown), 0.0)
            bounds = f"{100 * least:.0f} to {100 * min(shown):.0f} %"
            cells.append([claim, f"all {len(tests)} tests", *[""] * 5, bounds])
    return columns, cells


def _state_differences(earlier: SystemComparison, labels: Sequence[str]) -> dict[str, Claim]:
    """Return claims about each system and the reference, for a study that states none."""
    tasks = list_tested_tasks(earlier.common_tasks, earlier.common_tasks)
    claims = {}
    for label in labels:
        against = find_variant(earlier.reference, label, labels) or labels[0]
        if against == label:
            # The reference itself is compared with its variant without pretraining.
            against = label.removesuffix(PRETRAINED)
        if label != against and against in labels:
            part = Condition(label, against, tasks=tasks)
            claims[label] = Claim(f"{label} scores higher than {against}.", [part])
    return claims


def _expect_error(
    earlier: SystemComparison,
    part: Condition,
    task: str,
    counts: Sequence[int],
    test_to_train: float | None,
) -> tuple[float, float]:
    """Return the expected standard error of a difference, and its degrees of freedom."""
    if (task, SPLIT) not in earlier.spreads:
        raise EvidenceError(f"--power: the earlier study has no task {task}; name one that has")
    spread = earlier.spreads[task, SPLIT]
    has_folds = earlier.has_folds
    if spread is None and not has_folds:
        raise EvidenceError(
            "--power: the earlier study has one seed per system, so the variance over seeds is "
            "unknown; name one with more seeds"
        )
    # The same pair if it was run, else the mean over all pairs: units differ little between them.
    pairs = [(part.system, part.against)]
    if not earlier.has_task(task, *pairs[0]):
        labels = [label for label in earlier.systems if earlier.has_task(task, label)]
        pairs = [(a, b) for i, a in enumerate(labels) for b in labels[:i]]
    if not pairs:
        raise EvidenceError(f"--power: the earlier study has one system with the task {task}")
    if has_folds:
        return _expect_fold_error(earlier, pairs, task, min(counts), test_to_train)
    assert spread is not None
    by_unit, dofs = [], []
    for own, other in pairs:
        change, _ = earlier.subtract_scores(own, other, task)
        variance, dof = statistics.estimate_unit_variance(change)
        by_unit.append(variance)
        dofs.append(dof)
    if test_to_train is not None:
        # A replicate varies by both systems' seeds and by the units of its fold.
        count = min(counts)
        once = 2 * spread.variance + float(np.mean(by_unit))
        return float(np.sqrt((1 / count + test_to_train) * once)), float(count - 1)
    # Each system has its own variance over seeds, as in the planned analysis.
    terms = [(spread.variance / count, float(max(count - 1, 1))) for count in counts]
    terms.append((float(np.mean(by_unit)), min(dofs)))
    total = sum(variance for variance, _ in terms)
    return float(np.sqrt(total)), total**2 / sum(variance**2 / dof for variance, dof in terms)
