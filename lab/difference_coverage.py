"""How often a difference of differences is right: ``python -m lab.difference_coverage``.

Equal systems answer the test sets of the headline study, or the folds of the final study. Each test
is about four systems: (one − other) − (third − fourth), whose truth is 0. The worlds and measures
are those of :mod:`lab.study_coverage` and :mod:`lab.fold_coverage`; "covers" is about the scores of
single systems, and the interval of the difference of differences fails to cover 0 as often as there
is a false alarm.
"""

from typing import Any

import numpy as np

from lab.fold_coverage import FoldDesign, draw_folded_study, read_folds, read_residuals
from lab.study_coverage import (
    StudyDesign,
    build_parser,
    draw_study,
    measure_studies,
    read_tasks,
    report_rows,
)

#: Systems of each test: each of eight is in two of them.
QUADRUPLES = ((0, 1, 2, 3), (4, 5, 6, 7), (0, 2, 4, 6), (1, 3, 5, 7))


def measure_quadruples(studies: int) -> list[dict[str, Any]]:
    """Return a row per design and task, as :func:`lab.study_coverage.measure_studies` does.

    Args:
        studies: simulated studies per design.
    """
    tasks, folds, residuals = read_tasks(), read_folds(), read_residuals()
    truths = {name: own.task for name, own in folds.items()}
    rows = []
    for count in (3, 5, 14):
        design, random = StudyDesign((count,) * 8), np.random.default_rng(0)
        drawn = (draw_study(tasks, design, random) for _ in range(studies))
        rows += measure_studies(drawn, tasks, QUADRUPLES, f"by unit, {count} seeds")
    for folded in (FoldDesign(0.0), FoldDesign(1.0), FoldDesign(1.0, has_residuals=True)):
        random = np.random.default_rng(0)
        made = (draw_folded_study(folds, folded, random, residuals) for _ in range(studies))
        rows += measure_studies(made, truths, QUADRUPLES, folded.name)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m lab.difference_coverage``."""
    options = build_parser("difference_coverage", __doc__, studies=400).parse_args(argv)
    return report_rows(measure_quadruples(options.studies), options.output)


if __name__ == "__main__":
    raise SystemExit(main())
