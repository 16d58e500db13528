"""The README's tables of the headline study: ``python -m benchmarks.headline [FOLDER]``.

Reads what ``skillnet compare --config studies/headline`` left, as committed below
``benchmarks/results/``, and puts a table of the systems and one of the claims between the README's
marks. Figures are copied; one line is computed from them: how large a difference must be to count.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from scipy import stats

from benchmarks.kept import rows_of
from benchmarks.marks import put
from benchmarks.measure import RESULTS
from sweeps.runs import PRETRAINED

README = Path(__file__).parent.parent / "README.md"

#: (task, heading) of the columns.
TASKS = (
    ("text_classification", "text, accuracy ↑"),
    ("speech_recognition", "sound, token error ↓"),
    ("text_to_image", "image, R@10 ↑"),
    ("text_to_video", "video, R@10 ↑"),
    ("text_to_code", "code, R@10 ↑"),
    ("mean", "mean score"),
)
#: Short words for claims, by their names in ``claims.json``.
CLAIMS = {
    "the specialists": "at or above the specialists on all five, and 1.02 of their mean relative "
    "score; none pretrained",
    "the specialists, pretrained": "the same, both pretrained",
    "pretraining": "pretraining lifts all five",
    "text to image": "text to image: ahead of every baseline of the same pretraining, with no "
    "more activated parameters (within 10 %)",
    "equal activated cost": "dense and mixture of experts of its activated size are behind, by "
    "mean score",
}
#: What a part of a claim is: shown, refuted, open.
MARKS = {True: " ✓", False: " ✗", None: ""}
RELATIVE = "relative_to_specialist"

Rows = Sequence[Mapping[str, str]]


def systems_table(rows: Rows) -> str:
    """Markdown: a line a system, first those without pretraining.

    Args:
        rows: of ``summary.csv``.
    """
    test = [
        row for row in rows if row["split"] == "test" and not row["metric"].startswith(RELATIVE)
    ]
    figures = {(row["system"], row["task"]): row for row in test}
    names = list(dict.fromkeys(row["system"] for row in test))
    names.sort(key=lambda name: name.endswith(PRETRAINED))
    heads = ["system", *(head for _, head in TASKS)]
    heads += ["seeds", "parameters active", "MFLOPs an example"]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for name in names:
        mean = figures[name, "mean"]
        cells = [_said(figures[name, task]) for task, _ in TASKS]
        cells += [mean["seeds"], f"{float(mean['activated_params']) / 1e6:.2f} M"]
        cells.append(f"{float(mean['flops_per_example']) / 1e6:.0f}")
        base = name.removesuffix(PRETRAINED)
        told = f"`{base}`, pretrained" if name != base else f"`{name}`"
        lines.append(f"| {told} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims_table(claims: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line a claim, its verdict and its parts.

    Args:
        claims: of ``claims.json``.
    """
    lines = ["| claim | verdict | |", "|---|---|---|"]
    for claim in claims:
        parts = "; ".join(
            f"{part['words']}{MARKS[part['shown']]}" for part in claim["parts"]
        ) or str(claim["why"])
        words = CLAIMS.get(claim["name"], claim["claim"])
        lines.append(f"| {words} | **{claim['verdict']}** | {parts} |")
    return "\n".join(lines)


def resolution(rows: Rows) -> str:
    """A sentence: from which difference on, in points, a test of each task is significant.

    A test is significant if |difference| > t · error, with t at the level that Holm's method asks
    of the smallest p-value. Tasks have many tests; their median is told.

    Args:
        rows: of ``tests.csv``.
    """
    level = 0.05 / (2 * len(rows))
    least: dict[str, list[float]] = {}
    for row in rows:
        quantile = float(stats.t.isf(level, float(row["freedom"])))
        least.setdefault(row["task"], []).append(100 * quantile * float(row["error"]))
    heads = [(task, head.partition(",")[0]) for task, head in TASKS if task in least]
    told = ", ".join(f"{head} {median(least[task]):.1f}" for task, head in heads)
    return (
        f"What it could have seen: corrected for {len(rows)} tests, a difference is significant "
        f"from about so many points on (median of a task's tests): {told}."
    )


def _said(row: Mapping[str, str]) -> str:
    value, low, high = (100 * float(row[key]) for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}–{high:.1f})"


def text_of(folder: Path) -> str:
    """What stands between the README's marks."""
    rows, runs = (rows_of(folder / name) for name in ("summary.csv", "results.csv"))
    # A study is gone on with on other days; what it ran on is told of all of it.
    machines, dates = (
        " and ".join(sorted({row[key] for row in runs})) for key in ("machine", "date")
    )
    claims = json.loads((folder / "claims.json").read_text(encoding="utf-8"))
    study = yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8"))
    run, before = study["run"], study["pretraining"]["training"]
    sizes = f"width {run['model']['dim']}, {run['model']['depth']} layers"
    steps = (
        f"{run['training']['steps']:,} steps of fine-tuning and {before['steps']:,} of pretraining"
    )
    tried = study["tuning"]["trials"] + len(study["tuning"].get("points", ()))
    setting = (
        f"The headline study (`skillnet compare --config studies/headline`): {sizes}, {steps}, "
        f"{tried} tuning trials for each system; {machines}, {dates}."
    )
    return (
        f"{setting}\n\n{systems_table(rows)}\n\nPer cent with 95 % intervals over seeds and test "
        f"rows. What of the paper's claims it shows (✓ shown, ✗ refuted, neither: open):\n\n"
        f"{claims_table(claims)}\n\n{resolution(rows_of(folder / 'tests.csv'))}"
    )


def main(argv: list[str] | None = None) -> int:
    """Put the tables in their place in the README."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.headline", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="by default the newest committed one")
    options = parser.parse_args(argv)
    folder = options.folder or max(RESULTS.glob("*-headline*"))
    put(README, "headline", text_of(folder))
    print(f"{README.name}: the tables are those of {folder.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
