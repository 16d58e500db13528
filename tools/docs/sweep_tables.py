"""Finished sweeps among the results, and their tables in docs/sweeps.md:
``python -m tools.docs.sweep_tables [runs/NAME]``.

Keeps what is light of the sweep's folder below ``lab/results/<date>-sweep-<name>/``: trials,
configuration. Without a folder only the page is written again, which has
the newest of each name. What the tables say is computed from the kept ``trials.csv`` alone.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from benchmarks.measure import read_csv_rows
from lab import RESULTS
from skillnet_evidence.effects import ScoredTrial, build_effects_table, estimate_effects
from skillnet_platform.tables import write_csv
from tools.docs.kept_results import keep
from tools.docs.page_marks import put

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sweeps.md"
TRIALS = "trials.csv"
KEPT = ("sweep.yaml", TRIALS)
#: Columns of a trial that only its machine can follow.
PLACES = ("folder", "log", "run_id")

Rows = Sequence[dict[str, str]]


def collect(folder: Path, results: Path = RESULTS) -> Path:
    """Keep the light files of a finished sweep.

    Raises:
        ValueError: the sweep has not ended, or a file names a place of this machine.
    """
    if not (folder / "result.json").is_file():
        raise ValueError(f"{folder} is no finished sweep: it has no result.json")
    rows = read_csv_rows(folder / TRIALS)
    done = [row["name"] for row in rows if row["status"] == "finished"]
    measured = [read_csv_rows(folder / "trials" / name / "evaluation.csv")[0] for name in done]
    last = max(measured, key=lambda row: row["date"])
    target = results / f"{last['date']}-sweep-{folder.name}"
    keep(folder, KEPT, target)
    reported = {"date": last["date"], "machine": last["machine"]}
    kept = read_csv_rows(target / TRIALS)
    light = [{k: v for k, v in row.items() if k not in PLACES} | reported for row in kept]
    write_csv(target / TRIALS, light)
    return target


def newest(results: Path = RESULTS) -> dict[str, Path]:
    """Name of a sweep -> its folder that was kept last."""
    found = (path.parent for path in results.glob(f"*-sweep-*/{TRIALS}"))
    # Of one name the last stays, and folders begin with their date.
    return dict(sorted((_name(folder), folder) for folder in found))


def describe_scores(rows: Rows) -> str:
    """Return the lowest and the highest mean score of a configuration, in per cent.

    Args:
        rows: records of the trials; those that did not finish do not count.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["status"] == "finished":
            groups[row["group"]].append(100 * float(row["score"]))
    means = [fmean(scores) for scores in groups.values()]
    return f"{len(means)} configurations score {min(means):.1f} to {max(means):.1f} %"


def effects(rows: Rows, keys: Sequence[str]) -> str:
    """Markdown: a line for each value of a setting, as ``skillnet sweep`` prints it."""
    trials = [
        ScoredTrial(row["group"], int(row["seed"]), row, float(row["score"]))
        for row in rows
        if row["status"] == "finished"
    ]
    columns, cells, _ = build_effects_table(estimate_effects(trials, keys))
    cells = [[_short(line[0]), *line[1:]] for line in cells]
    lines = [f"| {' | '.join(columns)} |", "|---|---|---:|---:|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(line)} |" for line in cells)])


def page_text(results: Path = RESULTS) -> str:
    """What stands between the page's marks."""
    parts = [f"### {name}\n\n{text_of(folder)}" for name, folder in newest(results).items()]
    return "\n\n".join(parts) or "No result is kept yet."


def text_of(folder: Path) -> str:
    """The tables of a sweep that was kept."""
    rows = read_csv_rows(folder / TRIALS)
    sweep: dict[str, Any] = yaml.safe_load((folder / "sweep.yaml").read_text(encoding="utf-8"))
    run = sweep["run"]
    ended = [row["status"] for row in rows]
    minutes = sum(float(row["seconds"] or 0) for row in rows) / 60
    counts = ", ".join(f"{ended.count(each)} {each}" for each in dict.fromkeys(ended))
    model, space, adjusted = run["model"], list(sweep["space"]), sweep["fixed_cost"]["adjust"]
    held = f", {adjusted} adjusted to equal cost" if adjusted else ""
    return (
        f"{len(rows)} trials ({counts}) of {run['training']['steps']:,} steps, seeds "
        f"{', '.join(map(str, sweep['seeds']))}; width {model['dim']}, {model['num_layers']} layers"
        f"{held}; {minutes:.0f} minutes of training in "
        f"total, {rows[0]['machine']}, {rows[0]['date']} "
        f"([trials](../lab/results/{folder.name})). {describe_scores(rows)} on the validation "
        f"splits. Effect of each setting, fitted over all finished trials:\n\n"
        f"{effects(rows, space)}"
    )


def _name(folder: Path) -> str:
    return folder.name.partition("-sweep-")[2]


def _short(key: str) -> str:
    return key.rpartition(".")[2].replace("_", " ")


def main(argv: list[str] | None = None) -> int:
    """Keep a sweep, and put the tables of all that are kept in their place in the page."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs.sweep_tables", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="of a finished sweep")
    options = parser.parse_args(argv)
    if options.folder:
        collect(options.folder)
    put(PAGE, "sweep", page_text())
    reported = ", ".join(folder.name for folder in newest().values())
    print(f"{PAGE.name} tells {reported or 'that there is no result'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
