"""Tables of the newest merge demonstration, for docs/results/merge.md:
``python -m tools.docs.merge_tables``.

Reads ``scores.csv`` and ``summary.csv`` of ``lab/results/<date>-merge``, which
``python -m lab.merge_demonstration`` writes. Figures are copied, none is computed here.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import read_csv_rows
from lab import RESULTS
from lab.merge_demonstration import BASE, MERGED, SCORES, SUMMARY
from pipelines.training.evaluation.tables import format_metric, metric_label
from skillnet_evidence.cells import markdown_table
from tools.docs.page_marks import put

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "merge.md"

TextRows = Sequence[dict[str, str]]


def newest_merge(results: Path = RESULTS) -> Path | None:
    """Return the folder of the newest demonstration; None without one.

    Args:
        results: folder of all kept results.
    """
    return max((path.parent for path in results.glob(f"*-merge/{SUMMARY}")), default=None)


def merge_page_text(folder: Path) -> str:
    """Return the text between the marks of the page.

    Args:
        folder: directory of a demonstration.
    """
    scores, summary = read_csv_rows(folder / SCORES), read_csv_rows(folder / SUMMARY)
    old = {row["task"] for row in scores if row["arm"] == BASE}
    first = scores[0]
    seeds = list(dict.fromkeys(row["seed"] for row in scores))
    return "\n\n".join(
        [
            f"{first['steps']} steps per new task, growth seeds {', '.join(seeds)}, one base "
            f"(digest {first['base']}); CPU, {first['machine']}, {first['date'][:10]}.",
            _describe_outputs(scores),
            "**The new tasks.** Mean over seeds (95 % interval over seeds and held-out units), and "
            "`merged` minus the row, in points; *equal* is the same outcome of every row:",
            _tabulate_new(summary, old),
            _tabulate_old(scores, old),
            f"Each seed: [{folder.name}](../../lab/results/{folder.name}).",
        ]
    )


def _describe_outputs(scores: TextRows) -> str:
    """Return how many outputs of the parents the merged and the averaged models kept."""
    lines = []
    for arm, action in ((MERGED, "merging"), ("averaged", "averaging")):
        compared = [row for row in scores if row["arm"] == arm and row["is_identical"]]
        if not compared:
            continue
        kept = sum(row["is_identical"] == "True" for row in compared)
        count = sum(int(row["rows"]) for row in compared)
        lines.append(
            f"- After {action}, {kept} of {len(compared)} outputs (task, test split, seed) are "
            f"identical to the bit to those of the parents; {count:,} test rows were compared."
        )
    return "\n".join(lines)


def _tabulate_new(summary: TextRows, old: set[str]) -> str:
    kept = [row for row in summary if row["task"] not in old and row["split"] == "test"]
    tasks = list(dict.fromkeys((row["task"], row["metric"]) for row in kept))
    cells = []
    for arm in dict.fromkeys(row["arm"] for row in kept):
        line = [f"**{arm}**" if arm == MERGED else arm, ""]
        for task, _ in tasks:
            row = next((r for r in kept if (r["arm"], r["task"]) == (arm, task)), None)
            if row is None:
                line += ["–", "–"]
                continue
            line[1] = row["seeds"]
            line += [_format_mean(row), _format_change(row)]
        cells.append(line)
    head = ["arm", "seeds"]
    for task, metric in tasks:
        head += [f"`{task}`, {metric_label(metric)}", "merged minus this"]
    return markdown_table(head, cells)


def _tabulate_old(scores: TextRows, old: set[str]) -> str:
    """Return the scores of arms that change a task of the base, and name the other arms."""
    kept = [row for row in scores if row["task"] in old]
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in kept) if arm != BASE]
    cells = []
    changed = set()
    for task, split, metric in dict.fromkeys((r["task"], r["split"], r["metric"]) for r in kept):
        values: dict[str, dict[str, float]] = {}
        for row in kept:
            if (row["task"], row["split"]) == (task, split):
                values.setdefault(row["arm"], {})[row["seed"]] = float(row["value"])
        where = "" if split == "test" else f", {split.removeprefix('test_').replace('_', ' ')}"
        line = [f"`{task}`{where}, {metric_label(metric)}", _mean(metric, values[BASE])]
        for arm in arms:
            line.append(_mean(metric, values[arm]))
            if any(values[BASE][seed] != value for seed, value in values[arm].items()):
                changed.add(arm)
        cells.append(line)
    head = ["task and metric", BASE, *arms]
    places = [n for n, name in enumerate(head) if name not in arms or name in changed]
    lines = [[line[n] for n in places] for line in cells]
    same = ", ".join(f"`{arm}`" for arm in arms if arm not in changed)
    return (
        f"**The tasks of the base.** Mean over seeds. These arms have the score of the base in "
        f"every seed: {same or 'none'}.\n\n{markdown_table([head[n] for n in places], lines)}"
    )


def _mean(metric: str, by_seed: dict[str, float]) -> str:
    return format_metric(metric, sum(by_seed.values()) / len(by_seed))


def _format_mean(row: dict[str, str]) -> str:
    value, low, high = (100 * float(row[key]) for key in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def _format_change(row: dict[str, str]) -> str:
    if not row.get("difference"):
        return "" if row["arm"] == MERGED else "equal"
    names = ("difference", "difference_low", "difference_high")
    value, low, high = (100 * float(row[key]) for key in names)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def main(argv: list[str] | None = None) -> int:
    """Put the tables of the newest demonstration into the page."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs.merge_tables", description=__doc__)
    parser.parse_args(argv)
    folder = newest_merge()
    if folder is None:
        parser.error("no demonstration is kept; run python -m lab.merge_demonstration")
    put(PAGE, "merge", merge_page_text(folder))
    print(f"{PAGE.name} tells {folder.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
