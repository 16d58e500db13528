"""Tables of simulated studies in docs/comparison.md, from the newest CSV of each simulation.

``python -m tools.docs.coverage_tables`` simulates nothing.
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.measure import RESULTS
from tools.docs.page_marks import put

PAGE = Path(__file__).resolve().parents[2] / "docs" / "comparison.md"
#: Marks of a table -> end of the names of its CSVs.
TABLES = {"study-coverage": "-study-coverage.csv", "fold-coverage": "-fold-coverage.csv"}
TASKS = {
    "text_classification": "text",
    "speech_recognition": "speech",
    "text_to_image": "image",
    "text_to_video": "video",
    "text_to_code": "code",
    "mean": "mean",
}
#: Column of the CSV -> words for it.
MEASURES = {
    "coverage": "covers",
    "false_alarms": "false alarms",
    "non_inferiority": "passes at the margin",
}


def find_newest(name: str) -> Path:
    """Return the newest CSV of a table."""
    return max(RESULTS.glob(f"*{TABLES[name]}"))


def read_designs(path: Path) -> dict[str, list[dict[str, str]]]:
    """Return design -> its rows, one per task."""
    designs: dict[str, list[dict[str, str]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            designs.setdefault(row["design"], []).append(row)
    return designs


def render_table(path: Path) -> str:
    """Return Markdown with three lines per design, and the number of studies and the date.

    Args:
        path: CSV, whose name begins with the date.
    """
    designs = read_designs(path)
    first = next(iter(designs.values()))[0]
    lines = [
        f"| design | measure | {' | '.join(TASKS.values())} | all {first['tests']} |",
        f"|---|---|{'---:|' * (len(TASKS) + 1)}",
    ]
    for design, rows in designs.items():
        lines += _list_lines(design, rows)
    note = f"{int(first['studies']):,} studies per design, {path.name[:10]}, `{path.name}`."
    return "\n".join([*lines, "", note])


def _list_lines(design: str, rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the lines of one design: the tasks by measure, and the error of all tests."""
    of = {row["task"]: row for row in rows}
    lines = []
    for measure, words in MEASURES.items():
        cells = [f"{float(of[task][measure]):.1f}" for task in TASKS]
        error = float(rows[0]["family_wise_error"])
        last = f"{error:.1f}" if measure == "false_alarms" else ""
        lines.append(f"| {' | '.join([design, words, *cells, last])} |")
        design = ""
    return lines


def main(argv: list[str] | None = None) -> int:
    """Write both tables into the page."""
    argparse.ArgumentParser(
        prog="python -m tools.docs.coverage_tables", description=__doc__
    ).parse_args(argv)
    for name in TABLES:
        put(PAGE, name, render_table(find_newest(name)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
