"""The answer of a comparison in one sentence, and the table of its claims.

Called by ``skillnet_studies.report.report``. Both are read first, so they hold the number that
decides.
"""

from collections.abc import Sequence

import numpy as np

from skillnet_platform.tables import ReportTable, TableCell
from skillnet_platform.terminal_text import NO_BREAK_SPACE
from skillnet_studies.analysis.claims import (
    ClaimCondition,
    EvaluatedClaim,
    TestedDifference,
    answer_in_a_sentence,
    estimate_difference,
    list_exclusions,
)
from skillnet_studies.analysis.comparison import MEAN, SystemComparison
from skillnet_studies.report.references import ReferenceScores, average_references
from sweeps.config.format import format_interval

#: Rows of the table that the page shows unfolded.
MAX_ROWS = 6
#: Verdict -> first word of the answer.
OPENINGS = {"holds": "Shown", "does not hold": "Refuted", "not decided": "Not decided"}


def sort_systems(comparison: SystemComparison) -> list[str]:
    """Return all labels, best mean score first; a system and its pretrained variant are adjacent.

    Args:
        comparison: computed results.
    """
    from skillnet_studies.analysis.finished_runs import PRETRAINED

    def mean(label: str) -> float:
        score = comparison.find_score(label, MEAN)
        return -np.inf if score is None else score.value

    families: dict[str, list[str]] = {}
    for label in sorted(comparison.systems, key=mean, reverse=True):
        families.setdefault(label.removesuffix(PRETRAINED), []).append(label)
    return [label for members in families.values() for label in members]


def answer_comparison(comparison: SystemComparison, claims: Sequence[EvaluatedClaim]) -> str:
    """Return the answer of a comparison in one sentence with its number.

    The first claim that was tested is the answer of a study with claims. Two systems, or more
    without claims, are answered by their mean scores. One system has no answer.

    Args:
        comparison: computed results.
        claims: evaluated claims, in the order of their tests.
    """
    tested = [claim for claim in claims if claim.conditions]
    if tested:
        return _answer_claim(tested[0])
    if len(comparison.systems) == 2:
        return answer_in_a_sentence(comparison)
    best, *others = sorted(
        comparison.systems, key=lambda label: -comparison.samples[label, MEAN, "test"].values.mean()
    )
    if not others:
        return ""
    score = comparison.scores[best, MEAN, "test"]
    change = estimate_difference(comparison, best, others[0], MEAN)
    interval = "" if np.isnan(score.low) else f" ({100 * score.low:.1f} to {100 * score.high:.1f})"
    test = comparison.find_test(best, others[0], MEAN)
    verdict = f"verdict: {test.verdict}" if test else "not tested"
    return (
        f"{best} has the highest mean score of {len(comparison.systems)} systems, "
        f"{100 * score.value:.1f}{interval}; {format_interval(change)} points against the next, "
        f"{others[0]} ({verdict})."
    )


def build_claim_table(
    claims: Sequence[EvaluatedClaim],
    comparison: SystemComparison,
    references: ReferenceScores | None = None,
) -> ReportTable:
    """Return one row per claim: the claim, what was asked, the result and the verdict.

    Args:
        claims: evaluated claims; at most ``MAX_ROWS`` of them are listed.
        comparison: names the tasks.
        references: scores of the simple references, which the caption states.
    """
    rows = []
    for claim in claims[:MAX_ROWS]:
        rows.append(
            [
                TableCell(claim.verdict),
                TableCell(claim.text, is_prose=True),
                TableCell(_describe_question(claim), is_prose=True),
                TableCell(_describe_result(claim), is_prose=True),
            ]
        )
    more = len(claims) - MAX_ROWS
    caption = f"{more} more claims are in the complete list below. " if more > 0 else ""
    caption += "Differences of scores in points, with their intervals; for speech the score is 1 − "
    caption += "token error, so higher is better everywhere."
    if references:
        shown = [
            f"{task.replace('_', ' ')} {100 * references[task, 'test']:.1f}"
            for task in comparison.tasks
            if (task, "test") in references
        ]
        mean = average_references(references, comparison.common_tasks)
        if mean is not None:
            shown.append(f"mean {100 * mean:.1f}")
        caption += f" Simple references (TF-IDF, nearest neighbours): {', '.join(shown)}."
    return ReportTable("Claims", ["verdict", "claim", "asked", "result"], rows, caption)


def find_closest(claim: EvaluatedClaim) -> TestedDifference | None:
    """Return the tested difference that decides a claim: its lower bound is the worst.

    Of a refuted claim these are the refuted differences; None if costs alone refute it.

    Args:
        claim: an evaluated claim.
    """
    is_refuted = claim.verdict == "does not hold"
    decisive = [
        each for each in claim.conditions if not is_refuted or claim.find_result(each) == "refuted"
    ]
    tested = [each.tested for each in decisive if each.tested is not None]
    return min(tested, key=_slack, default=None)


def _slack(each: TestedDifference | None) -> float:
    """Return the distance from the lower bound to the margin; without an interval, −∞."""
    assert each is not None
    low = each.change.low
    return -np.inf if np.isnan(low) else low + each.margin


def _answer_claim(claim: EvaluatedClaim) -> str:
    opening = f"{OPENINGS[claim.verdict]}: {claim.text.rstrip('.')}"
    closest = find_closest(claim)
    failed = [each.text for each in claim.conditions if each.shown is False and not each.tested]
    costs = "".join(f"; {text}" for text in failed)
    if closest is None:
        return f"{opening}{costs}."
    count = sum(each.tested is not None for each in claim.conditions)
    name = closest.task.replace("_", " ")
    worst = f"least favourable of {count} scores: {name} " if count > 1 else ""
    number = format_interval(closest.change).replace(" (", " points (", 1)
    margin = f", margin {100 * closest.margin:g}" if closest.margin else ""
    excluded = _describe_exclusions(closest) if claim.verdict == "not decided" else ""
    why = f"; {claim.undecided_reason}" if claim.undecided_reason else ""
    return f"{opening}; {worst}{number}{margin}{excluded}{costs}{why}."


def _describe_question(claim: EvaluatedClaim) -> str:
    tested = [each.tested for each in claim.conditions if each.tested is not None]
    if not tested:
        return "–"
    pairs = ", ".join(dict.fromkeys(f"{each.system} − {each.against}" for each in tested))
    margins = sorted({each.margin for each in tested})
    if margins == [0.0]:
        asked = "above 0"
    else:
        asked = f"no loss of {' or '.join(f'{100 * margin:g}' for margin in margins)} points"
    tasks = list(dict.fromkeys(each.task for each in tested))
    where = tasks[0].replace("_", " ") if len(tasks) == 1 else f"each of {len(tasks)} scores"
    return f"{pairs}, {where}: {asked}"


def _describe_result(claim: EvaluatedClaim) -> str:
    tested = [each for each in claim.conditions if each.tested is not None]
    others = [each.text for each in claim.conditions if each.tested is None]
    parts = [claim.undecided_reason] if claim.undecided_reason else []
    # Without a verdict the intervals are stated by their place, which decides nothing.
    above, below = ("shown", "refuted")
    if claim.undecided_reason:
        above, below = ("intervals above the limit", "below the limit")
    if len(tested) > 1:
        parts.append(f"{sum(bool(each.shown) for each in tested)} of {len(tested)} {above}")
    for words, state in ((below, False), ("open", None)):
        for each in tested:
            if each.shown is state and len(tested) > 1:
                parts.append(f"{words}: {_describe_condition(each)}")
    if len(tested) == 1:
        parts.append(_describe_condition(tested[0]))
    elif tested and all(each.shown for each in tested):
        closest = min(tested, key=lambda each: _slack(each.tested))
        parts.append(f"closest: {_describe_condition(closest)}")
    return "; ".join([*parts, *others])


def _describe_condition(condition: ClaimCondition) -> str:
    """Return the task and the difference; of an open one also what is excluded."""
    tested = condition.tested
    assert tested is not None
    # A line of the table ends beside a number and its interval, not within them.
    number = format_interval(tested.change).replace(" ", NO_BREAK_SPACE)
    excluded = _describe_exclusions(tested) if condition.shown is None else ""
    return f"{tested.task.replace('_', ' ')} {number}{excluded}"


def _describe_exclusions(each: TestedDifference) -> str:
    """Return ": no loss above 0.8 points, no gain above 2.0"; "" without an interval."""
    return "" if np.isnan(each.change.low) else f": {list_exclusions(each.change)}"
