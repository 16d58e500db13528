"""What a study could decide, given the variances of an earlier one.

An earlier comparison of the same tasks gives, for each task, the variance over seeds and that over
held-out units of a difference; one of folds gives the variance over replicates, for a study of
folds. :func:`plan_power` computes from them, for each part of each claim, the difference that the
planned seeds find in 80 of 100 studies. :func:`simulate_claims` draws studies with true differences
of ``EFFECTS`` and counts how often a claim holds after the correction of all claims. Called by
``skillnet compare --power``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from skillnet_evidence import statistics
from skillnet_evidence.cells import ReportTable, make_table
from skillnet_evidence.claims import Claim, ClaimsConfig, Condition
from skillnet_evidence.comparison import (
    PRETRAINED,
    SHARED_MEAN,
    SPLIT,
    SystemComparison,
    find_variant,
    list_tested_tasks,
)
from skillnet_evidence.errors import EvidenceError
from skillnet_evidence.format import format_signed_points
from skillnet_evidence.statistics import Contrast, SeedVariance

#: Share of studies in which a detectable difference is found.
POWER = 0.8
#: True differences of simulated studies, as fractions.
EFFECTS = (0.0, 0.01, 0.02, 0.03, 0.05)
#: Simulated studies for each of them; a share of 0.5 has a standard error of 0.8 per cent.
STUDIES = 4000


@dataclass(frozen=True)
class PlannedTest:
    """What a planned test of a claim could decide.

    Args:
        claim: name of the claim.
        difference: what is subtracted, as text.
        task: task name, or a mean.
        seeds: seeds of the system with the fewest.
        test: see :class:`skillnet_evidence.claims.Condition`.
        margin: margin of the test; 0 for "higher".
        error: expected standard error of the difference.
        dof: degrees of freedom of this error.
        detectable: true difference from minus the margin that is found with ``POWER``.
    """

    claim: str
    difference: str
    task: str
    seeds: int
    test: str
    margin: float
    error: float
    dof: float
    detectable: float

    def draw_p(
        self, effect: float, studies: int, random: np.random.Generator
    ) -> NDArray[np.float64]:
        """Return the one-sided p-values of simulated studies.

        Args:
            effect: true difference, as a fraction.
            studies: number of studies.
            random: generator.
        """
        found = random.normal(effect, self.error, studies)
        error = self.error * np.sqrt(random.chisquare(self.dof, studies) / self.dof)
        slack = self.margin + (-abs(found) if self.test == "equivalent" else found)
        return np.asarray(stats.t.sf(slack / error, self.dof))


@dataclass(frozen=True)
class PowerPlan:
    """What a study could decide.

    Args:
        study: name of the planned study.
        earlier: the runs whose variances are expected again.
        tests: planned tests.
        shares: claim -> share of simulated studies in which it holds, for each of ``EFFECTS``.
        time: expected time of the final runs.
    """

    study: str
    earlier: str
    tests: Sequence[PlannedTest]
    shares: Mapping[str, Sequence[float]]
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
        if np.isnan(self.hours):
            return f"{self.runs} final runs; the earlier study has none of their systems"
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
            counts = [replicates[label] for label in part.systems]
            for task in part.tasks or earlier.common_tasks:
                margin = claims.find_margin(part, task)
                error, dof = _expect_error(earlier, part, task, counts, test_to_train)
                quantile = float(stats.t.ppf(1 - claims.alpha / 2, dof))
                planned.append(
                    PlannedTest(
                        name,
                        part.difference,
                        earlier.name_score(task, *_known(earlier, part.systems)),
                        min(counts),
                        part.test,
                        margin,
                        error,
                        dof,
                        (quantile + float(stats.t.ppf(POWER, dof))) * error,
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
    changes: Sequence[tuple[Contrast, SeedVariance | None]],
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
    for change, spread in changes:
        found = statistics.estimate_mean(change, spread)
        once.append(found.std_error**2 / (1 / found.seeds + overlap))
    if np.isnan(once).any():
        raise EvidenceError("--power: the earlier study has one replicate; name one with more")
    error = np.sqrt((1 / count + test_to_train) * float(np.mean(once)))
    return float(error), float(max(count - 1, 1))


def simulate_claims(
    planned: Sequence[PlannedTest], claims: ClaimsConfig, studies: int = STUDIES
) -> dict[str, list[float]]:
    """Return claim -> share of simulated studies in which it holds, for each of ``EFFECTS``.

    All tests of a study have the same true difference, and are drawn independently. Claims are
    tested as :func:`skillnet_evidence.claims.evaluate_claims` does: by the largest p of their
    parts, in their order, and the others with Holm's correction.

    Args:
        planned: result of :func:`plan_power`.
        claims: their order and level.
        studies: simulated studies per effect.
    """
    names, level = list(dict.fromkeys(each.claim for each in planned)), claims.alpha / 2
    shares: dict[str, list[float]] = {name: [] for name in names}
    for effect in EFFECTS:
        random, p_DC = np.random.default_rng(0), np.zeros((studies, len(names)))
        for each in planned:
            place = names.index(each.claim)
            p_DC[:, place] = np.maximum(p_DC[:, place], each.draw_p(effect, studies, random))
        gate = np.ones(studies, bool)
        for name in claims.order:
            gate &= p_DC[:, names.index(name)] <= level
            shares[name].append(float(gate.mean()))
        others = [place for place, name in enumerate(names) if name not in claims.order]
        corrected = np.array([statistics.correct_p_values(row) for row in p_DC[:, others]])
        for place, other in enumerate(others):
            shares[names[other]].append(float((corrected[:, place] <= level).mean()))
    return shares


def build_power_table(
    title: str, planned: Sequence[PlannedTest], shares: Mapping[str, Sequence[float]]
) -> ReportTable:
    """Return a table with a line per planned test, in points.

    The first line of a claim has the share of studies in which the whole claim holds.

    Args:
        title: title of the table.
        planned: result of :func:`plan_power`.
        shares: result of :func:`simulate_claims`.
    """
    columns = ["claim", "difference", "task", "seeds", "std error", "margin"]
    columns += [f"found at {100 * POWER:.0f} %"]
    # One column, since a terminal has no room for five.
    columns += ["holds at " + ", ".join(f"{100 * each:+g}" for each in EFFECTS)]
    cells, seen = [], set[str]()
    for each in planned:
        sign = "±" if each.test == "equivalent" else ""
        found = format_signed_points(each.detectable - each.margin)
        holds = ", ".join(f"{100 * share:.0f}" for share in shares[each.claim]) + " %"
        cells.append(
            [
                *(each.claim, each.difference, each.task, str(each.seeds)),
                f"{100 * each.error:.1f}",
                f"{sign}{100 * each.margin:g}",
                # A larger difference is no easier to show as equivalent.
                "–" if sign else found,
                "" if each.claim in seen else holds,
            ]
        )
        seen.add(each.claim)
    return make_table(
        title,
        columns,
        cells,
        "Points. Found: true difference that 80 of 100 studies show in this test alone. Holds: "
        "share of simulated studies in which the whole claim holds after the correction of all "
        "claims, if every difference is this one; tests are drawn independently.",
    )


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


def _known(earlier: SystemComparison, labels: Sequence[str]) -> list[str]:
    return [label for label in labels if label in earlier.systems]


def _expect_error(
    earlier: SystemComparison,
    part: Condition,
    task: str,
    counts: Sequence[int],
    test_to_train: float | None,
) -> tuple[float, float]:
    """Return the expected standard error of a difference, and its degrees of freedom."""
    if task == SHARED_MEAN and len(_known(earlier, part.systems)) < len(part.systems):
        raise EvidenceError(
            f"--power: the shared mean of {part.difference} needs an earlier study or a pilot with "
            "these systems; name one, or plan with mean"
        )
    if task != SHARED_MEAN and (task, SPLIT) not in earlier.spreads:
        raise EvidenceError(f"--power: the earlier study has no task {task}; name one that has")
    # The same systems if they were run, else the mean over all pairs: units differ little between
    # them. The variance of a difference of differences is then that of two.
    labels = [label for label in earlier.systems if earlier.has_task(task, label)]
    changes = [
        earlier.subtract_scores(a, b, task) for i, a in enumerate(labels) for b in labels[:i]
    ]
    factor = len(part.systems) / 2
    if task == SHARED_MEAN or all(label in labels for label in part.systems):
        own, factor = (part.system, part.against), 1.0
        changes = [earlier.subtract_scores(*own, task, part.beyond)]
    if not changes:
        raise EvidenceError(f"--power: the earlier study has one system with the task {task}")
    if earlier.has_folds:
        error, dof = _expect_fold_error(earlier, changes, min(counts), test_to_train)
        return error * factor**0.5, dof
    spread = changes[0][1]
    if spread is None:
        raise EvidenceError(
            "--power: the earlier study has one seed per system, so the variance over seeds is "
            "unknown; name one with more seeds"
        )
    units = [statistics.estimate_unit_variance(change) for change, _ in changes]
    by_unit = factor * float(np.mean([variance for variance, _ in units]))
    if test_to_train is not None:
        # A replicate varies by the seeds of all systems and by the units of its fold.
        count = min(counts)
        once = len(counts) * spread.variance + by_unit
        return float(np.sqrt((1 / count + test_to_train) * once)), float(count - 1)
    # Each system has its own variance over seeds, as in the planned analysis.
    terms = [(spread.variance / count, float(max(count - 1, 1))) for count in counts]
    terms.append((by_unit, min(dof for _, dof in units)))
    total = sum(variance for variance, _ in terms)
    return float(np.sqrt(total)), total**2 / sum(variance**2 / dof for variance, dof in terms)
