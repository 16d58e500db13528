"""Captions on the variance behind a report: that of seeds on one test split, or that of folds.

:mod:`skillnet_studies.analysis.statistics` has two models. The captions of the tables and figures
must name the one that made their intervals.
"""

from skillnet_studies.analysis.comparison import MIN_SEEDS, SystemComparison
from skillnet_studies.analysis.statistics import MIN_OWN_SEEDS


def name_sources(comparison: SystemComparison) -> str:
    """Return what the intervals of a comparison cover."""
    return "replicates" if comparison.has_folds else "seeds and held-out units"


def describe_means(comparison: SystemComparison) -> str:
    """Return the sentence about means of scores and their intervals."""
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


def describe_pairing(comparison: SystemComparison) -> str:
    """Return by what a difference of two systems is paired."""
    return "paired by replicate" if comparison.has_folds else "paired by unit"


def describe_tests(comparison: SystemComparison) -> str:
    """Return the sentence about the tests of differences, without the correction."""
    pairing = f"Difference of scores, {describe_pairing(comparison)}; Student's t with"
    if comparison.has_folds:
        return (
            f"{pairing} the variance corrected for shared training rows (Nadeau & Bengio 2003) and "
            "one degree of freedom less than replicates"
        )
    return (
        f"{pairing} the variance over seeds pooled over systems and Satterthwaite's degrees of "
        "freedom"
    )


def describe_false_marks(comparison: SystemComparison) -> str:
    """Return how often simulated reports of folds have a false mark; "" without folds."""
    if not comparison.has_folds:
        return ""
    return (
        " In simulations with the residuals of the final study's folds, 6 to 9 % of the reports of "
        "equal systems have a mark."
    )


def warn_about_few(comparison: SystemComparison) -> str:
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
