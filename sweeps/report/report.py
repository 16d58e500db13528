"""The report of a comparison: built once, then shown, written and recorded.

<folder>/
  report.html       complete report with plots
  results.csv       tidy rows of every run, one metric per row
  summary.csv       estimates per system, task and test set, with intervals
  tests.csv         all paired tests
  claims.json       claims with their conditions
  outcomes.parquet  outcome of each test row in each run

:func:`build_report` is called by ``skillnet compare``.
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
from sweeps.analysis.claims import EvaluatedClaim, answer_in_a_sentence, evaluate_claims
from sweeps.analysis.comparison import MEAN, SPLIT, SystemComparison
from sweeps.config.claims import ClaimsConfig
from sweeps.report.plots import draw_plots
from sweeps.report.tables import ReportTable, build_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SUMMARY_COLUMNS = (
    "system", "task", "split", "metric", "value", "low", "high", "score", "std_error", "dof",
    "seeds", "activated_params", "flops_per_example",
)  # fmt: skip
TEST_COLUMNS = (
    "kind", "system", "against", "task", "difference", "low", "high", "std_error", "dof", "seeds",
    "p", "p_corrected", "significant",
)  # fmt: skip
#: Packages whose versions are listed.
PACKAGES = ("skillnet-platform", "torch", "ray", "mlflow", "transformers", "timm", "numpy", "scipy")

#: Name of a figure -> caption.
CAPTIONS = {
    "scores": "Score of each system on the test rows: mean over seeds with the 95 % interval over "
    "seeds and rows. Filled: pretrained; hollow: not pretrained.",
    "score against FLOPs": "Score against the FLOPs of the forward pass of one test example. Sizes "
    "of one system are joined.",
    "gain from pretraining": "Score with pretraining minus score without, with the paired 95 % "
    "interval.",
    "learning": "Metric on the validation rows if it was logged, else the training loss; mean over "
    "seeds. Solid: pretrained; dashed: not pretrained.",
}


@dataclass
class ComparisonReport:
    """All content of the report of a comparison.

    Args:
        title: title of the page.
        comparison: computed results.
        claims: claims with verdicts.
        tables: tables, in order.
        figures: name -> figure, in order.
        captions: name of a figure -> caption.
        skills: name -> figure about the skills of the reference.
        skills_note: text that names the model of these figures.
        facts: name -> value of the provenance.
        texts: name -> longer text of the provenance.
        folder: directory of the report, once written.
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
    def answer(self) -> str:
        """The answer of a comparison of two systems, in a sentence; "" for more systems."""
        return answer_in_a_sentence(self.comparison)

    @property
    def lead(self) -> str:
        """One line that states the size of the comparison."""
        comparison = self.comparison
        seeds = sorted({len(runs) for runs in comparison.systems.values()})
        per_system = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        counts = [
            _format_plural(len(comparison.systems), "system"),
            f"{per_system} {'seed' if seeds == [1] else 'seeds'} each",
            _format_plural(len(comparison.tasks), "task"),
            _format_plural(len(comparison.runs), "run"),
        ]
        return ", ".join(counts)


def build_report(
    comparison: SystemComparison,
    title: str,
    rules: ClaimsConfig | None = None,
    facts: Mapping[str, str] | None = None,
) -> ComparisonReport:
    """Return the report of a comparison.

    Args:
        comparison: computed results.
        title: title of the page.
        rules: claims; None states none.
        facts: additional provenance, listed first.
    """
    return ComparisonReport(
        title,
        comparison,
        evaluate_claims(comparison, rules),
        build_tables(comparison),
        draw_plots(comparison),
        facts=dict(facts or {}) | collect_facts(comparison),
    )


def collect_facts(comparison: SystemComparison) -> dict[str, str]:
    """Return name -> value of the provenance of the runs and the report."""
    corpora: dict[str, str] = {}
    for run in comparison.runs:
        corpora |= run.digests
    rows = [row for run in comparison.runs for row in run.rows]
    dates = sorted({str(row["date"]) for row in rows})
    versions = []
    for name in PACKAGES:
        # Not every installation has all optional packages.
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "report created": time.strftime("%Y-%m-%d %H:%M %Z"),
        "runs evaluated": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        "seeds": "; ".join(
            f"{label}: {', '.join(str(run.seed) for run in runs)}"
            for label, runs in comparison.systems.items()
        ),
        "test rows": ", ".join(
            f"{task} {len(comparison.runs[0].outcomes[task, SPLIT])}"
            for task in comparison.tasks
            if (task, SPLIT) in comparison.runs[0].outcomes
        ),
        "corpora (digests)": ", ".join(f"{name} {digest}" for name, digest in corpora.items()),
        "machine": "; ".join(dict.fromkeys(str(row["machine"]) for row in rows)),
        "software": ", ".join([f"Python {platform.python_version()}", *versions]),
        "MLflow runs": ", ".join(run.run_id for run in comparison.runs if run.run_id) or "–",
    }


# -- output --------------------------------------------------------------------------------


def show_report(report: ComparisonReport) -> None:
    """Print the claims and the main tables."""
    if report.answer:
        console.print_note(report.answer)
    if report.claims:
        cells = [[claim.verdict, claim.text, claim.undecided_reason] for claim in report.claims]
        console.print_table(report.title, ["verdict", "claim", ""], cells)
    for table in report.tables:
        if not table.collapsed:
            lines = [[cell.to_lines() for cell in row] for row in table.rows]
            console.print_table(table.title, list(table.columns), lines, table.caption)


def report_to_markdown(report: ComparisonReport) -> str:
    """Return the claims and main tables as Markdown, for the description of the MLflow run."""
    from pipelines.evaluation.tables import markdown_table

    parts = [report.lead + ".", report.answer]
    if report.claims:
        cells = [[claim.text, claim.verdict] for claim in report.claims]
        parts.append(markdown_table(["claim", "verdict"], cells))
    for table in report.tables:
        if not table.collapsed:
            lines = [[cell.to_line() for cell in row] for row in table.rows]
            parts += [
                f"#### {table.title}",
                markdown_table(list(table.columns), lines),
                table.caption,
            ]
    return "\n\n".join(part for part in parts if part)


def report_to_dict(report: ComparisonReport) -> dict[str, Any]:
    """Return the report as plain values for ``--json``."""
    comparison = report.comparison
    return {
        "title": report.title,
        "folder": report.folder,
        "answer": report.answer,
        "claims": build_claim_rows(report.claims),
        "summary": build_summary_rows(comparison),
        "tests": build_test_rows(comparison),
        "relative": {
            label: {
                "against": relative.against,
                **relative.value._asdict(),
                "without_one_task": relative.without_one,
            }
            for label, relative in comparison.relative.items()
        },
        "runs": [
            {"system": r.label, "seed": r.seed, "folder": r.folder, "run_id": r.run_id}
            for r in comparison.runs
        ],
        "facts": report.facts,
    }


def build_summary_rows(comparison: SystemComparison) -> list[dict[str, Any]]:
    """Return one row per system, task and test set, plus the mean and relative scores."""
    rows = []
    for (label, task, split), score in comparison.scores.items():
        value, low, high = score[:3]
        metric = comparison.metrics.get(task, "score")
        # Scores are inverted back to error rates, which swaps the bounds.
        if metric == "token_error_rate":
            value, low, high = 1 - value, 1 - high, 1 - low
        cost = comparison.costs.get((label, task))
        rows.append(
            {
                "system": label,
                "task": task,
                "split": split,
                "metric": metric,
                "value": value,
                "low": low,
                "high": high,
                "score": score.value,
                "std_error": score.std_error,
                "dof": score.dof,
                "seeds": score.seeds,
                "activated_params": cost.activated if cost else None,
                "flops_per_example": cost.flops if cost else None,
            }
        )
    for label, relative in comparison.relative.items():
        own = relative.value
        rows.append(
            # The relative score has its own metric name, so that rows stay tidy.
            {"system": label, "task": MEAN, "split": SPLIT, "score": own.value}
            | {"metric": f"relative_to_{relative.against}", **own._asdict()}
        )
        if relative.without_one is not None:
            # Bounds of the value if any task is left out, not an interval.
            low, high = relative.without_one
            name = f"relative_to_{relative.against}_without_one_task"
            row = {"system": label, "task": MEAN, "split": SPLIT, "metric": name}
            rows.append(row | {"low": low, "high": high})
    return rows


def build_test_rows(comparison: SystemComparison) -> list[dict[str, Any]]:
    """Return one row per paired test."""
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
        for test in comparison.tests
    ]


def build_claim_rows(claims: Sequence[EvaluatedClaim]) -> list[dict[str, Any]]:
    """Return the claims as plain values, with their verdicts."""
    return [
        {
            "name": claim.name,
            "claim": claim.text,
            "rule": claim.rule,
            "verdict": claim.verdict,
            "undecided_reason": claim.undecided_reason,
            "conditions": [{"text": each.text, "shown": each.shown} for each in claim.conditions],
        }
        for claim in claims
    ]


def _format_plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
