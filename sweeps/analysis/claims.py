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

from sweeps.analysis.comparison import MEAN, Comparison, Test, variant
from sweeps.analysis.finished_runs import PRETRAINED
from sweeps.analysis.format import p_text, points
from sweeps.config.study import ClaimsConfig

Verdict = Literal["holds", "does not hold", "not decided"]

LEAST_SEEDS = 3
IMAGE = "text_to_image"


@dataclass(frozen=True)
class Part:
    """One condition of a claim; ``shown`` is None if it is neither shown nor refuted."""

    words: str
    shown: bool | None


@dataclass(frozen=True)
class Claim:
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
    words: str
    rule: str
    parts: Sequence[Part]
    ahead: str | None = None
    why: str = ""

    @property
    def winner(self) -> str | None:
        """The system that is ahead, once the claim is decided; none otherwise."""
        return None if self.verdict == "not decided" else self.ahead

    @property
    def standing(self) -> str:
        """Who is ahead, in words. A claim may be decided with none ahead: by not being behind."""
        return "not decided" if self.verdict == "not decided" else self.ahead or "none is ahead"

    @property
    def verdict(self) -> Verdict:
        """What the parts come to."""
        if self.why or not self.parts:
            return "not decided"
        if any(part.shown is False for part in self.parts):
            return "does not hold"
        return "holds" if all(part.shown for part in self.parts) else "not decided"


def claims(of: Comparison, config: ClaimsConfig | None = None) -> list[Claim]:
    """All claims, in the order of the report; one that lacks its systems says which."""
    rules = config or ClaimsConfig()
    makers: list[Callable[[Comparison, ClaimsConfig], Claim]] = [
        lambda c, r: _specialists(c, r, ""),
        lambda c, r: _specialists(c, r, PRETRAINED),
        _pretraining,
        _image,
        lambda c, r: _equal_cost(c, r, ("dense", "moe")),
    ]
    found = [make(of, rules) for make in makers]
    if of.seeds < LEAST_SEEDS:
        have = "1 seed" if of.seeds == 1 else f"{of.seeds} seeds"
        why = f"{have} per system; a verdict takes at least {LEAST_SEEDS}"
        found = [
            claim
            if claim.why
            else Claim(claim.name, claim.words, claim.rule, claim.parts, None, why)
            for claim in found
        ]
    return found


# -- the claims ----------------------------------------------------------------------------


def _specialists(of: Comparison, rules: ClaimsConfig, suffix: str) -> Claim:
    own, other = of.reference + suffix, of.specialist + suffix
    pretrained = bool(suffix)
    name = "the specialists, pretrained" if pretrained else "the specialists"
    points = f"{100 * rules.margin:g}"
    words = (
        f"One {_said(of)} is at or above the specialists on every task, and reaches "
        f"{rules.relative:g} of their mean relative score ("
        + ("both pretrained)." if pretrained else "neither pretrained).")
    )
    rule = (
        f"on each task the 95 % interval of the difference lies above −{points} points, and that "
        f"of the mean relative score above {rules.relative:g}; refuted by a significant loss or an "
        f"interval below"
    )
    missing = _missing(of, own, other)
    if missing:
        return Claim(name, words, rule, (), None, missing)
    parts = []
    for task in of.common:
        change, test = _change(of, own, other, task)
        words_of = f"{task}: {_in_points(change)}"
        if change[1] >= -rules.margin:
            parts.append(Part(words_of, True))
        else:
            lost = test.significant and change[0] < 0
            parts.append(Part(words_of, False if lost else None))
    value = of.relative[own].value
    shown = True if value.low >= rules.relative else False if value.high < rules.relative else None
    said = f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})"
    if np.isnan(value.value):
        said = "unknown, as a specialist scores 0"
    parts.append(Part(f"mean relative score {said}, wanted {rules.relative:g}", shown))
    return Claim(name, words, rule, parts, _winner(of, [(own, other)], MEAN))


def _pretraining(of: Comparison, rules: ClaimsConfig) -> Claim:
    own, other = of.reference + PRETRAINED, of.reference
    words = f"Pretraining lifts {_said(of)} on all {len(of.common)} tasks."
    rule = "each difference is above 0 and significant after Holm's correction"
    missing = _missing(of, own, other)
    if missing:
        return Claim("pretraining", words, rule, (), None, missing)
    parts = [_ahead(of, own, other, task) for task in of.common]
    return Claim("pretraining", words, rule, parts, _winner(of, [(own, other)], MEAN))


def _image(of: Comparison, rules: ClaimsConfig) -> Claim:
    name, base = "text to image", of.reference
    words = (
        f"On {IMAGE} {_said(of)} is ahead of every baseline of the same pretraining, and "
        f"activates no more parameters (within {100 * rules.equal_cost:g} %)."
    )
    rule = (
        "against each baseline the difference is above 0, significantly after Holm's correction, "
        f"and {base} activates at most {1 + rules.equal_cost:g} of its parameters"
    )
    if _best(of, base) is None:
        return Claim(name, words, rule, (), None, f"no {base} was run")
    parts, pairs = [], []
    for other in of.systems:
        own = variant(base, other, list(of.systems))
        known = (other, IMAGE) in of.costs and (own, IMAGE) in of.costs
        if own is None or other.removesuffix(PRETRAINED) == base or not known:
            continue
        pairs.append((own, other))
        ahead = _ahead(of, own, other, IMAGE)
        share = of.costs[own, IMAGE].activated / of.costs[other, IMAGE].activated
        numbers = ahead.words.removeprefix(f"{IMAGE}: ")
        parts.append(
            Part(
                f"{own} − {other}: {numbers}; {share:.2f} of its activated parameters",
                ahead.shown if share <= 1 + rules.equal_cost else False,
            )
        )
    if not parts:
        return Claim(name, words, rule, (), None, f"no baseline was trained on {IMAGE}")
    return Claim(name, words, rule, parts, _winner(of, pairs, IMAGE))


def _equal_cost(of: Comparison, rules: ClaimsConfig, systems: Sequence[str]) -> Claim:
    words = f"Dense and mixture-of-experts models of {_said(of)}'s activated size are behind it."
    rule = (
        f"for each of the same pretraining: activated parameters within "
        f"{100 * rules.equal_cost:g} % (mean over tasks), and the mean score is below, "
        "significantly after Holm's correction"
    )
    name = "equal activated cost"
    if _best(of, of.reference) is None:
        return Claim(name, words, rule, (), None, f"no {of.reference} was run")
    parts, seen, pairs = [], set(), []
    for label, runs in of.systems.items():
        own = variant(of.reference, label, list(of.systems))
        if runs[0].system not in systems or own is None:
            continue
        share = of.costs[label, MEAN].activated / of.costs[own, MEAN].activated
        if abs(share - 1) > rules.equal_cost:
            continue
        seen.add(runs[0].system)
        pairs.append((own, label))
        ahead = _ahead(of, own, label, MEAN)
        words_of = f"{own} − {label}, {ahead.words}; {share:.2f} of its activated parameters"
        parts.append(Part(words_of, ahead.shown))
    absent = [system for system in systems if system not in seen]
    if absent:
        size = f"within {100 * rules.equal_cost:g} % of the activated size"
        return Claim(name, words, rule, parts, None, f"no {' and no '.join(absent)} {size} was run")
    return Claim(name, words, rule, parts, _winner(of, pairs, MEAN))


# -- parts ---------------------------------------------------------------------------------


def _said(of: Comparison) -> str:
    return "SkillNet" if of.reference == "skillnet" else of.reference


def _missing(of: Comparison, *labels: str) -> str:
    absent = [label for label in labels if label not in of.systems]
    return f"{' and '.join(absent)} not run" if absent else ""


def _best(of: Comparison, base: str) -> str | None:
    """The pretrained variant if there is one, else the plain one."""
    return next((name for name in (base + PRETRAINED, base) if name in of.systems), None)


def _ahead(of: Comparison, own: str, other: str, task: str) -> Part:
    """``own`` has the higher score: shown, refuted, or neither."""
    change, test = _change(of, own, other, task)
    shown = change[0] > 0 if test.significant else None
    return Part(f"{task}: {_in_points(change)}, p {_equals(test.corrected)}", shown)


def _change(
    of: Comparison, own: str, other: str, task: str
) -> tuple[tuple[float, float, float], Test]:
    """(difference, low, high) of ``own`` less ``other``, and the test behind it."""
    test = of.test(own, other, task)
    if test is not None:
        return (test.change.value, test.change.low, test.change.high), test
    test = of.test(other, own, task)
    assert test is not None, f"{own} and {other} were not tested on {task}"
    return (-test.change.value, -test.change.high, -test.change.low), test


def _winner(of: Comparison, pairs: Sequence[tuple[str, str]], task: str) -> str | None:
    """The reference if it beats each baseline of its pair; the best that beats it; else none."""
    if of.seeds < LEAST_SEEDS:
        return None
    beaten, better = 0, {}
    for own, other in pairs:
        part = _ahead(of, own, other, task)
        beaten += part.shown is True
        if part.shown is False:
            better[other] = of.scores[other, task, "test"].value
    if better:
        return max(better, key=lambda label: better[label])
    if beaten < len(pairs):
        return None
    own = pairs[0][0]
    return own if len(pairs) == 1 else own.removesuffix(PRETRAINED)


def _in_points(change: tuple[float, float, float]) -> str:
    return points(change).replace(" (", " points (", 1)


def _equals(p: float) -> str:
    text = p_text(p)
    return text if text.startswith("<") else f"= {text}"
