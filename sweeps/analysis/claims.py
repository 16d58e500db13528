"""Named claims about SkillNet, each with a rule and a verdict: holds, does not hold, not decided.

A claim has parts. It holds if every part is shown, does not hold if one is refuted, and is not
decided otherwise: then the study had too few seeds or rows. A conjunction of parts that are each
tested at one level keeps that level (source: Berger 1982, intersection-union tests); p-values of
differences are Holm's nevertheless, as they stand in the tables.

Few seeds: below three, nothing is decided.
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

MIN_SEEDS = 3
IMAGE_TASK = "text_to_image"


@dataclass(frozen=True)
class ClaimCondition:
    """One condition of a claim; ``shown`` is None if it is neither shown nor refuted."""

    text: str
    shown: bool | None


@dataclass(frozen=True)
class EvaluatedClaim:
    """A claim and what the study says of it.

    Args:
        name: short.
        words: the claim as a sentence.
        rule: when it holds.
        parts: its conditions, with numbers.
        ahead: label of the system that is ahead in what the claim is about, or none.
        why: why nothing can be decided, if so.
    """

    name: str
    text: str
    rule: str
    conditions: Sequence[ClaimCondition]
    leader: str | None = None
    undecided_reason: str = ""

    @property
    def winner(self) -> str | None:
        """The system that is ahead, once the claim is decided; none otherwise."""
        return None if self.verdict == "not decided" else self.leader

    @property
    def winner_text(self) -> str:
        """Who is ahead, in words. A claim may be decided with none ahead: by not being behind."""
        return "not decided" if self.verdict == "not decided" else self.leader or "none is ahead"

    @property
    def verdict(self) -> Verdict:
        """What the parts come to."""
        if self.undecided_reason or not self.conditions:
            return "not decided"
        if any(part.shown is False for part in self.conditions):
            return "does not hold"
        return "holds" if all(part.shown for part in self.conditions) else "not decided"


def evaluate_claims(
    of: SystemComparison, config: ClaimsConfig | None = None
) -> list[EvaluatedClaim]:
    """All claims, in the order of the report; one that lacks its systems says which."""
    rules = config or ClaimsConfig()
    makers: list[Callable[[SystemComparison, ClaimsConfig], EvaluatedClaim]] = [
        lambda c, r: _specialists_claim(c, r, ""),
        lambda c, r: _specialists_claim(c, r, PRETRAINED),
        _pretraining_claim,
        _image_claim,
        lambda c, r: _equal_cost_claim(c, r, ("dense", "moe")),
    ]
    found = [make(of, rules) for make in makers]
    if of.seeds < MIN_SEEDS:
        have = "1 seed" if of.seeds == 1 else f"{of.seeds} seeds"
        why = f"{have} per system; a verdict takes at least {MIN_SEEDS}"
        found = [
            claim
            if claim.undecided_reason
            else EvaluatedClaim(claim.name, claim.text, claim.rule, claim.conditions, None, why)
            for claim in found
        ]
    return found


# -- the claims ----------------------------------------------------------------------------


def _specialists_claim(of: SystemComparison, rules: ClaimsConfig, suffix: str) -> EvaluatedClaim:
    own, other = of.reference + suffix, of.specialist + suffix
    pretrained = bool(suffix)
    name = "the specialists, pretrained" if pretrained else "the specialists"
    points = f"{100 * rules.margin:g}"
    words = (
        f"One {_display_name(of)} is at or above the specialists on every task, and reaches "
        f"{rules.relative:g} of their mean relative score ("
        + ("both pretrained)." if pretrained else "neither pretrained).")
    )
    rule = (
        f"on each task the 95 % interval of the difference lies above −{points} points, and that "
        f"of the mean relative score above {rules.relative:g}; refuted by a significant loss or an "
        f"interval below"
    )
    missing = _missing_systems(of, own, other)
    if missing:
        return EvaluatedClaim(name, words, rule, (), None, missing)
    parts = []
    for task in of.common_tasks:
        change, test = _signed_change(of, own, other, task)
        words_of = f"{task}: {_format_points(change)}"
        if change[1] >= -rules.margin:
            parts.append(ClaimCondition(words_of, True))
        else:
            lost = test.is_significant and change[0] < 0
            parts.append(ClaimCondition(words_of, False if lost else None))
    value = of.relative[own].value
    shown = True if value.low >= rules.relative else False if value.high < rules.relative else None
    said = f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})"
    if np.isnan(value.value):
        said = "unknown, as a specialist scores 0"
    parts.append(ClaimCondition(f"mean relative score {said}, wanted {rules.relative:g}", shown))
    return EvaluatedClaim(name, words, rule, parts, _find_leader(of, [(own, other)], MEAN))


def _pretraining_claim(of: SystemComparison, rules: ClaimsConfig) -> EvaluatedClaim:
    own, other = of.reference + PRETRAINED, of.reference
    words = f"Pretraining lifts {_display_name(of)} on all {len(of.common_tasks)} tasks."
    rule = "each difference is above 0 and significant after Holm's correction"
    missing = _missing_systems(of, own, other)
    if missing:
        return EvaluatedClaim("pretraining", words, rule, (), None, missing)
    parts = [_check_ahead(of, own, other, task) for task in of.common_tasks]
    return EvaluatedClaim("pretraining", words, rule, parts, _find_leader(of, [(own, other)], MEAN))


def _image_claim(of: SystemComparison, rules: ClaimsConfig) -> EvaluatedClaim:
    name, base = "text to image", of.reference
    words = (
        f"On {IMAGE_TASK} {_display_name(of)} is ahead of every baseline of the same pretraining, and "
        f"activates no more parameters (within {100 * rules.equal_cost:g} %)."
    )
    rule = (
        "against each baseline the difference is above 0, significantly after Holm's correction, "
        f"and {base} activates at most {1 + rules.equal_cost:g} of its parameters"
    )
    if _preferred_variant(of, base) is None:
        return EvaluatedClaim(name, words, rule, (), None, f"no {base} was run")
    parts, pairs = [], []
    for other in of.systems:
        own = find_variant(base, other, list(of.systems))
        known = (other, IMAGE_TASK) in of.costs and (own, IMAGE_TASK) in of.costs
        if own is None or other.removesuffix(PRETRAINED) == base or not known:
            continue
        pairs.append((own, other))
        ahead = _check_ahead(of, own, other, IMAGE_TASK)
        share = of.costs[own, IMAGE_TASK].activated / of.costs[other, IMAGE_TASK].activated
        numbers = ahead.text.removeprefix(f"{IMAGE_TASK}: ")
        parts.append(
            ClaimCondition(
                f"{own} − {other}: {numbers}; {share:.2f} of its activated parameters",
                ahead.shown if share <= 1 + rules.equal_cost else False,
            )
        )
    if not parts:
        return EvaluatedClaim(
            name, words, rule, (), None, f"no baseline was trained on {IMAGE_TASK}"
        )
    return EvaluatedClaim(name, words, rule, parts, _find_leader(of, pairs, IMAGE_TASK))


def _equal_cost_claim(
    of: SystemComparison, rules: ClaimsConfig, systems: Sequence[str]
) -> EvaluatedClaim:
    words = f"Dense and mixture-of-experts models of {_display_name(of)}'s activated size are behind it."
    rule = (
        f"for each of the same pretraining: activated parameters within "
        f"{100 * rules.equal_cost:g} % (mean over tasks), and the mean score is below, "
        "significantly after Holm's correction"
    )
    name = "equal activated cost"
    if _preferred_variant(of, of.reference) is None:
        return EvaluatedClaim(name, words, rule, (), None, f"no {of.reference} was run")
    parts, seen, pairs = [], set(), []
    for label, runs in of.systems.items():
        own = find_variant(of.reference, label, list(of.systems))
        if runs[0].system not in systems or own is None:
            continue
        share = of.costs[label, MEAN].activated / of.costs[own, MEAN].activated
        if abs(share - 1) > rules.equal_cost:
            continue
        seen.add(runs[0].system)
        pairs.append((own, label))
        ahead = _check_ahead(of, own, label, MEAN)
        words_of = f"{own} − {label}, {ahead.text}; {share:.2f} of its activated parameters"
        parts.append(ClaimCondition(words_of, ahead.shown))
    absent = [system for system in systems if system not in seen]
    if absent:
        size = f"within {100 * rules.equal_cost:g} % of the activated size"
        return EvaluatedClaim(
            name, words, rule, parts, None, f"no {' and no '.join(absent)} {size} was run"
        )
    return EvaluatedClaim(name, words, rule, parts, _find_leader(of, pairs, MEAN))


# -- parts ---------------------------------------------------------------------------------


def _display_name(of: SystemComparison) -> str:
    return "SkillNet" if of.reference == "skillnet" else of.reference


def _missing_systems(of: SystemComparison, *labels: str) -> str:
    absent = [label for label in labels if label not in of.systems]
    return f"{' and '.join(absent)} not run" if absent else ""


def _preferred_variant(of: SystemComparison, base: str) -> str | None:
    """The pretrained variant if there is one, else the plain one."""
    return next((name for name in (base + PRETRAINED, base) if name in of.systems), None)


def _check_ahead(of: SystemComparison, own: str, other: str, task: str) -> ClaimCondition:
    """``own`` has the higher score: shown, refuted, or neither."""
    change, test = _signed_change(of, own, other, task)
    shown = change[0] > 0 if test.is_significant else None
    return ClaimCondition(
        f"{task}: {_format_points(change)}, p {_format_p(test.p_corrected)}", shown
    )


def _signed_change(
    of: SystemComparison, own: str, other: str, task: str
) -> tuple[tuple[float, float, float], PairedTest]:
    """(difference, low, high) of ``own`` less ``other``, and the test behind it."""
    test = of.find_test(own, other, task)
    if test is not None:
        return (test.difference.value, test.difference.low, test.difference.high), test
    test = of.find_test(other, own, task)
    assert test is not None, f"{own} and {other} were not tested on {task}"
    return (-test.difference.value, -test.difference.high, -test.difference.low), test


def _find_leader(of: SystemComparison, pairs: Sequence[tuple[str, str]], task: str) -> str | None:
    """The reference if it beats each baseline of its pair; the best that beats it; else none."""
    if of.seeds < MIN_SEEDS:
        return None
    beaten, better = 0, {}
    for own, other in pairs:
        part = _check_ahead(of, own, other, task)
        beaten += part.shown is True
        if part.shown is False:
            better[other] = of.scores[other, task, "test"].value
    if better:
        return max(better, key=lambda label: better[label])
    if beaten < len(pairs):
        return None
    own = pairs[0][0]
    return own if len(pairs) == 1 else own.removesuffix(PRETRAINED)


def _format_points(change: tuple[float, float, float]) -> str:
    return format_interval(change).replace(" (", " points (", 1)


def _format_p(p: float) -> str:
    text = format_p_value(p)
    return text if text.startswith("<") else f"= {text}"
