"""Several seeds of one run as a table: ``python -m benchmarks.seeds runs/seed-0 runs/seed-1 …``.

Reads what ``skillnet quickstart --seed N --name seed-N`` left in each run's folder, writes all
of it as one dated CSV, and prints a table of means with 95 % intervals over seeds (Student's t).
With ``--readme FILE`` the table takes the place between the file's results marks.
"""

import argparse
import csv
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.marks import put
from pipelines.reporting import words_of

RESULTS = Path(__file__).parent / "results"

#: (task, split, metric) of the table's lines.
LINES = (
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

Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    """Rows of a CSV; an empty list if there is none."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean over seeds, by Student's t; the value itself if there is one."""
    if len(values) < 2:
        return values[0], values[0]
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values) - half), float(np.mean(values) + half)


def table(rows: Rows) -> str:
    """The lines of ``LINES`` as Markdown."""
    found: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        key = (row["task"], row["split"], row["metric"])
        found[key][row["system"]].append(float(row["value"]))
    lines = [
        "| task | metric | chance | simple reference | SkillNet |",
        "|---|---|---:|---:|---:|",
    ]
    for task, split, metric in LINES:
        systems = found[task, split, metric]
        if not systems.get("skillnet"):
            continue
        beside = [
            f"{100 * systems[name][0]:.1f}" if systems.get(name) else "–"
            for name in ("chance", "reference")
        ]
        values = systems["skillnet"]
        low, high = interval(values)
        where = "" if split == "test" else f", {split.removeprefix('test_').replace('_', ' ')}"
        arrow = "↓" if metric == "token_error_rate" else "↑"
        lines.append(
            f"| `{task}` | {words_of(metric)}{where} {arrow} | {beside[0]} | {beside[1]} | "
            f"**{100 * np.mean(values):.1f}** ({100 * low:.1f} to {100 * high:.1f}) |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.seeds``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--readme", type=Path, help="file whose results are replaced")
    options = parser.parse_args(argv)
    rows: Rows = []
    references: Rows = []
    seeds = []
    for run in options.runs:
        own = read(run / "evaluation.csv")
        if not own:
            parser.error(f"{run} holds no evaluation.csv: is the run finished?")
        seeds.append(own[0]["seed"])
        rows += own
        references = references or read(run / "references.csv")
    path = RESULTS / f"{date.today()}-quickstart.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(references + rows)
    made = table(references + rows)
    first, where = rows[0], f"benchmarks/results/{path.name}"
    text = (
        f"{made}\n\nPer cent on held-out data: mean of seeds {', '.join(seeds)} with the 95 % "
        f"interval over seeds (Student's t). {first['steps']} steps of `configs/quickstart.yaml`, "
        f"{first['machine']}, {first['date'][:10]}. Made by `skillnet quickstart --seed N --name "
        "seed-N` and `python -m benchmarks.seeds runs/seed-*`; every figure, with its interval "
        f"over test rows, is in [{path.name}]({where})."
    )
    print(text)
    if options.readme:
        put(options.readme, "results", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
