"""Draw the figure of a study for the documents: ``python -m tools.docs.draw_study FOLDER``.

Reads ``claims.json``, ``tests.csv`` and ``summary.csv`` of a study, as ``skillnet compare`` wrote
them, and draws what the report shows: paired differences beside mean score against operations.
Without ``--output`` the figure is written beside these files. ``--notice`` puts a text above it.
``--scale`` draws score and cost against the number of tasks in its place.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import read_csv_rows
from skillnet_evidence.figures import draw_joint_evidence
from skillnet_evidence.plot_kit import encode_svg
from skillnet_evidence.rows import collect_points, group_claims, group_tests
from skillnet_evidence.scale import collect_scale, draw_scale_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Name of the figure beside the files of its study.
FIGURE = "evidence.svg"


def draw_study_figure(folder: Path, notice: str = "") -> "Figure":
    """Return the figure of a kept study.

    Args:
        folder: the files of a study.
        notice: text above the figure; "" without one.

    Raises:
        ValueError: the files have no differences, or no scores with operations.
    """
    claims = json.loads((folder / "claims.json").read_text(encoding="utf-8"))
    groups = group_claims(claims) or group_tests(read_csv_rows(folder / "tests.csv"))
    summary = read_csv_rows(folder / "summary.csv")
    points = collect_points(summary)
    if not groups or not points:
        raise ValueError(
            f"{folder}: no differences or no scores with operations. Name the directory of a study "
            "with at least two systems."
        )
    return draw_joint_evidence(groups, points, read_reference(summary), notice)


def draw_study_scale(folder: Path) -> "Figure":
    """Return score and cost against the number of tasks of a kept study.

    Args:
        folder: the files of a study.

    Raises:
        ValueError: the study has no systems whose names differ in their number of tasks.
    """
    points = collect_scale(read_csv_rows(folder / "summary.csv"))
    if not points:
        raise ValueError(
            f"{folder}: no systems such as skills-5 and skills-22 with unequal tasks. Name the "
            "directory of a study that has them."
        )
    return draw_scale_figure(points)


def read_reference(summary: Sequence[dict[str, str]]) -> float | None:
    """Return the mean score of the simple references in points; None if it is not kept.

    Args:
        summary: rows of ``summary.csv``.
    """
    from skillnet_evidence.comparison import MEAN
    from skillnet_evidence.rows import REFERENCE_SYSTEM

    for row in summary:
        if (row["system"], row["task"]) == (REFERENCE_SYSTEM, MEAN):
            return 100 * float(row["score"])
    return None


def main(argv: list[str] | None = None) -> int:
    """Write the figure."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs.draw_study", description=__doc__)
    parser.add_argument("folder", type=Path, help="the files of a study")
    parser.add_argument("--output", type=Path, help="by default evidence.svg beside the files")
    parser.add_argument("--notice", default="", help="text above the figure")
    parser.add_argument("--scale", action="store_true", help="against the number of tasks")
    options = parser.parse_args(argv)
    path = options.output or options.folder / FIGURE
    figure = (
        draw_study_scale(options.folder)
        if options.scale
        else draw_study_figure(options.folder, options.notice)
    )
    path.write_text(encode_svg(figure), encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
