"""Tables of a comparison that need numbers alone: scores, tests, claims, budgets.

:func:`build_tables` and :func:`build_claim_table` are called by the reports of
``skillnet compare`` and by ``skillnet-evidence compare``. Tables hold plain texts; terminals, pages
and Markdown show them. The captions name the model of the variance that made their intervals: that
of seeds on one test split, or that of folds.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from skillnet_evidence.budget import TargetBudget
from skillnet_evidence.cells import NO_BREAK_SPACE, ReportTable, TableCell, make_table
from skillnet_evidence.claims import ClaimResult, ConditionResult, describe_exclusions
from skillnet_evidence.comparison import (
    MEAN,
    MIN_SEEDS,
    SPLIT,
    PairedTest,
    SystemComparison,
    TestVerdict,
    find_common_replicates,
    find_variant,
)
from skillnet_evidence.format import (
    format_count,
    format_interval,
    format_p_value,
    format_signed_points,
)
from skillnet_evidence.statistics import (
    MIN_OWN_SEEDS,
    ScoreEstimate,
    ScoreRange,
    estimate_mean,
    select_common_seeds,
)

#: (task, split) -> score of a simple reference as a fraction, where higher is better.
ReferenceScores = Mapping[tuple[str, str], float]

#: Label of the simple references in the report.
REFERENCE_LABEL = "simple references"
#: What the scores of error rates are, with a token error rate and with others.
ERRORS_IN_COLUMNS = (", speech is 1 − token error", ", an error rate is subtracted from 1")
ERRORS_IN_CLAIMS = (
    "for speech the score is 1 − token error, so ",
    "an error rate is subtracted from 1, so ",
)
#: Rows of the table that the page shows unfolded.
MAX_ROWS = 6
#: Claims that the page shows unfolded: all of the largest study.
MAX_CLAIMS = 8
#: Marks of scores that are significantly better or worse than the reference's.
BETTER, WORSE = "▲", "▼"
#: Verdict of a paired test -> its mark.
MARKS: dict[TestVerdict, str] = {"higher": BETTER, "lower": WORSE, "not decided": ""}


def build_tables(
    comparison: SystemComparison,
    references: ReferenceScores | None = None,
    reference_note: str = "",
    budgets: Mapping[str, TargetBudget] | None = None,
    more: Sequence[ReportTable] = (),
) -> list[ReportTable]:
    """Return all tables that need only scores and costs; empty tables are left out.

    Args:
        comparison: computed results; the tables list its systems in their order.
        references: scores of the simple references, by task and split.
        reference_note: sentence about them for the caption of the first table.
        budgets: label -> what the system spends until dense's score.
        more: tables of the caller, after those of scores.
    """
    known = references or {}
    built = [
        build_score_table(comparison, known, reference_note),
        build_change_table(comparison, "system"),
        build_change_table(comparison, "pretraining"),
        *more,
        build_budget_table(budgets or {}),
        build_other_splits_table(comparison, known),
        build_task_cost_table(comparison, "Activated parameters by task", "activated"),
        build_task_cost_table(comparison, "FLOPs per example by task", "flops"),
        build_test_table(comparison),
    ]
    return [table for table in built if table.rows]


def build_score_table(
    comparison: SystemComparison,
    references: ReferenceScores | None = None,
    reference_note: str = "",
) -> ReportTable:
    """Return the score of each task per system, the mean score and the relative score.

    Args:
        comparison: computed results.
        references: scores of the simple references, by task and split; a row of the table.
        reference_note: sentence about them for the caption.
    """
    columns = ["system", f"{comparison.repeat_noun}s"]
    mean = "mean score"
    if comparison.has_unequal_tasks:
        mean = comparison.name_score(MEAN)
    columns += [*(name_column(comparison, task) for task in comparison.tasks), mean]
    # A study without specialists has no such scores.
    has_relative = any(not np.isnan(each.value.value) for each in comparison.relative.values())
    columns += ["relative to specialists"] if has_relative else []
    tasks = [*comparison.tasks, MEAN]
    best = {task: _best_labels(comparison, task) for task in tasks}
    rows: list[list[TableCell | str]] = []
    for label, runs in comparison.systems.items():
        row = [label, str(len(runs))]
        cells = [_score_cell(comparison, label, task, label in best[task]) for task in tasks]
        rows.append([*row, *cells, *([_relative_cell(comparison, label)] if has_relative else [])])
    if references:
        scores = [references.get((task, SPLIT)) for task in comparison.tasks]
        scores.append(average_references(references, comparison.common_tasks))
        row = [REFERENCE_LABEL, "–", *map(_percent, scores)]
        rows.append([*row, *(["–"] if has_relative else [])])
    all_common = len(comparison.common_tasks) == len(comparison.tasks)
    names = "the tasks" if all_common else ", ".join(comparison.common_tasks)
    relative = (
        " Relative: geometric mean over tasks of the mean score divided by the mean score of "
        f"{comparison.specialist} with the same pretraining."
    )
    return make_table(
        "Results on held-out rows",
        columns,
        rows,
        "Scores in percent: higher is better in every column"
        f"{_describe_errors(comparison, *ERRORS_IN_COLUMNS)}. {_describe_means(comparison)} "
        f"{_describe_marks(comparison)}Bold: best of its column. The mean is over {names}."
        f"{relative if has_relative else ''}{reference_note if references else ''}"
        f"{_warn_about_few(comparison)}",
        collapsed=False,
    )


def build_change_table(comparison: SystemComparison, kind: str) -> ReportTable:
    """Return the paired differences of one kind of tests, per task.

    Args:
        comparison: computed results.
        kind: ``system`` for differences from the reference, ``pretraining`` for gains from it.
    """
    is_gain = kind == "pretraining"
    tasks = [*comparison.tasks, MEAN]
    pairs = dict.fromkeys((t.system, t.against) for t in comparison.tests if t.kind == kind)
    change = "Score of the first system minus score of the second"
    return make_table(
        "Gain from pretraining" if is_gain else "Differences from the reference",
        ["system" if is_gain else "systems", *map(comparison.name_score, tasks)],
        [
            [
                against if is_gain else f"{system} − {against}",
                *(_change_cell(comparison.find_test(system, against, task)) for task in tasks),
            ]
            for system, against in pairs
        ],
        f"{'Score with pretraining minus score without' if is_gain else change}, in points; 95 % "
        f"interval, {_describe_pairing(comparison)}. {BETTER} {WORSE}: significant after "
        f"correction.{_describe_false_marks(comparison)}",
    )


def build_other_splits_table(
    comparison: SystemComparison, references: ReferenceScores | None = None
) -> ReportTable:
    """Return the scores on test splits other than ``test``.

    Args:
        comparison: computed results.
        references: scores of the simple references, by task and split.
    """
    splits = comparison.splits
    keys = [(task, x) for task in comparison.tasks for x in splits[task] if x != SPLIT]
    rows: list[list[TableCell | str]] = [
        [label, *(_estimate_cell(comparison.find_score(label, *key)) for key in keys)]
        for label in (comparison.systems if keys else ())
    ]
    known = references or {}
    if any(key in known for key in keys):
        rows.append([REFERENCE_LABEL, *(_percent(known.get(key)) for key in keys)])
    names = [
        f"{task.replace('_', ' ')}, {split.removeprefix('test_').replace('_', ' ')}, "
        f"{comparison.metrics[task].label}"
        for task, split in keys
    ]
    return make_table(
        "Further test sets",
        ["system", *names],
        rows,
        "Scores in percent, higher is better, with 95 % intervals over "
        f"{name_sources(comparison)}; no significance tests. A set of one unit has no interval.",
    )


def build_test_table(comparison: SystemComparison) -> ReportTable:
    """Return every paired test with its p-values."""
    rows = [
        [
            *(test.system, test.against, comparison.name_score(test.task)),
            format_interval(test.difference),
            *(format_p_value(test.p), format_p_value(test.p_corrected), test.verdict),
        ]
        for test in comparison.tests
    ]
    return make_table(
        "All tests",
        ["system", "minus", "task", "points (95 % interval)", "p", "p, corrected", "verdict"],
        rows,
        f"{_describe_tests(comparison)}; Holm's correction over these "
        f"{len(comparison.tests)} tests.{_describe_false_marks(comparison)}",
    )


def build_task_cost_table(comparison: SystemComparison, title: str, cost: str) -> ReportTable:
    """Return one cost of each system by task.

    Args:
        comparison: computed results.
        title: title of the table.
        cost: field of :class:`skillnet_evidence.comparison.TaskCost`.
    """
    costs, tasks = comparison.costs, comparison.tasks
    # Scores of other projects have no costs.
    is_known = any(not np.isnan(getattr(each, cost)) for each in costs.values())
    rows = [
        [x, *(format_count(getattr(costs[x, t], cost)) if (x, t) in costs else "–" for t in tasks)]
        for x in (comparison.systems if is_known else ())
    ]
    return make_table(title, ["system", *(t.replace("_", " ") for t in tasks)], rows)


def build_budget_table(budgets: Mapping[str, TargetBudget]) -> ReportTable:
    """Return what each system spends until it reaches dense's final score.

    Args:
        budgets: label -> budget.
    """
    rows = [
        [label, own.against, f"{own.reached} of {own.runs}"]
        + [_ratio_cell(each, own.is_bound) for each in (own.steps, own.flops, own.seconds)]
        for label, own in budgets.items()
    ]
    return make_table(
        "Budget until dense's final score",
        ["system", "target", "runs that reach it", "steps", "operations", "time"],
        rows,
        "Ratios of what a dense run spends in total: geometric mean over runs, with 95 % intervals "
        "over runs (Student's t on logarithms; each run is paired with one dense run). The target "
        "is the mean score on validation rows at the end of the dense run; the curve is "
        "interpolated between evaluations. ≥: some runs do not reach the target and count with all "
        "that they spent, so the ratio is a lower bound without an interval. Operations: steps "
        "times FLOPs per example, mean over tasks. Pretraining is not counted. The row of the "
        "dense system shows how early another dense run reaches such a score by chance.",
    )


def build_gap_table(comparison: SystemComparison, arms: Mapping[str, str]) -> ReportTable:
    """Return differences from the reference at the usual steps and at more; no row without arms.

    Equal steps measure the speed of learning where learning is not finished. An arm with a multiple
    of the steps shows whether a difference closes.

    Args:
        comparison: computed results.
        arms: label -> label of the system with equal settings and more steps.
    """
    rows: list[list[TableCell | str]] = []
    own = comparison.reference
    for label, longer in arms.items():
        if label == own or own not in arms:
            continue
        systems = (own, label, arms[own], longer)
        if comparison.has_folds and not find_common_replicates(comparison.runs, systems):
            continue
        for task in [*comparison.common_tasks, MEAN]:
            samples = [comparison.samples[each, task, SPLIT] for each in systems]
            if comparison.has_folds:
                samples = select_common_seeds(samples)
            before, after = samples[0] - samples[1], samples[2] - samples[3]
            spread = comparison.spreads[task, SPLIT]
            gaps = [estimate_mean(each, spread) for each in (before, after, after - before)]
            name = comparison.name_score(task)
            rows.append([f"{own} − {label}", name, *(_points_cell(gap) for gap in gaps)])
    steps = sorted({run.steps for run in comparison.runs})
    # With folds, a difference on other folds would be no change of this one.
    pairs = "on the replicates that all four have" if comparison.has_folds else "paired by unit"
    return make_table(
        "Differences after more steps",
        ["systems", "task", f"{steps[0]} steps", f"{steps[-1]} steps", "change"],
        rows,
        f"Points with 95 % intervals, {pairs}. A difference that closes was one of the speed of "
        "learning.",
        collapsed=False,
    )


def build_claim_table(
    claims: Sequence[ClaimResult],
    comparison: SystemComparison,
    references: ReferenceScores | None = None,
) -> ReportTable:
    """Return one row per claim: the claim, what was asked, the result and the verdict.

    Args:
        claims: evaluated claims; at most ``MAX_CLAIMS`` of them are listed.
        comparison: names the tasks.
        references: scores of the simple references, which the caption states.
    """
    rows = [
        [TableCell(claim.verdict)]
        + [
            TableCell(text, is_prose=True)
            for text in (claim.text, _describe_question(claim), _describe_result(claim))
        ]
        for claim in claims[:MAX_CLAIMS]
    ]
    more = len(claims) - MAX_CLAIMS
    caption = f"{more} more claims are in the complete list below. " if more > 0 else ""
    caption += "Differences of scores in points, with their intervals; "
    caption += _describe_errors(comparison, *ERRORS_IN_CLAIMS)
    caption += "higher is better everywhere."
    if references:
        shown = [
            f"{task.replace('_', ' ')} {100 * references[task, SPLIT]:.1f}"
            for task in comparison.tasks
            if (task, SPLIT) in references
        ]
        mean = average_references(references, comparison.common_tasks)
        shown += [] if mean is None else [f"{comparison.name_score(MEAN)} {100 * mean:.1f}"]
        caption += f" Simple references (TF-IDF, nearest neighbours): {', '.join(shown)}."
    columns = ["verdict", "claim", "asked", "result"]
    return make_table("Claims", columns, rows, caption, collapsed=False)


def average_references(references: ReferenceScores, tasks: Sequence[str]) -> float | None:
    """Return the mean score over tasks on the split test; None if a task has no reference.

    Args:
        references: scores by task and split.
        tasks: tasks that all systems have.
    """
    scores = [references.get((task, SPLIT)) for task in tasks]
    known = [score for score in scores if score is not None]
    return fmean(known) if scores and len(known) == len(scores) else None


def name_column(comparison: SystemComparison, task: str) -> str:
    """Return the heading of a task's scores.

    Args:
        comparison: names the metrics.
        task: name of a task.
    """
    label = comparison.metrics[task].label
    return comparison.name_score(task) + (f", {label}" if label else "")


# -- cells ---------------------------------------------------------------------------------


def _best_labels(comparison: SystemComparison, task: str) -> set[str]:
    """Return the labels with the highest score; empty if all are equal."""
    found = {label: comparison.find_score(label, task) for label in comparison.systems}
    known = {label: score.value for label, score in found.items() if score is not None}
    top = {label for label, value in known.items() if value == max(known.values())}
    # If all are equal, none is highlighted.
    return top if len(top) < len(known) else set()


def _score_cell(comparison: SystemComparison, label: str, task: str, best: bool) -> TableCell:
    # Only tests against the reference are marked, not gains from pretraining.
    plain = _estimate_cell(comparison.find_score(label, task))
    against = find_variant(comparison.reference, label, list(comparison.systems))
    test = comparison.find_test(label, against, task) if against else None
    mark = MARKS[test.verdict] if test is not None and test.kind == "system" else ""
    return TableCell(plain.text, plain.small, mark, best)


def _relative_cell(comparison: SystemComparison, label: str) -> TableCell:
    relative = comparison.relative.get(label)
    if relative is None or np.isnan(relative.value.value):
        return TableCell("–")
    # Specialists relative to themselves: 1 without an interval.
    if relative.against == label:
        return TableCell("1")
    value = relative.value
    return TableCell(f"{value.value:.3f}", _format_range(value.low, value.high, 3))


def _estimate_cell(score: ScoreEstimate | None) -> TableCell:
    if score is None:
        return TableCell("–")
    low, high = 100 * score.low, 100 * score.high
    return TableCell(f"{100 * score.value:.1f}", _format_range(low, high, 1))


def _change_cell(test: PairedTest | None) -> TableCell:
    return TableCell("–") if test is None else _points_cell(test.difference, MARKS[test.verdict])


def _points_cell(change: ScoreEstimate, mark: str = "") -> TableCell:
    value, low, high = (format_signed_points(x) for x in change[:3])
    return TableCell(value, "" if np.isnan(change.low) else f"{low} to {high}", mark)


def _ratio_cell(ratio: ScoreRange, is_bound: bool) -> TableCell:
    text = f"{'≥ ' if is_bound else ''}{ratio.value:.2f}"
    return TableCell(text, _format_range(ratio.low, ratio.high, 2))


def _percent(score: float | None) -> str:
    return "–" if score is None else f"{100 * score:.1f}"


def _format_range(low: float, high: float, digits: int) -> str:
    # One held-out unit, or one run, gives a value without an interval.
    return "" if np.isnan(low) else f"{low:.{digits}f}–{high:.{digits}f}"


# -- texts about claims --------------------------------------------------------------------


def _describe_question(claim: ClaimResult) -> str:
    tested = claim.tested
    if not tested:
        return "–"
    pairs = dict.fromkeys(each.part.difference for each in tested if each.part)
    asked = " or ".join(dict.fromkeys(each.asked for each in tested))
    scores = list(dict.fromkeys(each.score for each in tested))
    where = scores[0] if len(scores) == 1 else f"each of {len(scores)} scores"
    return f"{', '.join(pairs)}, {where}: {asked}"


def _describe_result(claim: ClaimResult) -> str:
    tested = claim.tested
    others = [each.text for each in claim.conditions if each.change is None]
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
        closest = min(tested, key=lambda each: each.slack)
        parts.append(f"closest: {_describe_condition(closest)}")
    return "; ".join([*parts, *others])


def _describe_condition(condition: ConditionResult) -> str:
    """Return the task and the difference; of an open one also what is excluded."""
    assert condition.change is not None
    # A line of the table ends beside a number and its interval, not within them.
    number = format_interval(condition.change).replace(" ", NO_BREAK_SPACE)
    excluded = describe_exclusions(condition.change) if condition.shown is None else ""
    return f"{condition.score} {number}{excluded}"


# -- texts about the variance --------------------------------------------------------------


def name_sources(comparison: SystemComparison) -> str:
    """Return what the intervals of a comparison cover."""
    return "replicates" if comparison.has_folds else "seeds and held-out units"


def _describe_errors(comparison: SystemComparison, text: str, other: str) -> str:
    """Return what the scores of error rates are; "" without such a task."""
    errors = [each for each in comparison.metrics.values() if not each.is_higher_better]
    if not errors:
        return ""
    return text if any(each.name == "token_error_rate" for each in errors) else other


def _describe_means(comparison: SystemComparison) -> str:
    if comparison.has_folds:
        return (
            "Mean over replicates (a fold and a seed) with the 95 % interval over replicates. "
            "Replicates share training rows, and the variance is corrected for it (Nadeau & Bengio "
            "2003)."
        )
    return (
        "Mean over seeds with the 95 % interval over seeds and held-out units; with fewer than "
        f"{MIN_OWN_SEEDS} seeds the variance over seeds is pooled over systems."
    )


def _describe_marks(comparison: SystemComparison) -> str:
    if not comparison.tests:
        return "No score is tested. "
    return (
        f"{BETTER} and {WORSE}: significantly better or worse than {comparison.reference} with the "
        f"same pretraining ({_describe_pairing(comparison)}, Holm's correction over "
        f"{len(comparison.tests)} tests, 5 %).{_describe_false_marks(comparison)} "
    )


def _describe_pairing(comparison: SystemComparison) -> str:
    return "paired by replicate" if comparison.has_folds else "paired by unit"


def _describe_tests(comparison: SystemComparison) -> str:
    pairing = f"Difference of scores, {_describe_pairing(comparison)}; Student's t with"
    if comparison.has_folds:
        return (
            f"{pairing} the variance corrected for shared training rows (Nadeau & Bengio 2003) and "
            "one degree of freedom less than replicates"
        )
    return (
        f"{pairing} the variance over seeds pooled over systems and Satterthwaite's degrees of "
        "freedom"
    )


def _describe_false_marks(comparison: SystemComparison) -> str:
    """Return how often simulated reports of folds have a false mark; "" without folds."""
    if not comparison.has_folds:
        return ""
    return (
        " In simulations with the residuals of the final study's folds, 6 to 9 % of the reports of "
        "equal systems have a mark."
    )


def _warn_about_few(comparison: SystemComparison) -> str:
    """Return what few seeds or replicates do not show; "" for enough."""
    if all(len(runs) == 1 for runs in comparison.systems.values()):
        if comparison.has_folds:
            return " One replicate: there are no intervals, and nothing is decided."
        return (
            " One seed: intervals cover units only and do not generalize to other seeds. Nothing "
            "is decided."
        )
    if comparison.seeds < MIN_SEEDS:
        return (
            f" Nothing is decided about a system with fewer than {MIN_SEEDS} "
            f"{comparison.repeat_noun}s: their variance is uncertain."
        )
    return ""
