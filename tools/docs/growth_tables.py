"""A finished growth among the results, and its tables in docs/growth.md:
``python -m tools.docs.growth_tables [runs/NAME]``.

Keeps the report of ``skillnet grow``, its configuration and the figures of all tasks below
``lab/results/<date>-growth/``; with them ``references.csv``, if ``skillnet evaluate
--output`` wrote the simple references there. Without a folder only the page is written again.
Figures are copied, none is computed here.
"""

import argparse
import json
import sys
from pathlib import Path

import yaml

from benchmarks.measure import read_csv_rows
from lab import RESULTS
from pipelines.training.evaluation import tables
from pipelines.training.growth.report import (
    GROWN,
    REPORT_JSON,
    TRAINING_LABELS,
    GrowthReport,
    TransferResult,
)
from skillnet_evidence.cells import markdown_table
from tools.docs.kept_results import keep
from tools.docs.page_marks import put

PAGE = Path(__file__).resolve().parents[2] / "docs" / "growth.md"
EVALUATION, REFERENCES = "evaluation.csv", "references.csv"
KEPT = (REPORT_JSON, "grow.yaml", EVALUATION)
BOUNDS = ("value", "low", "high")


def collect(folder: Path, results: Path = RESULTS) -> Path:
    """Keep the light files of a finished growth.

    Raises:
        ValueError: it has no report, or a file names a place of this machine.
    """
    if not (folder / REPORT_JSON).is_file():
        raise ValueError(f"{folder} is no finished growth: it has no {REPORT_JSON}")
    there = [name for name in (REFERENCES,) if (folder / name).is_file()]
    target = results / f"{read_csv_rows(folder / EVALUATION)[0]['date']}-growth"
    keep(folder, [*KEPT, *there], target)
    return target


def newest(results: Path = RESULTS) -> Path | None:
    """The folder that was kept last, or none."""
    return max((path.parent for path in results.glob(f"*-growth/{REPORT_JSON}")), default=None)


def text_of(folder: Path) -> str:
    """What stands between the page's marks."""
    growth = GrowthReport.from_dict(json.loads((folder / REPORT_JSON).read_text(encoding="utf-8")))
    first = read_csv_rows(folder / EVALUATION)[0]
    new = [each for each in growth.transfer_results if each.split == "test"]
    words = tables.metric_label(new[0].metric)
    lines = [
        f"| trained | {words} (95 % interval) | grown minus this, paired | trained parameters |",
        "|---|---|---|---:|",
        *(_line(each) for each in new),
        *_simple(folder / REFERENCES, growth.task, new[0].metric),
    ]
    same = sum(each.state == "same" for each in growth.files)
    changed = sum(each.state in ("changed", "gone") for each in growth.files)
    moved = sum(not each.is_unchanged for each in growth.tasks)
    tasks = len({each.task for each in growth.tasks})
    name = yaml.safe_load((folder / "grow.yaml").read_text(encoding="utf-8"))["name"]
    parts = [
        "```sh\nskillnet prepare --config prepare/stroke-counts\n"
        f"skillnet grow {growth.source} --config grow/stroke-count --name {name}\n"
        f"skillnet evaluate --model {name} --tasks {growth.task} "
        f"--output runs/{name}/{REFERENCES}\n```",
        f"{growth.steps} steps per model, seed {growth.seed}; {first['machine']}, {first['date']}. "
        f"The new task, `{growth.task}`, on the test split:",
        "\n".join(lines),
        "Effect on the old tasks:\n\n"
        f"- {same} old files have the same sha256, and {changed} differ.\n"
        f"- {moved} of {len(growth.tasks)} metrics of {tasks} tasks changed.\n"
        f"- {growth.rows_changed} of {growth.rows_compared:,} test rows changed their outcome.\n"
        "- The optimizer kept state only for "
        f"{' and '.join(f'`{name}`' for name in growth.optimizer_files)}.",
    ]
    everything = next(
        (each for each in new if each.system == "everything" and each.regressions), None
    )
    if everything is not None:
        head = ["task", "metric", "before and after growth", "after training everything"]
        metric_of = {e.task: e.metric for e in growth.tasks if e.metric in tables.PRIMARY_METRICS}
        cells = [
            [f"`{task}`", tables.metric_label(metric_of[task])]
            + [tables.format_metric(metric_of[task], value) for value in pair]
            for task, pair in everything.regressions.items()
        ]
        parts += [
            "If everything is trained, the old tasks change:",
            markdown_table(head, cells),
        ]
    parts.append(f"Files: [{folder.name}](../lab/results/{folder.name}).")
    return "\n\n".join(parts)


def _line(each: TransferResult) -> str:
    behind = ""
    if each.difference:
        value, low, high = (100 * x for x in each.difference)
        behind = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
    bold = "**" if each.system == GROWN else ""
    shown = tables.format_value_with_interval({k: getattr(each, k) for k in ("metric", *BOUNDS)})
    words = TRAINING_LABELS.get(each.system, each.system)
    return f"| {bold}{words}{bold} | {bold}{shown}{bold} | {behind} | {each.trained_params:,} |"


def _simple(path: Path, task: str, metric: str) -> list[str]:
    """Lines of chance and the simple references, where they were measured."""
    if not path.is_file():
        return []
    rows = [
        row
        for row in read_csv_rows(path)
        if row["system"] in tables.SYSTEM_LABELS
        and (row["task"], row["split"], row["metric"]) == (task, "test", metric)
    ]
    return [
        f"| *{tables.SYSTEM_LABELS[row['system']]}* | "
        + tables.format_value_with_interval(
            {"metric": metric} | {key: float(row[key]) for key in BOUNDS if row[key]}
        )
        + " | | |"
        for row in rows
    ]


def main(argv: list[str] | None = None) -> int:
    """Keep a growth, and put its tables in their place in the page."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs.growth_tables", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="of a finished growth")
    options = parser.parse_args(argv)
    folder = collect(options.folder) if options.folder else newest()
    if folder is None:
        parser.error("no growth is kept yet; give the folder of one")
    put(PAGE, "growth", text_of(folder))
    print(f"{PAGE.name} tells {folder.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
