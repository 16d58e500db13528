"""Table of the quickstart over several seeds, for docs/results/quickstart.md.

``python -m tools.docs.quickstart_tables runs/seed-0 runs/seed-1 …`` reads the runs that
``skillnet quickstart --seed N --name seed-N`` left, writes their figures as one dated CSV, and
writes a table between the results marks of the page. ``--csv FILE`` writes the page again from a
committed CSV.

Each figure of a run has its interval over held-out units in the CSV. :func:`combine_intervals`
joins them with the variation over seeds.
"""

import argparse
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path
from statistics import fmean

import numpy as np
from scipy import stats

from benchmarks.measure import read_csv_rows
from pipelines.training.evaluation.tables import metric_label
from skillnet_platform.tables import write_csv
from tools.docs.page_marks import put

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "lab" / "results"
PAGE = ROOT / "docs" / "results" / "quickstart.md"

#: (task, split, metric) of the rows of the full table.
FULL_ROWS = (
    ("text_classification", "test", "accuracy"),
    ("text_classification", "test", "macro_f1"),
    ("speech_recognition", "test", "token_error_rate"),
    ("speech_recognition", "test", "exact_rate"),
    ("text_to_image", "test", "recall_at_1"),
    ("text_to_image", "test", "recall_at_10"),
    ("text_to_image", "test_unseen_concept", "recall_at_10"),
    ("text_to_video", "test", "recall_at_1"),
    ("text_to_video", "test", "recall_at_10"),
    ("text_to_code", "test", "recall_at_1"),
    ("text_to_code", "test", "recall_at_10"),
    ("text_to_code", "test_unseen_package", "recall_at_10"),
)
#: What the intervals cover, and what bold figures say.
SOURCES = "over seeds and held-out units"
BOLD = "Bold: the references lie outside of the interval."
#: Systems that are shown beside SkillNet, by their name in the CSV.
BASELINES = ("chance", "simple_baseline")

Rows = list[dict[str, str]]
RowKey = tuple[str, str, str]


def seed_interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean over seeds, by Student's t.

    Args:
        values: one figure per seed. Without any spread the interval is unknown, and its bounds NaN.
    """
    if np.ptp(values) == 0:
        return float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values) - half), float(np.mean(values) + half)


def combine_intervals(rows: Rows) -> tuple[float, float]:
    """Return the 95 % interval of a mean over seeds and held-out units.

    The distances of both intervals to their means are added in squares (source: Zou & Donner 2008).
    The interval over units of one run contains noise that the mean over runs has less of, so the
    result is cautious. Bounds are NaN if a run has no interval over its units, or with one seed.

    Args:
        rows: records of the CSV, one figure per seed with its interval over units. All are shares.
    """
    values, lows, highs = (
        np.array([float(row[key] or "nan") for row in rows]) for key in ("value", "low", "high")
    )
    if len(rows) < 2:
        return float("nan"), float("nan")
    own = seed_interval(list(values))
    # Equal figures have no variance over seeds.
    half = 0.0 if np.isnan(own[0]) else (own[1] - own[0]) / 2
    mean = values.mean()
    low = mean - np.hypot((values - lows).mean(), half)
    high = mean + np.hypot((highs - values).mean(), half)
    return float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1))


def result_table(rows: Rows, keys: tuple[RowKey, ...]) -> str:
    """Return a Markdown table with chance, the simple baseline and SkillNet, in per cent.

    Args:
        rows: parsed lines of the CSV.
        keys: (task, split, metric) of the lines; a line without a SkillNet figure is left out.
    """
    found: dict[RowKey, dict[str, Rows]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = (row["task"], row["split"], row["metric"])
        found[key][row["system"]].append(row)
    lines = [
        "| task and metric | chance | simple baseline | SkillNet |",
        "|---|---:|---:|---:|",
    ]
    for task, split, metric in keys:
        systems = found[task, split, metric]
        if not systems.get("skillnet"):
            continue
        others = [float(own[0]["value"]) for name in BASELINES if (own := systems.get(name))]
        beside = [
            f"{100 * float(systems[name][0]['value']):.1f}" if systems.get(name) else "–"
            for name in BASELINES
        ]
        mean = fmean(float(row["value"]) for row in systems["skillnet"])
        low, high = combine_intervals(systems["skillnet"])
        interval = "" if np.isnan(low) else f" ({100 * low:.1f}–{100 * high:.1f})"
        # Less is better of an error. Without an interval no lead is shown.
        is_error = metric == "token_error_rate"
        is_ahead = all(high < other if is_error else low > other for other in others)
        figure = f"**{100 * mean:.1f}**" if others and is_ahead else f"{100 * mean:.1f}"
        where = "" if split == "test" else f", {split.removeprefix('test_').replace('_', ' ')}"
        arrow = "↓" if is_error else "↑"
        lines.append(
            f"| {task.replace('_', ' ')}, {metric_label(metric)}{where} {arrow} | {beside[0]} | "
            f"{beside[1]} | {figure}{interval} |"
        )
    return "\n".join(lines)


def page_text(rows: Rows, csv_name: str) -> str:
    """Return the text between the results marks of docs/results/quickstart.md.

    Args:
        rows: parsed lines of the CSV.
        csv_name: file name of that CSV below ``benchmarks/results``.
    """
    first = next(row for row in rows if row["system"] == "skillnet")
    seeds = list(dict.fromkeys(row["seed"] for row in rows if row["system"] == "skillnet"))
    return (
        f"{result_table(rows, FULL_ROWS)}\n\nPer cent on held-out data: mean of seeds "
        f"{', '.join(seeds)} with the 95 % interval {SOURCES}. {BOLD}\n"
        f"{first['steps']} steps of `configs/quickstart.yaml` on {first['machine']}, "
        f"{first['date'][:10]}.\n"
        "All figures, each run with its intervals over held-out units: "
        f"`lab/results/{csv_name}`."
    )


def main(argv: list[str] | None = None) -> int:
    """Write the CSV and the table of the page."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.docs.quickstart_tables", description=__doc__
    )
    parser.add_argument("runs", nargs="*", type=Path, help="directories of finished runs")
    parser.add_argument("--csv", type=Path, help="committed CSV to read instead of runs")
    options = parser.parse_args(argv)
    if bool(options.runs) == bool(options.csv):
        parser.error("give either directories of runs or --csv FILE")
    if options.csv:
        path, rows = options.csv, read_csv_rows(options.csv)
    else:
        path = RESULTS / f"{date.today()}-quickstart.csv"
        baselines: Rows = []
        rows = []
        for run in options.runs:
            own = read_csv_rows(run / "evaluation.csv")
            if not own:
                parser.error(f"{run}: no evaluation.csv. Wait until the run has finished.")
            rows += own
            baselines = baselines or read_csv_rows(run / "simple_baselines.csv")
        rows = baselines + rows
        write_csv(path, rows)
    put(PAGE, "results", page_text(rows, path.name))
    print(result_table(rows, FULL_ROWS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
