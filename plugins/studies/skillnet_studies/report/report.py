"""The report of a comparison: built once, then shown, written and recorded.

<folder>/
  report.html       complete report with plots
  results.csv       tidy rows of every run, one metric per row
  summary.csv       estimates per system, task and test set, with intervals
  tests.csv         all paired tests
  claims.json       claims with their conditions
  outcomes.parquet  outcome of each test row in each run

:func:`build_report` is called by ``skillnet compare``. Scores, tests and figures are those of
:mod:`skillnet_evidence`.
"""

import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.training.evaluation.tables import name_metric, write_evaluation_csv
from skillnet_evidence.budget import TargetBudget, TaskCurves, estimate_budgets
from skillnet_evidence.cells import ReportTable
from skillnet_evidence.claims import (
    ClaimResult,
    ClaimsConfig,
    answer_comparison,
    evaluate_claims,
    sort_systems,
)
from skillnet_evidence.comparison import SystemComparison
from skillnet_evidence.figures import draw_evidence, draw_plots
from skillnet_evidence.plot_kit import encode_png_uri, encode_svg_uri
from skillnet_evidence.rows import (
    SUMMARY_COLUMNS,
    TEST_COLUMNS,
    build_claim_rows,
    build_reference_rows,
    build_summary_rows,
    build_test_rows,
    collect_points,
    group_claims,
    group_tests,
)
from skillnet_evidence.scale import (
    build_scale_table,
    collect_scale,
    draw_scale_figure,
)
from skillnet_evidence.scores import SPLIT, ScoredRun
from skillnet_evidence.tables import (
    MAX_ROWS,
    ReferenceScores,
    average_references,
    build_claim_table,
    build_tables,
    name_sources,
)
from skillnet_platform import console
from skillnet_platform import html_page as pages
from skillnet_platform.package_version import find_version
from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.storage import atomic_write, write_json
from skillnet_platform.tables import show_table, write_csv
from skillnet_platform.terminal_text import format_plural
from skillnet_platform.tracking.source_commit import find_source_commit
from skillnet_studies.analysis.finished_runs import FinishedRun, list_finished, read_equal_versions
from skillnet_studies.config.study import NOTICE, REFERENCES_FILE
from skillnet_studies.report.references import (
    build_references,
    describe_references,
    find_reference_scores,
)
from skillnet_studies.report.run_tables import (
    build_cost_tables,
    build_seed_table,
    build_settings_table,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from skillnet_platform.tracking import Tracker

#: Files of a report's directory; the last two belong to studies.
REPORT_FILES = (
    "report.html", "results.csv", "summary.csv", "tests.csv", "claims.json", "outcomes.parquet",
    REFERENCES_FILE,
    "study.yaml", "study.json",
)  # fmt: skip
#: Packages whose versions are listed.
PACKAGES = ("skillnet-platform", "torch", "ray", "mlflow", "transformers", "timm", "numpy", "scipy")
#: Facts that the page and the terminal show beside the answer.
MAIN_FACTS = ("runs at commit", "report at commit", "runs evaluated", "machine")
#: Name of the figure of series of systems.
SCALE = "score and cost against the number of tasks"
#: Name of a figure -> caption, with places for the sources of variance and the noun of a run.
CAPTIONS = {
    "differences": "Paired differences of scores with their 95 % intervals over {sources}. Grey, "
    "hollow: nothing is decided or tested; band: margin of a claim. Diamond: mean over tasks.",
    "mean score against operations": "Mean score with its 95 % interval against the FLOPs of a "
    "forward pass of one test example, on a logarithmic axis.",
    SCALE: "Means with their 95 % intervals, and costs, of systems whose names differ in a number "
    "at the end. The means of all tasks are of other tasks at another number.",
    "scores": "Score of each system on the test rows: mean over {noun}s with the 95 % interval "
    "over {sources}. Filled: pretrained; hollow: not pretrained.",
    "learning": "Score on the validation rows against operations of a forward pass, with as many "
    "examples per step for all systems; the training loss if no score was logged. Mean over "
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
        captions: name of a figure -> caption.
        skills: name -> figure about the skills of the reference.
        skills_note: text that names the model of these figures.
        references: scores of the simple references, by task and split.
        budgets: label -> what the system spends until dense's final score.
        facts: name -> value of the provenance.
        texts: name -> longer text of the provenance.
        notices: limits of the studies, which stand beside the answer.
        folder: directory of the report, once written.
    """

    title: str
    comparison: SystemComparison
    claims: Sequence[ClaimResult]
    tables: list[ReportTable]
    captions: dict[str, str] = field(default_factory=dict)
    skills: "dict[str, Figure]" = field(default_factory=dict)
    skills_note: str = ""
    references: ReferenceScores = field(default_factory=dict)
    budgets: Mapping[str, TargetBudget] = field(default_factory=dict)
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

    @cached_property
    def evidence(self) -> "dict[str, Figure]":
        """Name -> figure beside the answer: differences, and scores against operations."""
        return _draw_evidence(self.comparison, self.claims, self.references)

    @cached_property
    def figures(self) -> "dict[str, Figure]":
        """Name -> further figure, in order."""
        finished = list_finished(self.comparison).items()
        return draw_plots(
            self.comparison, {label: [run.history for run in runs] for label, runs in finished}
        )

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
    comparison = comparison.sort(sort_systems(comparison))
    known = find_reference_scores(comparison) if references is None else references
    claims = evaluate_claims(comparison, rules)
    budgets = estimate_budgets(comparison, read_validation_curves)
    tables = [
        *build_tables(
            comparison,
            known,
            describe_references(comparison),
            budgets,
            [
                build_scale_table(collect_scale(build_summary_rows(comparison))),
                *build_cost_tables(comparison),
            ],
        ),
        build_seed_table(comparison),
        build_settings_table(comparison),
    ]
    tables = [table for table in tables if table.rows]
    if claims:
        tables.insert(0, build_claim_table(claims, comparison, known))
    elif len(tables[0].rows) > MAX_ROWS:
        tables.insert(0, _shorten_table(tables[0]))
    return ComparisonReport(
        title,
        comparison,
        claims,
        tables,
        captions=_build_captions(comparison),
        references=known,
        budgets=budgets,
        facts=dict(facts or {}) | collect_facts(comparison),
        notices=read_notices(comparison),
    )


def read_validation_curves(run: ScoredRun) -> TaskCurves:
    """Return the validation scores that a finished run logged."""
    history = run.source.history
    names = {task: name_metric(task, "validation", each.name) for task, each in run.metrics.items()}
    return {task: history.get(name, ()) for task, name in names.items()}


def _build_captions(comparison: SystemComparison) -> dict[str, str]:
    words = {"sources": name_sources(comparison), "noun": comparison.repeat_noun}
    return {name: caption.format(**words) for name, caption in CAPTIONS.items()}


def _shorten_table(table: ReportTable) -> ReportTable:
    """Return the first rows of a table; the last one, the references, stays."""
    rows = [*table.rows[: MAX_ROWS - 1], table.rows[-1]]
    title = f"{table.title}: {len(rows)} of {len(table.rows)} rows"
    return replace(table, title=title, rows=rows)


def _draw_evidence(
    comparison: SystemComparison,
    claims: Sequence[ClaimResult],
    references: ReferenceScores,
) -> "dict[str, Figure]":
    scale = collect_scale(build_summary_rows(comparison))
    groups = group_claims(build_claim_rows(claims)) or group_tests(build_test_rows(comparison))
    if scale:
        # The figure of the series has the costs, and a line for each of many systems.
        return draw_evidence(groups, []) | {SCALE: draw_scale_figure(scale)}
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
            show_table(table, f"{report.title}: " if table is report.tables[0] else "")
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
        "budgets": {label: asdict(own) for label, own in report.budgets.items()},
        "runs": [
            {"system": r.label, "seed": r.seed, "folder": r.folder, "run_id": r.run_id}
            for runs in list_finished(comparison).values()
            for r in runs
        ],
        "facts": report.facts,
    }


# -- files ---------------------------------------------------------------------------------


def write_report(report: ComparisonReport, folder: Path) -> Path:
    """Write all files of a report.

    Args:
        report: tables and figures of the comparison.
        folder: directory, created if missing.

    Returns:
        Path of the HTML page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    comparison = report.comparison
    finished = [run for runs in list_finished(comparison).values() for run in runs]
    rows = [dict(row) | {"system": run.label} for run in finished for row in run.rows]
    write_evaluation_csv(rows, folder / "results.csv")
    summary = build_summary_rows(comparison, report.references)
    write_csv(folder / "summary.csv", summary, SUMMARY_COLUMNS)
    write_csv(folder / "tests.csv", build_test_rows(comparison), TEST_COLUMNS)
    write_json(folder / "claims.json", console.to_json_types(build_claim_rows(report.claims)))
    if report.references:
        references = build_references(report.references, comparison)
        write_json(folder / REFERENCES_FILE, references)
    parts = []
    for run in finished:
        table = run.outcomes.to_table()
        count = table.num_rows
        table = table.add_column(0, "system", pa.array([run.label] * count))
        # System and seed come first, because readers group by them.
        parts.append(table.add_column(1, "seed", pa.array([run.seed] * count, pa.int64())))
    with atomic_write(folder / "outcomes.parquet") as stream:
        pq.write_table(pa.concat_tables(parts), stream, compression="zstd")
    with atomic_write(folder / "report.html", "w") as text:
        text.write(render_report(report))
    report.folder = folder
    return folder / "report.html"


def record_report(report: ComparisonReport, tracker: "Tracker") -> None:
    """Log the files, plots and scores of a written report to an MLflow run.

    Args:
        report: the report; it must have been written.
        tracker: the open MLflow run.
    """
    assert report.folder is not None
    for name in REPORT_FILES:
        if (report.folder / name).is_file():
            tracker.artifact(report.folder / name, "comparison")
    for name, figure in (report.evidence | report.figures | report.skills).items():
        tracker.figure(figure, f"plots/{name.removesuffix('.png').replace(' ', '_')}.png")
    comparison = report.comparison
    values = {}
    for (label, task, split), score in comparison.scores.items():
        if split == SPLIT:
            values[make_mlflow_name(f"{label}/{task}_score")] = score.value
    for label, relative in comparison.relative.items():
        values[make_mlflow_name(f"{label}/relative_score")] = relative.value.value
    tracker.metrics(values)
    tracker.tags(
        {make_mlflow_name(f"claim.{claim.name}"): claim.verdict for claim in report.claims}
    )
    tracker.note(report_to_markdown(report))


def make_mlflow_name(text: str) -> str:
    """Return a valid name of an MLflow metric or tag; other characters become underscores."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-./ ") else "_" for c in text)


def render_report(report: ComparisonReport) -> str:
    """Return the report as the text of an HTML page, with its plots as data URIs."""
    values: dict[str, Any] = {"report": report}
    for key, figures, encode in (
        ("evidence", report.evidence, encode_svg_uri),
        ("figures", report.figures, encode_svg_uri),
        # These figures hold thousands of numbers: as SVG outlines they make the page too large.
        ("skills", report.skills, encode_png_uri),
    ):
        values[key] = [
            {"name": name, "uri": encode(figure), "caption": report.captions.get(name, name)}
            for name, figure in figures.items()
        ]
    return render_template("report.html", values)


def render_template(template: str, values: Mapping[str, Any]) -> str:
    """Fill in and escape a template of this package.

    Args:
        template: file name below ``plugins/studies/skillnet_studies/report/templates``.
        values: variables of the template.
    """
    return pages.render_page(template, values, "skillnet_studies.report")


# -- provenance ----------------------------------------------------------------------------


def describe_command() -> str:
    """Return the command line of this process without the secrets of URIs in it."""
    return shlex.join([Path(sys.argv[0]).name, *map(SecretUri, sys.argv[1:])])


def collect_facts(comparison: SystemComparison) -> dict[str, str]:
    """Return name -> value of the provenance of the runs and the report."""
    finished = [run for runs in list_finished(comparison).values() for run in runs]
    corpora: dict[str, str] = {}
    for run in finished:
        corpora |= run.digests
    equal: dict[str, list[str]] = {}
    for study in dict.fromkeys(run.folder.parent.parent for run in finished):
        for second, first in read_equal_versions(study).items():
            equal.setdefault(first, []).append(second)
    rows = [row for run in finished for row in run.rows]
    dates = sorted({str(row["date"]) for row in rows})
    # Not every installation has all optional packages.
    versions = [f"{name} {found}" for name in PACKAGES if (found := find_version(name))]
    return {
        "command": describe_command(),
        "report created": time.strftime("%Y-%m-%d %H:%M %Z"),
        "runs at commit": ", ".join(
            dict.fromkeys(str(run.trained.get("commit", "unknown")) for run in finished)
        ),
        "report at commit": find_source_commit(),
        "runs evaluated": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        "seeds": "; ".join(
            f"{label}: {', '.join(str(run.seed) for run in runs)}"
            for label, runs in comparison.systems.items()
        ),
        "test rows, queries or symbols": _count_test_rows(comparison),
        "corpora (digests)": ", ".join(
            " = ".join([f"{name} {digest}", *equal.get(digest, ())])
            for name, digest in corpora.items()
        ),
        "machine": "; ".join(dict.fromkeys(str(row["machine"]) for row in rows)),
        "runs by precision": _count_precisions(finished),
        "software": ", ".join([f"Python {platform.python_version()}", *versions]),
        "MLflow runs": ", ".join(run.run_id for run in finished if run.run_id) or "–",
    }


def read_notices(comparison: SystemComparison) -> list[str]:
    """Return what limits a comparison: chosen metrics that it does not use, and later findings.

    The latter are the lines of ``notice.txt`` of the studies of all runs.

    Args:
        comparison: computed results.
    """
    studies = dict.fromkeys(run.source.folder.parent.parent for run in comparison.runs)
    paths = [study / NOTICE for study in studies if (study / NOTICE).is_file()]
    lines = [
        f"The runs rank {task} by {run.source.chosen[task]}, and this comparison uses "
        f"{each.name}: it takes a share or an error rate of another package, or the first metric "
        "of the objective."
        for run in comparison.runs
        for task, each in run.metrics.items()
        if run.source.chosen.get(task, each.name) != each.name
    ]
    lines += [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return [line.strip() for line in dict.fromkeys(lines) if line.strip()]


def _count_test_rows(comparison: SystemComparison) -> str:
    """Return "text classification 900, ...": the test rows of all folds, each counted once.

    A row of speech counts with its symbols, and one of retrieval with its queries.
    """
    counts: dict[str, dict[int, int]] = {task: {} for task in comparison.tasks}
    for run in comparison.runs:
        for task, folds in counts.items():
            if (task, SPLIT) in run.outcomes:
                folds[run.fold.number] = round(run.outcomes[task, SPLIT].denominator.sum())
    return ", ".join(
        f"{task.replace('_', ' ')} {sum(folds.values()):,}"
        for task, folds in counts.items()
        if folds
    )


def _count_precisions(runs: Sequence[FinishedRun]) -> str:
    """Return "bf16 6, fp32 3": ``precision: auto`` takes what the machine of a run supports."""
    counts = Counter(str(run.trained.get("precision", "unknown")) for run in runs)
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
