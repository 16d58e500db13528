"""The report of a comparison: made once, then shown, written and recorded.

<folder>/
  report.html       everything, with the plots inside
  results.csv       tidy rows of every run, one figure a row
  summary.csv       estimates per system, task and test set, with intervals
  tests.csv         every paired test
  claims.json       the claims and their parts
  outcomes.parquet  what became of each test row in each run
"""

import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillnet_platform import console
from sweeps.analysis.claims import Claim, claims
from sweeps.analysis.comparison import MEAN, SPLIT, Comparison
from sweeps.config.study import ClaimsConfig
from sweeps.report.plots import plots
from sweeps.report.tables import Table, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SUMMARY = (
    "system", "task", "split", "metric", "value", "low", "high", "score", "error", "freedom",
    "seeds", "activated_params", "flops_per_example",
)  # fmt: skip
TESTS = (
    "kind", "system", "against", "task", "difference", "low", "high", "error", "freedom", "seeds",
    "p", "p_corrected", "significant",
)  # fmt: skip
PACKAGES = ("skillnet-platform", "torch", "ray", "mlflow", "transformers", "timm", "numpy", "scipy")

CAPTIONS = {
    "scores": "Score of each system on the test rows, mean over seeds, with the 95 % interval over "
    "seeds and rows. Filled: pretrained; hollow: not.",
    "score against FLOPs": "Score against the operations executed in a forward pass of one test "
    "example. Sizes of one system are joined.",
    "what pretraining added": "Score with pretraining less score without, with the paired 95 % "
    "interval.",
    "learning": "The task's metric on the validation rows where runs kept it, else the training "
    "loss; mean over seeds. Solid: pretrained; dashed: not.",
}


@dataclass
class Report:
    """Everything that is shown of a comparison.

    Args:
        title: of the page.
        comparison: what was computed.
        claims: decided or not.
        tables: in order.
        figures: name -> figure, in order.
        captions: name -> words below the figure.
        skills: name -> figure, of what the skills of the reference do.
        skills_note: which model that is.
        facts: how it was made: name -> value.
        texts: longer texts about that: name -> text.
        folder: where it lies, once written.
    """

    title: str
    comparison: Comparison
    claims: Sequence[Claim]
    tables: list[Table]
    figures: "dict[str, Figure]"
    captions: dict[str, str] = field(default_factory=lambda: dict(CAPTIONS))
    skills: "dict[str, Figure]" = field(default_factory=dict)
    skills_note: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def lead(self) -> str:
        """One line on what is compared."""
        of = self.comparison
        seeds = sorted({len(runs) for runs in of.systems.values()})
        told = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        counts = [
            _counted(len(of.systems), "system"),
            f"{told} {'seed' if seeds == [1] else 'seeds'} each",
            _counted(len(of.tasks), "task"),
            _counted(len(of.runs), "run"),
        ]
        return ", ".join(counts)


def make(
    of: Comparison,
    title: str,
    rules: ClaimsConfig | None = None,
    facts: Mapping[str, str] | None = None,
) -> Report:
    """A report of what the runs tell; ``facts`` come before those that every report has."""
    return Report(
        title,
        of,
        claims(of, rules),
        tables(of),
        plots(of),
        facts=dict(facts or {}) | run_facts(of),
    )


def run_facts(of: Comparison) -> dict[str, str]:
    """How the runs of a comparison, and the report, were made."""
    corpora: dict[str, str] = {}
    for run in of.runs:
        corpora |= run.digests
    rows = [row for run in of.runs for row in run.rows]
    dates = sorted({str(row["date"]) for row in rows})
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "report made": time.strftime("%Y-%m-%d %H:%M %Z"),
        "runs evaluated": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        "seeds": "; ".join(
            f"{label}: {', '.join(str(run.seed) for run in runs)}"
            for label, runs in of.systems.items()
        ),
        "test rows": ", ".join(
            f"{task} {len(of.runs[0].outcomes[task, SPLIT])}"
            for task in of.tasks
            if (task, SPLIT) in of.runs[0].outcomes
        ),
        "corpora (digests)": ", ".join(f"{name} {digest}" for name, digest in corpora.items()),
        "machine": "; ".join(dict.fromkeys(str(row["machine"]) for row in rows)),
        "software": ", ".join([f"Python {platform.python_version()}", *versions]),
        "MLflow runs": ", ".join(run.run_id for run in of.runs if run.run_id) or "–",
    }


# -- out -----------------------------------------------------------------------------------


def show(report: Report) -> None:
    """Print the claims and the main tables."""
    cells = [[claim.verdict, claim.standing, claim.words, claim.why] for claim in report.claims]
    columns = ["verdict", "winner", "claim", ""]
    console.table(report.title, columns, cells)
    for table in report.tables:
        if not table.aside:
            lines = [[cell.lines() for cell in row] for row in table.rows]
            console.table(table.title, list(table.columns), lines, table.caption)


def markdown(report: Report) -> str:
    """The head of the run's page: claims and the table of results."""
    from pipelines.evaluation.tables import markdown as drawn

    columns = ["claim", "verdict", "winner"]
    cells = [[c.words, c.verdict, c.standing] for c in report.claims]
    parts = [report.lead + ".", drawn(columns, cells)]
    for table in report.tables:
        if not table.aside:
            lines = [[cell.line() for cell in row] for row in table.rows]
            parts += [f"#### {table.title}", drawn(list(table.columns), lines), table.caption]
    return "\n\n".join(part for part in parts if part)


def plain(report: Report) -> dict[str, Any]:
    """What ``--json`` gives."""
    of = report.comparison
    return {
        "title": report.title,
        "folder": report.folder,
        "claims": claim_rows(report.claims),
        "summary": summary_rows(of),
        "tests": test_rows(of),
        "relative": {
            label: {"against": found.against, **found.value._asdict()}
            for label, found in of.relative.items()
        },
        "runs": [
            {"system": r.label, "seed": r.seed, "folder": r.folder, "run_id": r.run_id}
            for r in of.runs
        ],
        "facts": report.facts,
    }


def summary_rows(of: Comparison) -> list[dict[str, Any]]:
    """One row per system, task and test set, with intervals; also the mean and relative scores."""
    rows = []
    for (label, task, split), found in of.scores.items():
        value, low, high = found[:3]
        metric = of.metrics.get(task, "score")
        if metric == "token_error_rate":
            value, low, high = 1 - value, 1 - high, 1 - low
        cost = of.costs.get((label, task))
        rows.append(
            {
                "system": label,
                "task": task,
                "split": split,
                "metric": metric,
                "value": value,
                "low": low,
                "high": high,
                "score": found.value,
                "error": found.error,
                "freedom": found.freedom,
                "seeds": found.seeds,
                "activated_params": cost.activated if cost else None,
                "flops_per_example": cost.flops if cost else None,
            }
        )
    for label, relative in of.relative.items():
        own = relative.value
        rows.append(
            {"system": label, "task": MEAN, "split": SPLIT, "score": own.value}
            | {"metric": f"relative_to_{relative.against}", **own._asdict()}
        )
    return rows


def test_rows(of: Comparison) -> list[dict[str, Any]]:
    """One row per paired test."""
    return [
        {
            "kind": test.kind,
            "system": test.system,
            "against": test.against,
            "task": test.task,
            "difference": test.change.value,
            **{k: v for k, v in test.change._asdict().items() if k != "value"},
            "p": test.p,
            "p_corrected": test.corrected,
            "significant": test.significant,
        }
        for test in of.tests
    ]


def claim_rows(told: Sequence[Claim]) -> list[dict[str, Any]]:
    """Claims as plain values, with their verdicts."""
    return [
        {
            "name": claim.name,
            "claim": claim.words,
            "rule": claim.rule,
            "verdict": claim.verdict,
            "winner": claim.winner,
            "why": claim.why,
            "parts": [{"words": part.words, "shown": part.shown} for part in claim.parts],
        }
        for claim in told
    ]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
