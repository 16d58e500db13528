"""Tables of simulated studies in docs/comparison.md, from the newest CSV of each simulation.

``python -m tools.docs.coverage_tables`` simulates nothing.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.measure import read_csv_rows
from lab import RESULTS
from lab.study_coverage import format_markdown
from tools.docs.page_marks import put

PAGE = Path(__file__).resolve().parents[2] / "docs" / "comparison.md"
#: Marks of a table -> parts of designs that the page omits, because a harder one is beside them.
TABLES = {
    "study-coverage": ("by unit, equal spreads",),
    "fold-coverage": ("spreads", "effect 0"),
    "difference-coverage": ("equal spreads", " 5 seeds"),
}


def find_newest(name: str) -> Path:
    """Return the newest CSV of a table, whose name ends with that of its marks."""
    return max(RESULTS.glob(f"*-{name}.csv"))


def render_table(path: Path) -> str:
    """Return the table of a CSV, the number of studies and the date.

    Args:
        path: CSV, whose name begins with the date.
    """
    omitted = next(parts for name, parts in TABLES.items() if path.stem.endswith(name))
    rows = [
        row for row in read_csv_rows(path) if not any(part in row["design"] for part in omitted)
    ]
    studies = int(rows[0]["studies"])
    note = f"{studies:,} studies per design, {path.name[:10]}, `{path.name}`."
    return f"{format_markdown(rows)}\n\n{note}"


def main(argv: list[str] | None = None) -> int:
    """Write all tables into the page."""
    argparse.ArgumentParser(
        prog="python -m tools.docs.coverage_tables", description=__doc__
    ).parse_args(argv)
    for name in TABLES:
        put(PAGE, name, render_table(find_newest(name)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
