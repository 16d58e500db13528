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
from sweeps.analysis.claims import EvaluatedClaim, evaluate_claims
from sweeps.analysis.comparison import MEAN, SPLIT, SystemComparison
from sweeps.config.study import ClaimsConfig
from sweeps.report.plots import draw_plots
from sweeps.report.tables import ReportTable, build_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SUMMARY_COLUMNS = (
    "system", "task", "split", "metric", "value", "low", "high", "score", "error", "freedom",
    "seeds", "activated_params", "flops_per_example",
)  # fmt: skip
TEST_COLUMNS = (
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
class ComparisonReport:
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
    comparison: SystemComparison
    claims: Sequence[EvaluatedClaim]
    tables: list[ReportTable]
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
            _format_plural(len(of.systems), "system"),
            f"{told} {'seed' if seeds == [1] else 'seeds'} each",
            _format_plural(len(of.tasks), "task"),
            _format_plural(len(of.runs), "run"),
        ]
        return ", ".join(counts)


def build_report(
    of: SystemComparison,
    title: str,
    rules: ClaimsConfig | None = None,
    facts: Mapping[str, str] | None = None,
) -> ComparisonReport:
    """A report of what the runs tell; ``facts`` come before those that every report has."""
    return ComparisonReport(
        title,
        of,
        evaluate_claims(of, rules),
        build_tables(of),
        draw_plots(of),
        facts=dict(facts or {}) | collect_facts(of),
    )


def collect_facts(of: SystemComparison) -> dict[str, str]:
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


def show_report(report: ComparisonReport) -> None:
    """Print the claims and the main tables."""
    cells = [
        [claim.verdict, claim.winner_text, claim.text, claim.undecided_reason]
        for claim in report.claims
    ]
    columns = ["verdict", "winner", "claim", ""]
    console.table(report.title, columns, cells)
    for table in report.tables:
        if not table.collapsed:
            lines = [[cell.to_lines() for cell in row] for row in table.rows]
            console.table(table.title, list(table.columns), lines, table.caption)


def report_to_markdown(report: ComparisonReport) -> str:
    """The head of the run's page: claims and the table of results."""
    from pipelines.evaluation.tables import markdown as drawn

    columns = ["claim", "verdict", "winner"]
    cells = [[c.text, c.verdict, c.winner_text] for c in report.claims]
    parts = [report.lead + ".", drawn(columns, cells)]
    for table in report.tables:
        if not table.collapsed:
            lines = [[cell.to_line() for cell in row] for row in table.rows]
            parts += [f"#### {table.title}", drawn(list(table.columns), lines), table.caption]
    return "\n\n".join(part for part in parts if part)


def report_to_dict(report: ComparisonReport) -> dict[str, Any]:
    """What ``--json`` gives."""
    of = report.comparison
    return {
        "title": report.title,
        "folder": report.folder,
        "claims": build_claim_rows(report.claims),
        "summary": build_summary_rows(of),
        "tests": build_test_rows(of),
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


def build_summary_rows(of: SystemComparison) -> list[dict[str, Any]]:
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
                "error": found.std_error,
                "freedom": found.dof,
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


def build_test_rows(of: SystemComparison) -> list[dict[str, Any]]:
    """One row per paired test."""
    return [
        {
            "kind": test.kind,
            "system": test.system,
            "against": test.against,
            "task": test.task,
            "difference": test.difference.value,
            **{k: v for k, v in test.difference._asdict().items() if k != "value"},
            "p": test.p,
            "p_corrected": test.p_corrected,
            "significant": test.is_significant,
        }
        for test in of.tests
    ]


def build_claim_rows(told: Sequence[EvaluatedClaim]) -> list[dict[str, Any]]:
    """Claims as plain values, with their verdicts."""
    return [
        {
            "name": claim.name,
            "claim": claim.text,
            "rule": claim.rule,
            "verdict": claim.verdict,
            "winner": claim.winner,
            "why": claim.undecided_reason,
            "parts": [{"words": part.text, "shown": part.shown} for part in claim.conditions],
        }
        for claim in told
    ]


def _format_plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
