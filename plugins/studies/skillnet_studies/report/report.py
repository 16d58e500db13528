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

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillnet_platform import console
from skillnet_platform.tables import ReportTable
from skillnet_platform.terminal_text import format_plural
from skillnet_studies.analysis.claims import (
    ClaimCondition,
    ConditionResult,
    EvaluatedClaim,
    evaluate_claims,
)
from skillnet_studies.analysis.comparison import MEAN, SPLIT, SystemComparison
from skillnet_studies.analysis.target_budget import estimate_budgets
from skillnet_studies.config.claims import ClaimsConfig
from skillnet_studies.report.evidence import collect_points, group_claims, group_tests
from skillnet_studies.report.evidence_plots import draw_evidence
from skillnet_studies.report.findings import (
    MAX_ROWS,
    answer_comparison,
    build_claim_table,
    sort_systems,
)
from skillnet_studies.report.plots import draw_plots
from skillnet_studies.report.provenance import MAIN_FACTS, collect_facts, read_notices
from skillnet_studies.report.references import (
    ReferenceScores,
    average_references,
    build_reference_rows,
    find_reference_scores,
)
from skillnet_studies.report.tables import build_tables
from skillnet_studies.report.variance_notes import name_sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SUMMARY_COLUMNS = (
    "system", "task", "split", "metric", "value", "low", "high", "score", "std_error", "dof",
    "seeds", "activated_params", "flops_per_example",
)  # fmt: skip
TEST_COLUMNS = (
    "kind", "system", "against", "task", "difference", "low", "high", "std_error", "dof", "seeds",
    "p", "p_corrected", "verdict",
)  # fmt: skip
#: Name of a figure -> caption, with places for the sources of variance and the noun of a run.
CAPTIONS = {
    "differences": "Paired differences of scores with their 95 % intervals over {sources}. Grey, "
    "hollow: nothing is decided or tested; band: margin of a claim. Diamond: mean over tasks.",
    "mean score against operations": "Mean score with its 95 % interval against the FLOPs of a "
    "forward pass of one test example, on a logarithmic axis.",
    "scores": "Score of each system on the test rows: mean over {noun}s with the 95 % interval "
    "over {sources}. Filled: pretrained; hollow: not pretrained.",
    "score against FLOPs": "Score against the FLOPs of the forward pass of one test example. Sizes "
    "of one system are joined.",
    "gain from pretraining": "Score with pretraining minus score without, with the paired 95 % "
    "interval.",
    "learning": "Score on the validation rows if it was logged, else the training loss; mean over "
    "{noun}s. Solid: pretrained; dashed: not pretrained.",
}


@dataclass
class ComparisonReport:
    """All content of the report of a comparison.

    Args:
        title: title of the page.
        comparison: computed results.
        claims: claims with verdicts.
        tables: tables, in order; the first is the table that the page shows unfolded.
        evidence: name -> figure beside the answer: differences, and scores against operations.
        figures: name -> further figure, in order.
        captions: name of a figure -> caption.
        skills: name -> figure about the skills of the reference.
        skills_note: text that names the model of these figures.
        references: scores of the simple references, by task and split.
        facts: name -> value of the provenance.
        texts: name -> longer text of the provenance.
        notices: limits of the studies, which stand beside the answer.
        folder: directory of the report, once written.
    """

    title: str
    comparison: SystemComparison
    claims: Sequence[EvaluatedClaim]
    tables: list[ReportTable]
    evidence: "dict[str, Figure]"
    figures: "dict[str, Figure]"
    captions: dict[str, str] = field(default_factory=dict)
    skills: "dict[str, Figure]" = field(default_factory=dict)
    skills_note: str = ""
    references: ReferenceScores = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    folder: Path | None = None

    @property
    def answer(self) -> str:
        """The answer in one sentence, with its number; "" for a single system."""
        return answer_comparison(self.comparison, self.claims)

    @property
    def lead(self) -> str:
        """One line that states how many claims hold, and the size of the comparison."""
        comparison = self.comparison
        seeds = sorted({len(runs) for runs in comparison.systems.values()})
        least = f"{seeds[0]} to " if len(seeds) > 1 else ""
        counts = [
            format_plural(len(comparison.systems), "system"),
            f"{least}{format_plural(seeds[-1], comparison.repeat_noun)} each",
            format_plural(len(comparison.tasks), "task"),
            format_plural(len(comparison.runs), "run"),
        ]
        if len(self.claims) > 1:
            holding = sum(claim.verdict == "holds" for claim in self.claims)
            counts.insert(0, f"{holding} of {len(self.claims)} claims hold")
        return ", ".join(counts)

    @property
    def origin(self) -> str:
        """One line with the commit, the dates and the machine."""
        return " · ".join(f"{name} {self.facts[name]}" for name in MAIN_FACTS if name in self.facts)


def build_report(
    comparison: SystemComparison,
    title: str,
    rules: ClaimsConfig | None = None,
    facts: Mapping[str, str] | None = None,
    references: ReferenceScores | None = None,
) -> ComparisonReport:
    """Return the report of a comparison.

    Args:
        comparison: computed results. The report lists the systems by score.
        title: title of the page.
        rules: claims; None states none.
        facts: additional provenance, listed first.
        references: scores of the simple references, by task and split; None finds them.
    """
    order = sort_systems(comparison)
    comparison = _sort_results(comparison, order)
    known = find_reference_scores(comparison) if references is None else references
    claims = evaluate_claims(comparison, rules)
    tables = build_tables(comparison, known)
    if claims:
        tables.insert(0, build_claim_table(claims, comparison, known))
    elif len(tables[0].rows) > MAX_ROWS:
        tables.insert(0, _shorten_table(tables[0]))
    return ComparisonReport(
        title,
        comparison,
        claims,
        tables,
        _draw_evidence(comparison, claims, known),
        draw_plots(comparison),
        captions=_build_captions(comparison),
        references=known,
        facts=dict(facts or {}) | collect_facts(comparison),
        notices=read_notices(comparison),
    )


def _sort_results(comparison: SystemComparison, order: Sequence[str]) -> SystemComparison:
    """Return a comparison whose systems, relative scores and tests have one order of labels."""
    kinds = list(dict.fromkeys(test.kind for test in comparison.tests))
    return replace(
        comparison,
        systems={label: comparison.systems[label] for label in order},
        relative={each: comparison.relative[each] for each in order if each in comparison.relative},
        tests=sorted(
            comparison.tests, key=lambda test: (kinds.index(test.kind), order.index(test.system))
        ),
    )


def _build_captions(comparison: SystemComparison) -> dict[str, str]:
    words = {"sources": name_sources(comparison), "noun": comparison.repeat_noun}
    return {name: caption.format(**words) for name, caption in CAPTIONS.items()}


def _shorten_table(table: ReportTable) -> ReportTable:
    """Return the first rows of a table; the last one, the references, stays."""
    rows = [*table.rows[: MAX_ROWS - 1], table.rows[-1]]
    title = f"{table.title}: {len(rows)} of {len(table.rows)} rows"
    return replace(table, title=title, rows=rows)


def _draw_evidence(
    comparison: SystemComparison, claims: Sequence[EvaluatedClaim], references: ReferenceScores
) -> "dict[str, Figure]":
    groups = group_claims(build_claim_rows(claims)) or group_tests(build_test_rows(comparison))
    mean = average_references(references, comparison.common_tasks)
    points = collect_points(build_summary_rows(comparison))
    return draw_evidence(groups, points, None if mean is None else 100 * mean)


# -- output --------------------------------------------------------------------------------


def show_report(report: ComparisonReport) -> None:
    """Print the answer, the first table and the main tables."""
    if report.answer:
        console.print_note(report.answer)
    for notice in report.notices:
        console.print_note(f"Notice: {notice}")
    for table in report.tables:
        if not table.collapsed:
            table.show(f"{report.title}: " if table is report.tables[0] else "")
    console.print_note(report.origin)


def report_to_markdown(report: ComparisonReport) -> str:
    """Return the claims and main tables as Markdown, for the description of the MLflow run."""
    parts = [report.answer, *list_notices(report), report.lead + ".", report.origin]
    parts += [table.to_markdown() for table in report.tables if not table.collapsed]
    return "\n\n".join(part for part in parts if part)


def list_notices(report: ComparisonReport) -> list[str]:
    """Return the notices of a report as paragraphs of Markdown."""
    return [f"**Notice:** {notice}" for notice in report.notices]


def report_to_dict(report: ComparisonReport) -> dict[str, Any]:
    """Return the report as plain values for ``--json``."""
    comparison = report.comparison
    return {
        "title": report.title,
        "folder": report.folder,
        "answer": report.answer,
        "notices": report.notices,
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
        "references": build_reference_rows(report.references, comparison.common_tasks),
        "budgets": {label: asdict(own) for label, own in estimate_budgets(comparison).items()},
        "runs": [
            {"system": r.label, "seed": r.seed, "folder": r.folder, "run_id": r.run_id}
            for r in comparison.runs
        ],
        "facts": report.facts,
    }


def build_summary_rows(
    comparison: SystemComparison, references: ReferenceScores | None = None
) -> list[dict[str, Any]]:
    """Return one row per system, task and test set, plus the mean and relative scores.

    Args:
        comparison: computed results.
        references: scores of the simple references, by task and split; rows without intervals.
    """
    from pipelines.training.evaluation.tables import SCORED_METRICS

    rows = build_reference_rows(references or {}, comparison.common_tasks)
    for (label, task, split), score in comparison.scores.items():
        value, low, high = score[:3]
        metric = comparison.metrics.get(task, "score")
        # Scores are inverted back to error rates, which swaps the bounds.
        if not SCORED_METRICS.get(metric, True):
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
            "verdict": test.verdict,
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
            "conditions": [
                _build_condition_row(each, claim.find_result(each)) for each in claim.conditions
            ],
        }
        for claim in claims
    ]


def _build_condition_row(condition: ClaimCondition, result: ConditionResult) -> dict[str, Any]:
    row: dict[str, Any] = {"text": condition.text, "result": result}
    tested = condition.tested
    if tested is not None:
        row |= {"system": tested.system, "against": tested.against, "task": tested.task}
        row |= {"margin": tested.margin, "difference": tested.change.value}
        row |= {"low": tested.change.low, "high": tested.change.high}
    return row
