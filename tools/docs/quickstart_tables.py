"""Tables of the quickstart over several seeds, for the README and docs/results/quickstart.md.

``python -m tools.docs.quickstart_tables runs/seed-0 runs/seed-1 …`` reads the runs that
``skillnet quickstart --seed N --name seed-N`` left, writes their figures as one dated CSV, and
writes both tables between the results marks of the two pages. ``--csv FILE`` writes the pages again
from a committed CSV.
"""

import argparse
import csv
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path

import numpy as np
from scipy import stats

from pipelines.evaluation.tables import metric_label
from tools.docs.page_marks import put

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
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
#: The README's five rows: the headline metric of each task.
README_ROWS = tuple(
    (task, "test", metric)
    for task, metric in (
        ("text_classification", "accuracy"),
        ("speech_recognition", "token_error_rate"),
        ("text_to_image", "recall_at_10"),
        ("text_to_video", "recall_at_10"),
        ("text_to_code", "recall_at_10"),
    )
)
#: Systems that are shown beside SkillNet, by their name in the CSV.
BASELINES = ("chance", "simple_baseline")

Rows = list[dict[str, str]]
RowKey = tuple[str, str, str]


def read_rows(path: Path) -> Rows:
    """Return the rows of a CSV; an empty list if the file does not exist."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def seed_interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean over seeds, by Student's t.

    Args:
        values: one figure per seed. Without any spread the interval is unknown, and its bounds NaN.
    """
    if np.ptp(values) == 0:
        return float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values) - half), float(np.mean(values) + half)


def result_table(rows: Rows, keys: tuple[RowKey, ...]) -> str:
    """Return a Markdown table with chance, the simple baseline and SkillNet, in per cent.

    Args:
        rows: of the CSV.
        keys: (task, split, metric) of the lines; a line without a SkillNet figure is left out.
    """
    found: dict[RowKey, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = (row["task"], row["split"], row["metric"])
        found[key][row["system"]].append(float(row["value"]))
    lines = [
        "| task and metric | chance | simple baseline | SkillNet |",
        "|---|---:|---:|---:|",
    ]
    for task, split, metric in keys:
        systems = found[task, split, metric]
        if not systems.get("skillnet"):
            continue
        beside = [
            f"{100 * systems[name][0]:.1f}" if systems.get(name) else "–" for name in BASELINES
        ]
        values = systems["skillnet"]
        # All metrics of the table are shares; Student's t does not know their bounds.
        low, high = np.clip(seed_interval(values), 0, 1)
        interval = "" if np.isnan(low) else f" ({100 * low:.1f}–{100 * high:.1f})"
        where = "" if split == "test" else f", {split.removeprefix('test_').replace('_', ' ')}"
        arrow = "↓" if metric == "token_error_rate" else "↑"
        lines.append(
            f"| {task.replace('_', ' ')}, {metric_label(metric)}{where} {arrow} | {beside[0]} | "
            f"{beside[1]} | **{100 * np.mean(values):.1f}**{interval} |"
        )
    return "\n".join(lines)


def readme_text(rows: Rows) -> str:
    """Return the text between the README's results marks."""
    seeds = list(dict.fromkeys(row["seed"] for row in rows if row["system"] == "skillnet"))
    return (
        f"{result_table(rows, README_ROWS)}\n\nPer cent on held-out data. SkillNet: mean of "
        f"{len(seeds)} seeds with the 95 % interval over seeds (Student's t, cut at 0 and 100)."
    )


def page_text(rows: Rows, csv_name: str) -> str:
    """Return the text between the results marks of docs/results/quickstart.md.

    Args:
        rows: of the CSV.
        csv_name: file name of that CSV below ``benchmarks/results``.
    """
    first = next(row for row in rows if row["system"] == "skillnet")
    seeds = list(dict.fromkeys(row["seed"] for row in rows if row["system"] == "skillnet"))
    return (
        f"{result_table(rows, FULL_ROWS)}\n\nPer cent on held-out data: mean of seeds "
        f"{', '.join(seeds)} with the 95 % interval over seeds (Student's t, cut at 0 and 100).\n"
        f"{first['steps']} steps of `configs/quickstart.yaml` on {first['machine']}, "
        f"{first['date'][:10]}.\n"
        f"All figures, with their intervals over test rows: `benchmarks/results/{csv_name}`."
    )


def main(argv: list[str] | None = None) -> int:
    """Write the CSV and the tables of both pages."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.docs.quickstart_tables", description=__doc__
    )
    parser.add_argument("runs", nargs="*", type=Path, help="directories of finished runs")
    parser.add_argument("--csv", type=Path, help="committed CSV to read instead of runs")
    options = parser.parse_args(argv)
    if bool(options.runs) == bool(options.csv):
        parser.error("give either directories of runs or --csv FILE")
    if options.csv:
        path, rows = options.csv, read_rows(options.csv)
    else:
        path = RESULTS / f"{date.today()}-quickstart.csv"
        baselines: Rows = []
        rows = []
        for run in options.runs:
            own = read_rows(run / "evaluation.csv")
            if not own:
                parser.error(f"{run}: no evaluation.csv. Wait until the run has finished.")
            rows += own
            baselines = baselines or read_rows(run / "simple_baselines.csv")
        rows = baselines + rows
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    put(README, "results", readme_text(rows))
    put(PAGE, "results", page_text(rows, path.name))
    print(result_table(rows, FULL_ROWS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
