"""Verdicts on the claims of a study.

A claim is a conjunction: each of its parts must be shown on each of its tasks. Such a conjunction
keeps the level of its tests without a correction (source: Berger 1982, intersection-union tests).

"holds"          every condition is shown
"does not hold"  one condition is refuted: its interval lies below minus the margin
"not decided"    otherwise; the conditions say what the study excludes

Claims in ``order`` are tested one after the other, each at the full level, until one is not shown.
The other claims are corrected together by Holm's method. With fewer than ``MIN_SEEDS`` seeds of
one of its systems a claim is not decided, as a paired test is not. :func:`evaluate_claims` and
:func:`answer_in_a_sentence` are called by ``skillnet_studies.report.report``, and the sentence
states the verdict of the paired test.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from skillnet_platform.terminal_text import format_plural
from skillnet_studies.analysis import statistics
from skillnet_studies.analysis.comparison import (
    MEAN,
    MIN_SEEDS,
    PairedTest,
    SystemComparison,
    find_variant,
)
from skillnet_studies.analysis.statistics import ScoreEstimate
from skillnet_studies.config.claims import ClaimPart, ClaimsConfig, StatedClaim
from sweeps.config.format import format_interval

Verdict = Literal["holds", "does not hold", "not decided"]

#: Result of a condition, as the table, the figure and the files show it.
ConditionResult = Literal["shown", "refuted", "open"]


class TestedDifference(NamedTuple):
    """The difference that a condition is about.

    Args:
        system: label of the system that the claim is about.
        against: label of the other system.
        task: task name, or ``mean``.
        margin: loss that the claim allows, as a fraction; 0 if the score must be higher.
        change: score of ``system`` minus score of ``against``.
    """

    system: str
    against: str
    task: str
    margin: float
    change: ScoreEstimate


@dataclass(frozen=True)
class ClaimCondition:
    """One condition of a claim.

    Args:
        text: the condition with its numbers, and what they exclude.
        shown: whether its interval alone shows it: True, False if it refutes it, None otherwise.
        p: one-sided p-value; 0 for a condition without a test.
        tested: the difference that was tested; None for a condition on costs.
    """

    text: str
    shown: bool | None
    p: float = 0.0
    tested: TestedDifference | None = None


@dataclass(frozen=True)
class EvaluatedClaim:
    """A claim with the verdict of a study.

    Args:
        name: short name.
        text: the claim as a sentence.
        rule: condition under which it holds, as text.
        conditions: its conditions, with numbers.
        undecided_reason: reason why it is not decided in spite of its conditions; "" without one.
    """

    name: str
    text: str
    rule: str
    conditions: Sequence[ClaimCondition]
    undecided_reason: str = ""

    @property
    def verdict(self) -> Verdict:
        """Verdict that follows from the conditions."""
        if self.undecided_reason or not self.conditions:
            return "not decided"
        if any(condition.shown is False for condition in self.conditions):
            return "does not hold"
        return "holds" if all(each.shown for each in self.conditions) else "not decided"

    def find_result(self, condition: ClaimCondition) -> ConditionResult:
        """Return the result of one of the conditions; those of an untested claim are open.

        Args:
            condition: one of ``conditions``.
        """
        if self.undecided_reason or condition.shown is None:
            return "open"
        return "shown" if condition.shown else "refuted"

    @property
    def p(self) -> float:
        """One-sided p-value of the conjunction; NaN if a condition has none."""
        return float(np.max([each.p for each in self.conditions])) if self.conditions else np.nan


def evaluate_claims(
    comparison: SystemComparison, config: ClaimsConfig | None = None
) -> list[EvaluatedClaim]:
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
        seeds = min(
            (each.tested.change.seeds for each in claim.conditions if each.tested), default=0
        )
        # The numbers stay in the report, but they carry no verdict.
        if seeds < MIN_SEEDS and not claim.undecided_reason:
            found[name] = replace(claim, undecided_reason=_describe_few(comparison, seeds))
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
    comparison: SystemComparison, rules: ClaimsConfig, name: str, claim: StatedClaim
) -> EvaluatedClaim:
    rule = "; ".join(_describe_rule(part, rules) for part in claim.parts)
    asked = [label for part in claim.parts for label in (part.system, part.against)]
    absent = [label for label in dict.fromkeys(asked) if label not in comparison.systems]
    if absent:
        return EvaluatedClaim(name, claim.text, rule, (), f"{' and '.join(absent)} not run")
    conditions: list[ClaimCondition] = []
    for part in claim.parts:
        for task in part.tasks or comparison.common_tasks:
            if not comparison.has_task(task, part.system, part.against):
                reason = f"{task} is not a task of both {part.system} and {part.against}"
                return EvaluatedClaim(name, claim.text, rule, conditions, reason)
            conditions.append(_test_part(comparison, rules, part, task))
        if part.flops_at_most is not None:
            conditions.append(_check_flops(comparison, part, part.flops_at_most))
    return EvaluatedClaim(name, claim.text, rule, conditions)


def _keep_order(found: dict[str, EvaluatedClaim], rules: ClaimsConfig) -> None:
    """Leave every claim after the first that does not hold without a verdict."""
    stop = ""
    for name in rules.order:
        if stop and not found[name].undecided_reason:
            why = f"it is tested after {stop!r}, which is not shown"
            found[name] = replace(found[name], undecided_reason=why)
        elif found[name].verdict != "holds" and not stop:
            stop = name


def _correct_others(found: dict[str, EvaluatedClaim], rules: ClaimsConfig) -> None:
    """Correct the claims without an order together."""
    names = [name for name in found if name not in rules.order]
    corrected = statistics.correct_p_values([found[name].p for name in names])
    for name, p in zip(names, corrected, strict=True):
        if found[name].verdict == "holds" and p > rules.alpha / 2:
            why = f"shown alone, but not among {len(names)} claims (corrected one-sided p {p:.3f})"
            found[name] = replace(found[name], undecided_reason=why)


def _describe_rule(part: ClaimPart, rules: ClaimsConfig) -> str:
    tasks = ", ".join(part.tasks) or "each task"
    level = f"{100 * (1 - rules.alpha):g} %"
    limit = "0"
    if part.test == "not_lower":
        margins = {task: rules.find_margin(task) for task in part.tasks or rules.margins}
        others = [f"{task} −{100 * m:g}" for task, m in margins.items() if m != rules.margin]
        limit = f"−{100 * rules.margin:g} points" + (f" ({', '.join(others)})" if others else "")
    text = (
        f"{part.system} − {part.against} on {tasks}: the {level} interval lies above {limit}, and "
        f"refutes below {limit}"
    )
    if part.flops_at_most is not None:
        text += f"; at most {part.flops_at_most:g} times the FLOPs"
    return text


def _test_part(
    comparison: SystemComparison, rules: ClaimsConfig, part: ClaimPart, task: str
) -> ClaimCondition:
    margin = rules.find_margin(task) if part.test == "not_lower" else 0.0
    change, spread = comparison.subtract_scores(part.system, part.against, task)
    found = statistics.estimate_mean(change, spread, 1 - rules.alpha)
    two_sided = statistics.compute_p_value(change, spread, -margin)
    p = two_sided / 2 if found.value > -margin else 1 - two_sided / 2
    shown: bool | None = None
    if found.low > -margin:
        shown = True
    elif found.high < -margin:
        shown = False
    text = f"{task}, {part.system} − {part.against}: {_format_points(found)}"
    if not np.isnan(found.low):
        text += f"; {list_exclusions(found)}"
    tested = TestedDifference(part.system, part.against, task, margin, found)
    return ClaimCondition(text, shown, p, tested)


def _check_flops(comparison: SystemComparison, part: ClaimPart, most: float) -> ClaimCondition:
    own, other = (comparison.costs[label, MEAN].flops for label in (part.system, part.against))
    text = f"{own / other:.2f} of the FLOPs of {part.against}, at most {most:g}"
    return ClaimCondition(text, own / other <= most)


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
