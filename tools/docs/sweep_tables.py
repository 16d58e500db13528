"""Finished sweeps among the results, and their tables in docs/sweeps.md:
``python -m tools.docs.sweep_tables [runs/NAME]``.

Keeps what is light of the sweep's folder below ``lab/results/<date>-sweep-<name>/``: trials,
configuration. Without a folder only the page is written again, which has
the newest of each name. What the tables say is computed from the kept ``trials.csv`` alone.
"""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
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
from tools.docs.quickstart_tables import seed_interval

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


def ranking(rows: Rows, keys: Sequence[str], plain: Mapping[str, Any]) -> str:
    """Markdown: a line a configuration, best first; scores in per cent, over seeds.

    Args:
        rows: records of the trials; those that did not finish do not count.
        keys: columns of settings.
        plain: key -> value where a configuration leaves it as the run has it.
    """
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        if row["status"] == "finished":
            groups[row["group"]].append(row)
    order = sorted(groups.values(), key=lambda members: -_mean(members, "score"))
    heads = [*(_short(key) for key in keys), "score (95 % interval)", "M active"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(keys)}{'---:|' * 2}"]
    for members in order:
        scores = [100 * float(row["score"]) for row in members]
        cells = [
            *(members[0][key] or str(plain.get(key, "")) for key in keys),
            _with_interval(scores),
            f"{_mean(members, 'activated_params') / 1e6:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
    shown = [*space, *([f"model.{adjusted}"] if adjusted else [])]
    ranked = ranking(rows, shown, {f"model.{key}": value for key, value in model.items()})
    return (
        f"{len(rows)} trials ({counts}) of {run['training']['steps']:,} steps, seeds "
        f"{', '.join(map(str, sweep['seeds']))}; width {model['dim']}, {model['num_layers']} layers"
        f"{held}; {minutes:.0f} minutes of training in "
        f"total, {rows[0]['machine']}, {rows[0]['date']}. Scores are per cent, on the validation "
        f"splits; intervals are Student's t over seeds alone, on these rows.\n\n{ranked}\n\n"
        "Effect of each setting, fitted over all finished trials:\n\n"
        f"{effects(rows, space)}\n\n"
        f"Files, with scores by task: [{folder.name}](../lab/results/{folder.name})."
    )


def _name(folder: Path) -> str:
    return folder.name.partition("-sweep-")[2]


def _mean(rows: Rows, key: str) -> float:
    return fmean(float(row[key]) for row in rows)


def _with_interval(values: list[float]) -> str:
    low, high = seed_interval(values)
    reported = f"{fmean(values):.1f}"
    return reported if math.isnan(low) else f"{reported} ({low:.1f} to {high:.1f})"


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
