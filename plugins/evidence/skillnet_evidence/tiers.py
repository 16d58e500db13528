"""Tiers of systems that cannot be separated, and what the pairing of rows is worth.

Systems are sorted by their mean score. The first opens a tier; the next system that differs
significantly from the first of its tier opens another one. A difference is significant if its
p-value is at most 5 % after Holm's correction over all pairs of systems, so that any tier between
equal systems has a chance of 5 %. :func:`find_tiers` is called by ``skillnet-evidence compare``.
"""

from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np

from skillnet_evidence import statistics
from skillnet_evidence.cells import ReportTable, TableCell, make_table
from skillnet_evidence.comparison import ALPHA, MEAN, MIN_SEEDS, SPLIT, SystemComparison
from skillnet_evidence.format import format_interval, format_plural
from skillnet_evidence.statistics import ScoreEstimate

#: Standard errors on each side of an interval of lm-evaluation-harness.
NORMAL_QUANTILE = 1.96


class TierList(NamedTuple):
    """Systems in tiers, best first.

    Args:
        tiers: labels of each tier, by mean score.
        neighbours: neighbours in the order of means.
        alike: neighbours that do not differ significantly.
        pairs: pairs of systems in the correction.
    """

    tiers: Sequence[Sequence[str]]
    neighbours: int
    alike: int
    pairs: int

    def describe(self) -> str:
        """Return the number of tiers in a sentence."""
        count = sum(map(len, self.tiers))
        return (
            f"{format_plural(count, 'system')} in {format_plural(len(self.tiers), 'tier')}: "
            f"{self.alike} of {format_plural(self.neighbours, 'neighbour')} cannot be separated."
        )


def find_tiers(comparison: SystemComparison) -> TierList:
    """Return the tiers of all systems, by their mean score over the common tasks.

    Args:
        comparison: computed results.
    """
    samples = {label: comparison.samples[label, MEAN, SPLIT] for label in comparison.systems}
    labels = sorted(samples, key=lambda label: -float(samples[label].values.mean()))
    spread = comparison.spreads[MEAN, SPLIT]
    pairs = list(combinations(labels, 2))
    found = [statistics.compute_p_value(samples[a] - samples[b], spread) for a, b in pairs]
    corrected = dict(zip(pairs, statistics.correct_p_values(found), strict=True))
    tiers: list[list[str]] = []
    for label in labels:
        # NaN, a pair without an interval, is no difference.
        if not tiers or corrected[tiers[-1][0], label] <= ALPHA:
            tiers.append([])
        tiers[-1].append(label)
    neighbours = list(pairwise(labels))
    alike = sum(not corrected[pair] <= ALPHA for pair in neighbours)
    return TierList(tiers, len(neighbours), alike, len(pairs))


def build_tier_table(comparison: SystemComparison, found: TierList) -> ReportTable:
    """Return a line per system with its tier and its difference from the first of the tier.

    Args:
        comparison: computed results.
        found: tiers of its systems.
    """
    rows: list[list[TableCell | str]] = []
    for number, members in enumerate(found.tiers, 1):
        for label in members:
            score = comparison.scores[label, MEAN, SPLIT]
            cell = TableCell(f"{100 * score.value:.1f}", _format_bounds(score))
            gap = (
                "–"
                if label == members[0]
                else format_interval(_subtract(comparison, label, members[0]))
            )
            rows.append([str(number), label, cell, gap])
    return make_table(
        "Tiers",
        ["tier", "system", "mean score", "minus the first of its tier"],
        rows,
        f"{found.describe()} Sorted by mean score. A tier begins at the first system that differs "
        "significantly from the first of the tier above (5 %, Holm's correction over "
        f"{found.pairs} pairs). Systems of one tier are not shown to be equal."
        f"{_describe_runs(comparison)}",
        collapsed=False,
    )


def build_pairing_table(comparison: SystemComparison) -> ReportTable:
    """Return paired differences beside those of a test that ignores that the rows are the same.

    The unpaired interval is that of the comparator of lm-evaluation-harness: the difference of two
    means with the root of the sum of both squared standard errors.

    Args:
        comparison: computed results; each system has one run.
    """
    rows: list[list[TableCell | str]] = []
    for test in comparison.tests:
        if test.task == MEAN:
            continue
        loose = _compare_unpaired(comparison, test.system, test.against, test.task)
        tight = test.difference
        ratio = (loose.std_error / tight.std_error) ** 2 if tight.std_error > 0 else np.nan
        worth = "–" if np.isnan(ratio) else f"{ratio:.1f}"
        pair = f"{test.system} − {test.against}"
        rows.append([pair, test.task, format_interval(tight), format_interval(loose), worth])
    return make_table(
        "What the pairing of rows is worth",
        ["systems", "task", "paired by unit", "unpaired", "rows saved, factor"],
        rows,
        "Points with 95 % intervals. Unpaired: both systems' rows as independent samples, with "
        "the normal distribution, as the comparator of lm-evaluation-harness tests them. Factor: "
        "how many times the rows an unpaired test needs for an equal interval; below 1 the rows of "
        "a unit resemble each other, which the unpaired test ignores.",
    )


def _subtract(comparison: SystemComparison, own: str, other: str) -> ScoreEstimate:
    return statistics.estimate_mean(*comparison.subtract_scores(own, other, MEAN))


def _compare_unpaired(
    comparison: SystemComparison, own: str, other: str, task: str
) -> ScoreEstimate:
    """Return a difference with the standard errors of both systems' rows as independent."""
    means, variances, count = [], [], 0
    for label in (own, other):
        rows = comparison.systems[label][0].outcomes[task, SPLIT]
        score = comparison.metrics[task].score
        values = np.array([score(float(x)) for x in rows.numerator / rows.denominator])
        means.append(float(values.mean()))
        variances.append(float(values.var(ddof=1)) / len(values))
        count = len(values)
    value, error = means[0] - means[1], float(np.sqrt(sum(variances)))
    half = NORMAL_QUANTILE * error
    return ScoreEstimate(value, value - half, value + half, error, 2.0 * (count - 1), 1)


def _format_bounds(score: ScoreEstimate) -> str:
    return "" if np.isnan(score.low) else f"{100 * score.low:.1f} to {100 * score.high:.1f}"


def _describe_runs(comparison: SystemComparison) -> str:
    """Return what few runs do not show; "" for enough."""
    if comparison.seeds >= MIN_SEEDS:
        return ""
    return (
        " Fewer than three runs of a system: tiers are about these runs, not about training again."
    )
