"""The tables of docs/reliability.md, from the CSVs of the chaos tests."""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from lab import RESULTS
from tests.chaos import sweep_runs
from tests.chaos.__main__ import FAULTS, LATER_FAULTS
from tests.chaos.result_rows import read
from tools.docs.page_marks import put

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
HEAD = (
    "| fault | runs: nodes/Ray/no Ray | resumes alone | steps repeated, max "
    "| recovery in s: median (max) |\n"
    "|---|---:|---|---:|---:|"
)


def table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: a line a fault, and what it stands on."""
    lines, losses = [HEAD], []
    for fault in (*FAULTS, *LATER_FAULTS, *sweep_runs.FAULTS):
        mine = [row for row in rows if row["fault"] == fault]
        if mine:
            lines.append(_line(fault, mine))
            losses += [f"{lost} ({fault})" for lost in _losses(mine)]
    equal = sum(row["equal_weights"] == "True" for row in rows)
    machines = ", ".join(sorted({row["machine"] for row in rows}))
    loads = [float(row["load"]) for row in rows]
    dates = sorted({row["date"] for row in rows})
    lines += [
        "",
        f"{len(rows)} runs, {equal} of them equal to the undisturbed run; {machines}, load "
        f"{min(loads):.0f} to {max(loads):.0f}, {' and '.join(dates)}. "
        f"Lost: {', '.join(losses) or 'nothing'}.",
    ]
    return "\n".join(lines)


def crash_table(rows: Sequence[dict[str, str]]) -> str:
    """Return Markdown with a line per command that was killed at its file-system events."""
    lines = ["| command | events | kills | violations |", "|---|---:|---:|---:|"]
    for command in dict.fromkeys(row["command"] for row in rows):
        mine = [row for row in rows if row["command"] == command]
        events = max(int(row["events"]) for row in mine)
        killed = [row for row in mine if row["exits"].startswith("-9")]
        bad = sum(bool(row["violations"]) for row in mine)
        lines.append(f"| `{command}` | {events:,} | {len(killed):,} | {bad} |")
    dates = sorted({row["date"] for row in rows})
    return "\n".join([*lines, "", f"{' and '.join(dates)}."])


def _line(fault: str, rows: Sequence[dict[str, str]]) -> str:
    launchers = [row["launcher"] for row in rows]
    with_ray = launchers.count("ray") + launchers.count(sweep_runs.LAUNCHER)
    tried = f"{launchers.count('hosts')}/{with_ray}/{launchers.count('ranks')}"
    again = max(int(row["lost_steps"]) for row in rows)
    seconds = [float(row["recovery_seconds"]) for row in rows]
    took = f"{statistics.median(seconds):.0f} ({max(seconds):.0f})"
    alone = {"yes" if row["recovered"] == "by itself" else "no" for row in rows}
    return f"| {fault} | {tried} | {'/'.join(sorted(alone))} | {again} | {took} |"


def _losses(rows: Sequence[dict[str, str]]) -> list[str]:
    """Return the losses of a fault's runs, in words."""
    lost = max(int(row["lost_bytes"]) for row in rows)
    missing = sum(int(row["lost_metrics"]) for row in rows)
    doubled = sum(int(row["doubled_metrics"]) for row in rows)
    unequal = sum(row["equal_weights"] != "True" for row in rows)
    counts = {
        f"an unusable checkpoint of {lost:,} bytes": lost,
        f"{missing} metrics": missing,
        f"{doubled} metrics doubled": doubled,
        f"weights of {unequal} runs": unequal,
    }
    return [words for words, count in counts.items() if count]


def main(argv: list[str] | None = None) -> int:
    """Put the tables in their places in the page."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs.chaos_table", description=__doc__)
    parser.add_argument("csv", nargs="?", type=Path, help="by default the newest committed one")
    options = parser.parse_args(argv)
    path = options.csv or max(RESULTS.glob("*-chaos.csv"))
    put(PAGE, "chaos", table(read(path)))
    crashes = sorted(RESULTS.glob("*-crash-points.csv"))
    if crashes:
        put(PAGE, "crash-points", crash_table(read(crashes[-1])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
