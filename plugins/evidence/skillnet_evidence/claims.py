"""Claims of a study, and the verdicts on them.

A claim is a conjunction: each of its conditions must be shown on each of its tasks. Such a
conjunction keeps the level of its tests without a correction (source: Berger 1982,
intersection-union tests).

"holds"          every condition is shown
"does not hold"  one condition is refuted: its interval lies beyond the margin
"not decided"    otherwise; the conditions say what the study excludes

Claims in ``order`` are tested one after the other, each at the full level, until one is not shown.
The other claims are corrected together by Holm's method. With fewer than ``MIN_SEEDS`` seeds of
one of its systems a claim is not decided, as a paired test is not. :func:`evaluate_claims` returns
a :class:`ClaimResult` per :class:`Claim`, with a :class:`ConditionResult` per :class:`Condition`
and task. :func:`answer_comparison` answers a comparison in one sentence.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
from annotated_types import Interval

from skillnet_evidence import statistics
from skillnet_evidence.comparison import (
    MEAN,
    MIN_SEEDS,
    PRETRAINED,
    SHARED_MEAN,
    SPLIT,
    PairedTest,
    SystemComparison,
    find_variant,
)
from skillnet_evidence.errors import EvidenceError, require_known
from skillnet_evidence.format import format_interval, format_plural
from skillnet_evidence.scores import REPLICATE_BASE
from skillnet_evidence.statistics import Contrast, ScoreEstimate

Verdict = Literal["holds", "does not hold", "not decided"]

#: State of a condition, as the table, the figure and the files show it.
ConditionState = Literal["shown", "refuted", "open"]

#: Verdict -> first word of the answer.
OPENINGS = {"holds": "Shown", "does not hold": "Refuted", "not decided": "Not decided"}

UnitFraction = Annotated[float, Interval(ge=0, le=1)]


@dataclass
class Condition:
    """A comparison of two systems, as a claim states it.

    Args:
        system: label of the system that the claim is about.
        against: label of the other system.
        test: "higher": the score is higher; "not_lower": it is lower by less than the margin;
            "equivalent": it is lower or higher by less than the margin.
        tasks: tasks on each of which it must be shown, ``mean``, or ``shared_mean``: the mean over
            all tasks that the systems of this part share; empty takes all common tasks.
        beyond: two further labels. Then the test is about the difference of differences
            (system − against) − (first − second).
        flops_at_most: largest FLOPs per example of the system, as a multiple of the other's.
    """

    system: str
    against: str
    test: Literal["higher", "not_lower", "equivalent"] = "higher"
    tasks: list[str] = field(default_factory=list)
    beyond: list[str] = field(default_factory=list)
    flops_at_most: Annotated[float, Interval(gt=0, le=1000)] | None = None

    def __post_init__(self) -> None:
        most = 1.0 if self.flops_at_most is None else self.flops_at_most
        _require(0 < most <= 1000, "parts.flops_at_most", "above 0 and at most 1000", most)
        if self.system == self.against:
            raise EvidenceError(
                f"claims: {self.system!r} is compared with itself; name two systems"
            )
        # A system in both differences would cancel, or count twice with one run's noise.
        if self.beyond and (len(self.beyond) != 2 or len(set(self.systems)) < 4):
            raise EvidenceError(
                f"claims: {self.difference} needs four different systems; name two others in beyond"
            )

    @property
    def systems(self) -> list[str]:
        """Labels of all systems."""
        return [self.system, self.against, *self.beyond]

    @property
    def difference(self) -> str:
        """The difference of scores, or of differences, as text."""
        text = f"{self.system} − {self.against}"
        return f"({text}) − ({' − '.join(self.beyond)})" if self.beyond else text


@dataclass
class Claim:
    """A claim, as it is stated: all of its conditions together.

    Args:
        text: the claim as a sentence.
        parts: conditions that must all be shown.
    """

    text: str
    parts: list[Condition]

    def __post_init__(self) -> None:
        if not self.parts:
            raise EvidenceError(f"claims: {self.text!r} has no parts; state what it compares")


@dataclass
class ClaimsConfig:
    """Claims of a study.

    Args:
        stated: name -> claim.
        order: gatekeeping: claims that are tested one after the other, each only if all before it
            are shown. The others are corrected by Holm's method together.
        alpha: level of the claims; intervals cover 1 - alpha, and each side is tested at half.
        margin: margin of not_lower and equivalent, as a fraction (0.02 is two points).
        margins: task -> margin, where it is not ``margin``.
    """

    stated: dict[str, Claim] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    alpha: Annotated[float, Interval(gt=0, lt=1)] = 0.05
    margin: UnitFraction = 0.02
    margins: dict[str, UnitFraction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(0 < self.alpha < 1, "alpha", "above 0 and below 1", self.alpha)
        for name, margin in {"margin": self.margin, **self.margins}.items():
            key = name if name == "margin" else f"margins.{name}"
            _require(0 <= margin <= 1, key, "from 0 to 1", margin)
        for name, claim in self.stated.items():
            for part in claim.parts:
                margins = [self.find_margin(part, task) for task in part.tasks or [""]]
                if part.test == "equivalent" and not all(margins):
                    key = f"stated.{name}: the margin of test: equivalent"
                    _require(False, key, "above 0", 0)
        require_known(self.order, self.stated, "claims.order", "claim")
        if len(set(self.order)) < len(self.order):
            raise EvidenceError(f"claims.order: names must differ, got {', '.join(self.order)}")

    def find_margin(self, part: Condition, task: str) -> float:
        """Return the margin of a part on a task; 0 if its score must be higher."""
        return 0.0 if part.test == "higher" else self.margins.get(task, self.margin)

    def check_names(self, systems: Collection[str], tasks: Collection[str]) -> None:
        """Check that the claims are about known systems and tasks.

        Args:
            systems: labels of the study.
            tasks: names of its tasks.

        Raises:
            EvidenceError: a name is unknown.
        """
        known = [*tasks, MEAN, SHARED_MEAN]
        require_known(self.margins, known, "claims.margins", "task")
        for name, claim in self.stated.items():
            for part in claim.parts:
                key = f"claims.stated.{name}"
                require_known(part.systems, systems, key, "system")
                require_known(part.tasks, known, key, "task")


def _require(is_valid: bool, key: str, bounds: str, value: float) -> None:
    if not is_valid:
        raise EvidenceError(f"claims.{key}: expected a number {bounds}, got {value}")


@dataclass(frozen=True)
class ConditionResult:
    """A condition on one task, or on costs, with its numbers.

    Args:
        text: the condition with its numbers, and what they exclude.
        shown: whether its interval alone shows it: True, False if it refutes it, None otherwise.
        p: one-sided p-value, of equivalence the larger of two; 0 for a condition without a test.
        part: the condition as stated; None for a condition on costs.
        task: task name, ``mean`` or ``shared_mean``.
        score: words for the task, or for the mean with its number of tasks.
        margin: loss that the claim allows, as a fraction; 0 if the score must be higher.
        change: the difference; None for a condition on costs.
        by_fold: the difference in each fold; empty without folds.
    """

    text: str
    shown: bool | None
    p: float = 0.0
    part: Condition | None = None
    task: str = ""
    score: str = ""
    margin: float = 0.0
    change: ScoreEstimate | None = None
    by_fold: Sequence[float] = ()

    @property
    def is_two_sided(self) -> bool:
        """Whether a gain must be within the margin, too."""
        return self.part is not None and self.part.test == "equivalent"

    @property
    def asked(self) -> str:
        """What must be shown of the difference."""
        if not self.margin:
            return "above 0"
        points = f"{100 * self.margin:g} points"
        return f"within ±{points}" if self.is_two_sided else f"no loss of {points}"

    @property
    def slack(self) -> float:
        """Distance from the nearest bound to its limit; −∞ without an interval."""
        if self.change is None or np.isnan(self.change.low):
            return -np.inf
        below = self.margin - self.change.high if self.is_two_sided else np.inf
        return min(self.change.low + self.margin, below)


@dataclass(frozen=True)
class ClaimResult:
    """A claim with the verdict of a study.

    Args:
        name: short name.
        text: the claim as a sentence.
        rule: condition under which it holds, as text.
        conditions: its conditions, with numbers.
        undecided_reason: reason why it is not decided in spite of its conditions; "" without one.
        is_tested: whether its conditions carry a verdict.
    """

    name: str
    text: str
    rule: str
    conditions: Sequence[ConditionResult]
    undecided_reason: str = ""
    is_tested: bool = True

    @property
    def verdict(self) -> Verdict:
        """Verdict that follows from the conditions."""
        if self.undecided_reason or not self.conditions:
            return "not decided"
        if any(condition.shown is False for condition in self.conditions):
            return "does not hold"
        return "holds" if all(each.shown for each in self.conditions) else "not decided"

    @property
    def tested(self) -> list[ConditionResult]:
        """Conditions on scores."""
        return [each for each in self.conditions if each.change is not None]

    @property
    def p(self) -> float:
        """One-sided p-value of the conjunction; NaN if a condition has none."""
        return float(np.max([each.p for each in self.conditions])) if self.conditions else np.nan

    def find_state(self, condition: ConditionResult) -> ConditionState:
        """Return the state of one of the conditions; those of an untested claim are open.

        Args:
            condition: one of ``conditions``.
        """
        if self.undecided_reason or condition.shown is None:
            return "open"
        return "shown" if condition.shown else "refuted"

    def find_closest(self) -> ConditionResult | None:
        """Return the condition that decides the claim: its lower bound is the worst.

        Of a refuted claim it is one of the refuted; None if costs alone refute it.
        """
        is_refuted = self.verdict == "does not hold"
        decisive = [
            each for each in self.tested if not is_refuted or self.find_state(each) == "refuted"
        ]
        return min(decisive, key=lambda each: each.slack, default=None)


def evaluate_claims(
    comparison: SystemComparison, config: ClaimsConfig | None = None
) -> list[ClaimResult]:
    """Return all claims: those with an order first, as they are tested, then the others.

    Args:
        comparison: scores, differences and tests of the systems.
        config: claims; None states none.

    Returns:
        One entry per claim. A claim whose systems were not run is not decided, with the reason.
    """
    rules = config or ClaimsConfig()
    found = {
        name: _evaluate_claim(comparison, rules, name, rules.stated[name])
        for name in dict.fromkeys([*rules.order, *rules.stated])
    }
    for name, claim in found.items():
        seeds = min((each.change.seeds for each in claim.tested if each.change), default=0)
        # The numbers stay in the report, but they carry no verdict.
        if seeds < MIN_SEEDS and not claim.undecided_reason:
            few = _describe_few(comparison, seeds)
            found[name] = replace(claim, undecided_reason=few, is_tested=False)
    _keep_order(found, rules)
    _correct_others(found, rules)
    return list(found.values())


def answer_in_a_sentence(comparison: SystemComparison) -> str:
    """Return the answer of a comparison of two systems, by their mean score; "" for others.

    Args:
        comparison: scores, differences and tests of the systems.
    """
    if len(comparison.systems) != 2:
        return ""
    labels = list(comparison.systems)
    # The reference is the subject of the sentence.
    labels.sort(key=lambda label: label != comparison.reference)
    own, other = labels
    test = comparison.find_test(own, other, MEAN)
    change = test.difference if test else estimate_difference(comparison, own, other, MEAN)
    count = len(comparison.common_tasks)
    tasks = f"{count} tasks" if count > 1 else comparison.common_tasks[0].replace("_", " ")
    points = _format_points(change)
    if test is not None and test.verdict != "not decided":
        return f"{own} scores {test.verdict} than {other} on {tasks}: {points}."
    return f"Not decided: {own} − {other} is {points} on {tasks}; {_explain(comparison, test)}."


def sort_systems(comparison: SystemComparison) -> list[str]:
    """Return all labels, best mean score first; a system and its pretrained variant are adjacent.

    Args:
        comparison: computed results.
    """

    def mean(label: str) -> float:
        score = comparison.find_score(label, MEAN)
        return -np.inf if score is None else score.value

    families: dict[str, list[str]] = {}
    for label in sorted(comparison.systems, key=mean, reverse=True):
        families.setdefault(label.removesuffix(PRETRAINED), []).append(label)
    return [label for members in families.values() for label in members]


def answer_comparison(comparison: SystemComparison, claims: Sequence[ClaimResult]) -> str:
    """Return the answer of a comparison in one sentence with its number.

    The first claim that was tested is the answer of a study with claims. Two systems, or more
    without claims, are answered by their mean scores. One system has no answer.

    Args:
        comparison: computed results.
        claims: evaluated claims, in the order of their tests.
    """
    tested = [claim for claim in claims if claim.conditions]
    if tested:
        return _answer_claim(tested[0], [each for each in claims if each is not tested[0]])
    if len(comparison.systems) == 2:
        return answer_in_a_sentence(comparison)
    best, *others = sorted(
        comparison.systems, key=lambda label: -comparison.samples[label, MEAN, SPLIT].values.mean()
    )
    if not others:
        return ""
    score = comparison.scores[best, MEAN, SPLIT]
    change = estimate_difference(comparison, best, others[0], MEAN)
    interval = "" if np.isnan(score.low) else f" ({100 * score.low:.1f} to {100 * score.high:.1f})"
    test = comparison.find_test(best, others[0], MEAN)
    verdict = f"verdict: {test.verdict}" if test else "not tested"
    mean = comparison.name_score(MEAN) if comparison.has_unequal_tasks else "mean score"
    return (
        f"{best} has the highest {mean} of {len(comparison.systems)} systems, "
        f"{100 * score.value:.1f}{interval}; {format_interval(change)} points against the next, "
        f"{others[0]} ({verdict})."
    )


def estimate_difference(
    comparison: SystemComparison, own: str, other: str, task: str, level: float = 0.95
) -> ScoreEstimate:
    """Return the score of one system minus that of another on the split test.

    Args:
        comparison: scores, differences and tests of the systems.
        own: label of one system.
        other: label of the other system.
        task: task name, or ``mean``.
        level: confidence level of the interval.
    """
    change, spread = comparison.subtract_scores(own, other, task)
    return statistics.estimate_mean(change, spread, level)


# -- claims --------------------------------------------------------------------------------


def _describe_few(comparison: SystemComparison, seeds: int) -> str:
    have = format_plural(seeds, comparison.repeat_noun)
    return f"{have} per system; a verdict requires at least {MIN_SEEDS}"


def _explain(comparison: SystemComparison, test: PairedTest | None) -> str:
    """Return why a test of two systems, or none, has no verdict."""
    labels = list(comparison.systems)
    if test is None and find_variant(comparison.reference, labels[0], labels) is None:
        return f"no system is named {comparison.reference}, so nothing is tested; give --reference"
    if test is None:
        return "these systems are not tested against each other"
    if test.difference.seeds < MIN_SEEDS:
        return _describe_few(comparison, test.difference.seeds)
    if np.isnan(test.p):
        return "one held-out unit gives no interval"
    if test.difference.low > 0 or test.difference.high < 0:
        count = len(comparison.tests)
        return f"not significant among {count} tests (corrected p {test.p_corrected:.3f})"
    return list_exclusions(test.difference)


def _evaluate_claim(
    comparison: SystemComparison, rules: ClaimsConfig, name: str, claim: Claim
) -> ClaimResult:
    rule = "; ".join(_describe_rule(part, rules) for part in claim.parts)
    asked = [label for part in claim.parts for label in part.systems]
    absent = [label for label in dict.fromkeys(asked) if label not in comparison.systems]
    if absent:
        why = f"{' and '.join(absent)} not run"
        return ClaimResult(name, claim.text, rule, (), why, is_tested=False)
    conditions: list[ConditionResult] = []
    for part in claim.parts:
        for task in part.tasks or comparison.common_tasks:
            if not comparison.has_task(task, *part.systems):
                several = f"each of {', '.join(part.systems)}"
                both = several if part.beyond else f"both {part.system} and {part.against}"
                reason = f"{task} is not a task of {both}"
                return ClaimResult(name, claim.text, rule, conditions, reason, is_tested=False)
            conditions.append(_test_part(comparison, rules, part, task))
        if part.flops_at_most is not None:
            conditions.append(_check_flops(comparison, part, part.flops_at_most))
    return ClaimResult(name, claim.text, rule, conditions)


def _keep_order(found: dict[str, ClaimResult], rules: ClaimsConfig) -> None:
    """Leave every claim after the first that does not hold without a verdict."""
    stop = ""
    for name in rules.order:
        if stop and not found[name].undecided_reason:
            why = f"it is tested after {stop!r}, which is not shown"
            found[name] = replace(found[name], undecided_reason=why, is_tested=False)
        elif found[name].verdict != "holds" and not stop:
            stop = name


def _correct_others(found: dict[str, ClaimResult], rules: ClaimsConfig) -> None:
    """Correct the claims without an order together."""
    names = [name for name in found if name not in rules.order]
    corrected = statistics.correct_p_values([found[name].p for name in names])
    for name, p in zip(names, corrected, strict=True):
        if found[name].verdict == "holds" and p > rules.alpha / 2:
            why = f"shown alone, but not among {len(names)} claims (corrected one-sided p {p:.3f})"
            found[name] = replace(found[name], undecided_reason=why)


def _describe_rule(part: Condition, rules: ClaimsConfig) -> str:
    names = {MEAN: "the mean over common tasks", SHARED_MEAN: "the mean over their shared tasks"}
    tasks = ", ".join(names.get(task, task) for task in part.tasks) or "each task"
    level = f"{100 * (1 - rules.alpha):g} %"
    sign, places = ("±", "within, outside") if part.test == "equivalent" else ("−", "above, below")
    limit = "0"
    if part.test != "higher":
        margins = {task: rules.find_margin(part, task) for task in part.tasks or rules.margins}
        others = [f"{task} {sign}{100 * m:g}" for task, m in margins.items() if m != rules.margin]
        limit = f"{sign}{100 * rules.margin:g} points"
        limit += f" ({', '.join(others)})" if others else ""
    shown, refuted = places.split(", ")
    text = (
        f"{part.difference} on {tasks}: the {level} interval lies {shown} {limit}, and refutes "
        f"{refuted} {limit}"
    )
    if part.flops_at_most is not None:
        text += f"; at most {part.flops_at_most:g} times the FLOPs"
    return text


def _test_part(
    comparison: SystemComparison, rules: ClaimsConfig, part: Condition, task: str
) -> ConditionResult:
    margin = rules.find_margin(part, task)
    change, spread = comparison.subtract_scores(part.system, part.against, task, part.beyond)
    found = statistics.estimate_mean(change, spread, 1 - rules.alpha)

    def exceed(limit: float) -> float:
        """Return the one-sided p-value of "the difference is above the limit"."""
        two_sided = statistics.compute_p_value(change, spread, limit)
        return two_sided / 2 if found.value > limit else 1 - two_sided / 2

    p, limit = exceed(-margin), np.inf
    if part.test == "equivalent":
        # Both sides must be shown (source: Schuirmann 1987, two one-sided tests).
        p, limit = max(p, 1 - exceed(margin)), margin
    shown: bool | None = None
    if -margin < found.low and found.high < limit:
        shown = True
    elif found.high < -margin or found.low > limit:
        shown = False
    score = comparison.name_score(task, *part.systems)
    text = f"{score}, {part.difference}: {_format_points(found)}"
    if not np.isnan(found.low):
        text += f"; {list_exclusions(found)}"
    folds = _average_folds(change)
    return ConditionResult(text, shown, p, part, task, score, margin, found, folds)


def _check_flops(comparison: SystemComparison, part: Condition, most: float) -> ConditionResult:
    # Costs are those of the score that the part is about.
    mean, pair = (SHARED_MEAN if SHARED_MEAN in part.tasks else MEAN), (part.system, part.against)
    tasks = comparison.list_tasks(mean, *part.systems)
    own, other = (_average_flops(comparison, label, tasks) for label in pair)
    if np.isnan(own / other):
        return ConditionResult(f"the FLOPs against {part.against} are unknown", None)
    where = f", {comparison.name_score(mean, *part.systems)}"
    text = f"{own / other:.2f} of the FLOPs of {part.against}, at most {most:g}"
    text += where if comparison.has_unequal_tasks else ""
    return ConditionResult(text, own / other <= most)


def _average_flops(comparison: SystemComparison, label: str, tasks: Sequence[str]) -> float:
    known = [comparison.costs.get((label, task)) for task in tasks]
    # One unknown cost makes the mean unknown.
    return float(np.mean([np.nan if each is None else each.flops for each in known]))


def _average_folds(change: Contrast) -> list[float]:
    """Return the mean of each fold, in their order; [] without folds."""
    replicates = statistics.list_replicates(change)
    folds: dict[int, list[float]] = {}
    for number in sorted(replicates):
        folds.setdefault(number // REPLICATE_BASE, []).append(replicates[number])
    return [float(np.mean(values)) for values in folds.values()]


def _answer_claim(claim: ClaimResult, others: Sequence[ClaimResult]) -> str:
    """Return the answer of one claim, and how many other claims have which result."""
    results = Counter(
        OPENINGS[each.verdict].lower() if each.is_tested else "not tested" for each in others
    )
    counts = ", ".join(f"{count} {result}" for result, count in results.items())
    rest = f"; other claims: {counts}" if others else ""
    opening = f"{OPENINGS[claim.verdict]}: {claim.text.rstrip('.')}"
    closest = claim.find_closest()
    failed = [each.text for each in claim.conditions if each.shown is False and not each.change]
    costs = "".join(f"; {text}" for text in failed)
    if closest is None or closest.change is None:
        return f"{opening}{costs}{rest}."
    count = len(claim.tested)
    # A reader must know which mean it is.
    worst = f"{closest.score} " if closest.score.startswith("mean of") else ""
    worst = f"least favourable of {count} scores: {closest.score} " if count > 1 else worst
    number = format_interval(closest.change).replace(" (", " points (", 1)
    sign = "±" if closest.is_two_sided else ""
    margin = f", margin {sign}{100 * closest.margin:g}" if closest.margin else ""
    excluded = describe_exclusions(closest.change) if claim.verdict == "not decided" else ""
    why = f"; {claim.undecided_reason}" if claim.undecided_reason else ""
    return f"{opening}; {worst}{number}{margin}{excluded}{costs}{why}{rest}."


def describe_exclusions(change: ScoreEstimate) -> str:
    """Return ": no loss above 0.8 points, no gain above 2.0"; "" without an interval."""
    return "" if np.isnan(change.low) else f": {list_exclusions(change)}"


def list_exclusions(change: ScoreEstimate) -> str:
    """Return what an interval excludes: "no loss above 2.1 points".

    Args:
        change: a difference of scores with an interval.
    """
    low, high = (round(100 * x, 1) for x in (change.low, change.high))
    if low > 0:
        return f"a gain of at least {low:.1f} points"
    if high < 0:
        return f"a loss of at least {-high:.1f} points"
    return f"no loss above {abs(low):.1f} points, no gain above {abs(high):.1f}"


def _format_points(change: ScoreEstimate) -> str:
    text = format_interval(change)
    return text.replace(" (", " points (", 1) if " (" in text else f"{text} points"
