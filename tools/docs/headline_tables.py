"""Tables of docs/results/headline.md: ``python -m tools.docs.headline_tables [FOLDER]``.

Reads the files that ``skillnet compare --config studies/headline`` wrote, as committed below
``benchmarks/results/``, and writes the scores, the costs and the claims between the page's marks.
Figures are copied. One line is computed from them: the minimum detectable difference.
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

from benchmarks.measure import RESULTS
from sweeps.analysis.finished_runs import PRETRAINED
from tools.docs.kept_results import rows_of
from tools.docs.page_marks import put

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "headline.md"

#: (task, heading) of the columns.
TASKS = (
    ("text_classification", "text, accuracy ↑"),
    ("speech_recognition", "sound, token error ↓"),
    ("text_to_image", "image, R@10 ↑"),
    ("text_to_video", "video, R@10 ↑"),
    ("text_to_code", "code, R@10 ↑"),
    ("mean", "mean score"),
)
#: Column of ``tests.csv`` -> its name in results that were kept before the rename.
COLUMNS_RENAMED = (("dof", "freedom"), ("std_error", "error"))
#: Plain statements of the claims, by their names in ``claims.json``.
CLAIMS = {
    "the specialists": "Without pretraining, SkillNet is at or above the specialists on all five "
    "tasks and reaches 1.02 of their mean relative score",
    "the specialists, pretrained": "The same, with both pretrained",
    "pretraining": "Pretraining raises the score of all five tasks",
    "text to image": "Text to image: SkillNet is ahead of every baseline with the same "
    "pretraining, with at most 1.1 times their activated parameters",
    "equal activated cost": "Dense models and mixtures of experts of equal activated size are "
    "behind, by mean score",
}
#: Marks of one part of a claim: supported, refuted, open.
MARKS = {True: " ✓", False: " ✗", None: ""}
RELATIVE = "relative_to_specialist"

Rows = Sequence[Mapping[str, str]]


def systems_tables(rows: Rows) -> str:
    """Return two Markdown tables with one line per system: scores, and costs.

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
    scores = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    costs = ["| system | seeds | parameters active | MFLOPs per example |", "|---|---:|---:|---:|"]
    for name in names:
        base = name.removesuffix(PRETRAINED)
        label = f"`{base}`, pretrained" if name != base else f"`{name}`"
        cells = [_with_interval(figures[name, task]) for task, _ in TASKS]
        scores.append(f"| {label} | {' | '.join(cells)} |")
        mean = figures[name, "mean"]
        costs.append(
            f"| {label} | {mean['seeds']} | {float(mean['activated_params']) / 1e6:.2f} M | "
            f"{float(mean['flops_per_example']) / 1e6:.0f} |"
        )
    return "\n".join([*scores, "", *costs])


def claims_list(claims: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown with one item per claim: the verdict, then one line per part.

    Args:
        claims: of ``claims.json``.
    """
    lines = []
    for claim in claims:
        statement = CLAIMS.get(claim["name"], claim["claim"])
        lines.append(f"- {statement}: **{claim['verdict']}**.")
        # Results kept before the rename have the keys parts, words and why.
        conditions = claim.get("conditions", claim.get("parts", ()))
        reason = claim.get("undecided_reason", claim.get("why"))
        texts = [
            f"{each.get('text', each.get('words'))}{MARKS[each['shown']]}" for each in conditions
        ]
        lines += [f"    - {text}" for text in texts or [str(reason)]]
    return "\n".join(lines)


def detectable_difference(rows: Rows) -> str:
    """Return a sentence with the smallest significant difference per task, in points.

    A test is significant if |difference| > t · standard error, with t at the level that Holm's
    method requires of the smallest p-value. A task has several tests; the median is reported.

    Args:
        rows: of ``tests.csv``.
    """
    level = 0.05 / (2 * len(rows))
    least: dict[str, list[float]] = {}
    for row in rows:
        # Results kept before the rename have the columns freedom and error.
        dof, error = (row.get(new) or row[old] for new, old in COLUMNS_RENAMED)
        quantile = float(stats.t.isf(level, float(dof)))
        least.setdefault(row["task"], []).append(100 * quantile * float(error))
    heads = [(task, head.partition(",")[0]) for task, head in TASKS if task in least]
    listed = ", ".join(f"{head} {median(least[task]):.1f}" for task, head in heads)
    return (
        f"Minimum detectable difference after Holm correction for {len(rows)} tests "
        f"(median of a task's tests, points): {listed}."
    )


def page_text(folder: Path) -> str:
    """Return the text between the marks of the page, from the files of one study."""
    rows, runs = (rows_of(folder / name) for name in ("summary.csv", "results.csv"))
    # A study may be resumed on another day or machine; list all of them.
    machines, dates = (
        " and ".join(sorted({row[key] for row in runs})) for key in ("machine", "date")
    )
    claims = json.loads((folder / "claims.json").read_text(encoding="utf-8"))
    study = yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8"))
    run, before = study["run"], study["pretraining"]["training"]
    tried = study["tuning"]["trials"] + len(study["tuning"].get("points", ()))
    setting = (
        f"Width {run['model']['dim']}, {run['model']['num_layers']} layers. "
        f"{run['training']['steps']:,} steps of fine-tuning and {before['steps']:,} of "
        f"pretraining. {tried} tuning trials per system. Run on {machines}, {dates}."
    )
    return (
        f"{setting}\n\n{systems_tables(rows)}\n\nScores are per cent with 95 % intervals over "
        "seeds and test rows.\n\nThe claims of the paper (✓ supported, ✗ refuted, no mark: "
        f"open):\n\n{claims_list(claims)}\n\n{detectable_difference(rows_of(folder / 'tests.csv'))}"
    )


def _with_interval(row: Mapping[str, str]) -> str:
    value, low, high = (100 * float(row[key]) for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}–{high:.1f})"


def main(argv: list[str] | None = None) -> int:
    """Write the tables of a study into docs/results/headline.md."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.docs.headline_tables", description=__doc__
    )
    parser.add_argument("folder", nargs="?", type=Path, help="by default the newest committed one")
    options = parser.parse_args(argv)
    folder = options.folder or max(RESULTS.glob("*-headline*"))
    put(PAGE, "headline", page_text(folder))
    print(f"{PAGE.name}: the tables are those of {folder.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
