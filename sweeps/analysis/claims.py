"""Claims about the reference system, each with a rule and a verdict.

The verdict is "holds", "does not hold" or "not decided". A claim has conditions. It holds if all
of them are shown, and does not hold if one is refuted. Otherwise the study had too few seeds or
rows to decide. With fewer than ``MIN_SEEDS`` seeds nothing is decided.

A conjunction of conditions that are each tested at one level keeps that level (source: Berger
1982, intersection-union tests). The p-values are nevertheless corrected by Holm's method, because
the tables show the same numbers.

:func:`evaluate_claims` is called by ``sweeps.report.report``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sweeps.analysis.comparison import MEAN, PairedTest, SystemComparison, find_variant
from sweeps.analysis.finished_runs import PRETRAINED
from sweeps.analysis.format import format_interval, format_p_value
from sweeps.config.study import ClaimsConfig

Verdict = Literal["holds", "does not hold", "not decided"]

#: Seeds per system below which no claim is decided.
MIN_SEEDS = 3
#: Task of the claim about a single task.
IMAGE_TASK = "text_to_image"


@dataclass(frozen=True)
class ClaimCondition:
    """One condition of a claim.

    Args:
        text: the condition with its numbers.
        shown: True if shown, False if refuted, None otherwise.
    """

    text: str
    shown: bool | None


@dataclass(frozen=True)
class EvaluatedClaim:
    """A claim with the verdict of a study.

    Args:
        name: short name.
        text: the claim as a sentence.
        rule: condition under which it holds, as text.
        conditions: its conditions, with numbers.
        leader: label of the system with the significantly higher score, or None.
        undecided_reason: reason why no verdict is possible; "" if one is.
    """

    name: str
    text: str
    rule: str
    conditions: Sequence[ClaimCondition]
    leader: str | None = None
    undecided_reason: str = ""

    @property
    def winner(self) -> str | None:
        """Label of the leading system of a decided claim, or None."""
        return None if self.verdict == "not decided" else self.leader

    @property
    def winner_text(self) -> str:
        """The winner as text. A non-inferiority claim can be decided without a winner."""
        return "not decided" if self.verdict == "not decided" else self.leader or "no winner"

    @property
    def verdict(self) -> Verdict:
        """Verdict that follows from the conditions."""
        if self.undecided_reason or not self.conditions:
            return "not decided"
        if any(condition.shown is False for condition in self.conditions):
            return "does not hold"
        return "holds" if all(each.shown for each in self.conditions) else "not decided"


def evaluate_claims(
    comparison: SystemComparison, config: ClaimsConfig | None = None
) -> list[EvaluatedClaim]:
    """Return all claims in the order of the report.

    Args:
        comparison: the comparison.
        config: thresholds; None takes the defaults.

    Returns:
        One entry per claim. A claim whose systems were not run is not decided, with the reason.
    """
    rules = config or ClaimsConfig()
    # The order here is the order of the report.
    makers: list[Callable[[SystemComparison, ClaimsConfig], EvaluatedClaim]] = [
        lambda c, r: _specialists_claim(c, r, ""),
        lambda c, r: _specialists_claim(c, r, PRETRAINED),
        _pretraining_claim,
        _image_claim,
        lambda c, r: _equal_cost_claim(c, r, ("dense", "moe")),
    ]
    evaluated = [make(comparison, rules) for make in makers]
    # The numbers stay in the report, but they carry no verdict.
    if comparison.seeds < MIN_SEEDS:
        have = "1 seed" if comparison.seeds == 1 else f"{comparison.seeds} seeds"
        why = f"{have} per system; a verdict requires at least {MIN_SEEDS}"
        evaluated = [
            claim
            if claim.undecided_reason
            else EvaluatedClaim(claim.name, claim.text, claim.rule, claim.conditions, None, why)
            for claim in evaluated
        ]
    return evaluated


# -- claims --------------------------------------------------------------------------------


def _specialists_claim(
    comparison: SystemComparison, rules: ClaimsConfig, suffix: str
) -> EvaluatedClaim:
    own, other = comparison.reference + suffix, comparison.specialist + suffix
    pretrained = bool(suffix)
    name = "the specialists, pretrained" if pretrained else "the specialists"
    points = f"{100 * rules.margin:g}"
    text = (
        f"One {_display_name(comparison)} reaches the specialists' score on every task, and "
        f"{rules.relative:g} of their mean relative score ("
        + ("both pretrained)." if pretrained else "neither pretrained).")
    )
    rule = (
        f"on each task the 95 % interval of the difference lies above −{points} points, and the "
        f"interval of the mean relative score lies above {rules.relative:g}; refuted by a "
        "significant loss or by an interval below the threshold"
    )
    missing = _missing_systems(comparison, own, other)
    if missing:
        return EvaluatedClaim(name, text, rule, (), None, missing)
    conditions = []
    for task in comparison.common_tasks:
        change, test = _signed_change(comparison, own, other, task)
        numbers = f"{task}: {_format_points(change)}"
        # Non-inferiority: the whole interval lies above minus the margin.
        if change[1] >= -rules.margin:
            conditions.append(ClaimCondition(numbers, True))
        else:
            # An interval that reaches below the margin is no proof of a loss.
            is_loss = test.is_significant and change[0] < 0
            conditions.append(ClaimCondition(numbers, False if is_loss else None))
    value = comparison.relative[own].value
    # An interval that contains the threshold neither shows nor refutes the condition.
    shown = True if value.low >= rules.relative else False if value.high < rules.relative else None
    numbers = f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})"
    if np.isnan(value.value):
        numbers = "unknown, because a specialist scores 0"
    conditions.append(
        ClaimCondition(f"mean relative score {numbers}, threshold {rules.relative:g}", shown)
    )
    return EvaluatedClaim(
        name, text, rule, conditions, _find_leader(comparison, [(own, other)], MEAN)
    )


def _pretraining_claim(comparison: SystemComparison, rules: ClaimsConfig) -> EvaluatedClaim:
    own, other = comparison.reference + PRETRAINED, comparison.reference
    count = len(comparison.common_tasks)
    text = f"Pretraining improves {_display_name(comparison)} on all {count} tasks."
    rule = "each difference is above 0 and significant after Holm's correction"
    missing = _missing_systems(comparison, own, other)
    if missing:
        return EvaluatedClaim("pretraining", text, rule, (), None, missing)
    conditions = [_check_ahead(comparison, own, other, task) for task in comparison.common_tasks]
    leader = _find_leader(comparison, [(own, other)], MEAN)
    return EvaluatedClaim("pretraining", text, rule, conditions, leader)


def _image_claim(comparison: SystemComparison, rules: ClaimsConfig) -> EvaluatedClaim:
    name, base = "text to image", comparison.reference
    text = (
        f"On {IMAGE_TASK} {_display_name(comparison)} scores higher than every baseline with the "
        "same pretraining, and activates no more parameters "
        f"(within {100 * rules.equal_cost:g} %)."
    )
    rule = (
        "against each baseline the difference is above 0 and significant after Holm's correction, "
        f"and {base} activates at most {1 + rules.equal_cost:g} times its parameters"
    )
    if _preferred_variant(comparison, base) is None:
        return EvaluatedClaim(name, text, rule, (), None, f"no {base} was run")
    conditions, pairs = [], []
    for other in comparison.systems:
        own = find_variant(base, other, list(comparison.systems))
        # A system without this task has no cost entry and is not a baseline here.
        known = (other, IMAGE_TASK) in comparison.costs and (own, IMAGE_TASK) in comparison.costs
        if own is None or other.removesuffix(PRETRAINED) == base or not known:
            continue
        pairs.append((own, other))
        ahead = _check_ahead(comparison, own, other, IMAGE_TASK)
        share = (
            comparison.costs[own, IMAGE_TASK].activated
            / comparison.costs[other, IMAGE_TASK].activated
        )
        numbers = ahead.text.removeprefix(f"{IMAGE_TASK}: ")
        conditions.append(
            ClaimCondition(
                f"{own} − {other}: {numbers}; {share:.2f} of its activated parameters",
                ahead.shown if share <= 1 + rules.equal_cost else False,
            )
        )
    if not conditions:
        return EvaluatedClaim(
            name, text, rule, (), None, f"no baseline was trained on {IMAGE_TASK}"
        )
    return EvaluatedClaim(name, text, rule, conditions, _find_leader(comparison, pairs, IMAGE_TASK))


def _equal_cost_claim(
    comparison: SystemComparison, rules: ClaimsConfig, systems: Sequence[str]
) -> EvaluatedClaim:
    text = (
        "Dense and mixture-of-experts models with the activated size of "
        f"{_display_name(comparison)} score lower."
    )
    rule = (
        f"for each with the same pretraining: activated parameters within "
        f"{100 * rules.equal_cost:g} % (mean over tasks), and the mean score is lower, "
        "significant after Holm's correction"
    )
    name = "equal activated cost"
    if _preferred_variant(comparison, comparison.reference) is None:
        return EvaluatedClaim(name, text, rule, (), None, f"no {comparison.reference} was run")
    conditions, seen, pairs = [], set(), []
    for label, runs in comparison.systems.items():
        own = find_variant(comparison.reference, label, list(comparison.systems))
        if runs[0].system not in systems or own is None:
            continue
        share = comparison.costs[label, MEAN].activated / comparison.costs[own, MEAN].activated
        # Systems of another size say nothing about equal cost.
        if abs(share - 1) > rules.equal_cost:
            continue
        seen.add(runs[0].system)
        pairs.append((own, label))
        ahead = _check_ahead(comparison, own, label, MEAN)
        numbers = f"{own} − {label}, {ahead.text}; {share:.2f} of its activated parameters"
        conditions.append(ClaimCondition(numbers, ahead.shown))
    absent = [system for system in systems if system not in seen]
    if absent:
        size = f"within {100 * rules.equal_cost:g} % of the activated size"
        return EvaluatedClaim(
            name, text, rule, conditions, None, f"no {' and no '.join(absent)} {size} was run"
        )
    return EvaluatedClaim(name, text, rule, conditions, _find_leader(comparison, pairs, MEAN))


# -- conditions ----------------------------------------------------------------------------


def _display_name(comparison: SystemComparison) -> str:
    return "SkillNet" if comparison.reference == "skillnet" else comparison.reference


def _missing_systems(comparison: SystemComparison, *labels: str) -> str:
    absent = [label for label in labels if label not in comparison.systems]
    return f"{' and '.join(absent)} not run" if absent else ""


def _preferred_variant(comparison: SystemComparison, base: str) -> str | None:
    """Return the pretrained variant if it was run, else the plain one, else None."""
    return next((name for name in (base + PRETRAINED, base) if name in comparison.systems), None)


def _check_ahead(comparison: SystemComparison, own: str, other: str, task: str) -> ClaimCondition:
    """Return the condition "``own`` scores higher than ``other``": shown, refuted or neither."""
    change, test = _signed_change(comparison, own, other, task)
    shown = change[0] > 0 if test.is_significant else None
    return ClaimCondition(
        f"{task}: {_format_points(change)}, p {_format_p(test.p_corrected)}", shown
    )


def _signed_change(
    comparison: SystemComparison, own: str, other: str, task: str
) -> tuple[tuple[float, float, float], PairedTest]:
    """Return (difference, low, high) of ``own`` minus ``other``, and its test."""
    test = comparison.find_test(own, other, task)
    if test is not None:
        return (test.difference.value, test.difference.low, test.difference.high), test
    # Pairs are tested once; in the opposite order all signs change.
    test = comparison.find_test(other, own, task)
    assert test is not None, f"{own} and {other} were not tested on {task}"
    return (-test.difference.value, -test.difference.high, -test.difference.low), test


def _find_leader(
    comparison: SystemComparison, pairs: Sequence[tuple[str, str]], task: str
) -> str | None:
    """Return the leading system of pairs (reference, baseline), or None.

    The reference leads if it beats each baseline. Otherwise the best baseline that beats the
    reference leads.
    """
    # With too few seeds no claim has a verdict, and so no leader.
    if comparison.seeds < MIN_SEEDS:
        return None
    beaten, better = 0, {}
    for own, other in pairs:
        condition = _check_ahead(comparison, own, other, task)
        beaten += condition.shown is True
        if condition.shown is False:
            better[other] = comparison.scores[other, task, "test"].value
    if better:
        return max(better, key=lambda label: better[label])
    # A baseline that is neither better nor worse leaves the claim without a leader.
    if beaten < len(pairs):
        return None
    # Several pairs can mix variants, so the result names the reference without its suffix.
    own = pairs[0][0]
    return own if len(pairs) == 1 else own.removesuffix(PRETRAINED)


def _format_points(change: tuple[float, float, float]) -> str:
    return format_interval(change).replace(" (", " points (", 1)


def _format_p(p: float) -> str:
    text = format_p_value(p)
    return text if text.startswith("<") else f"= {text}"
