"""Write the files of a comparison report, and record them in MLflow."""

from pathlib import Path
from typing import TYPE_CHECKING

from skillnet_platform import console
from skillnet_platform.storage import atomic_write, write_json
from skillnet_platform.tables import write_csv
from skillnet_studies.analysis.comparison import SPLIT
from skillnet_studies.report.references import build_references
from skillnet_studies.report.report import (
    SUMMARY_COLUMNS,
    TEST_COLUMNS,
    ComparisonReport,
    build_claim_rows,
    build_summary_rows,
    build_test_rows,
    report_to_markdown,
)
from sweeps.trials.remote_ledger import REFERENCES_FILE

if TYPE_CHECKING:
    from skillnet_platform.tracking import Tracker

#: Files of a report's directory; the last two belong to studies.
REPORT_FILES = (
    "report.html", "results.csv", "summary.csv", "tests.csv", "claims.json", "outcomes.parquet",
    REFERENCES_FILE,
    "study.yaml", "study.json",
)  # fmt: skip


def write_report(report: ComparisonReport, folder: Path) -> Path:
    """Write all files of a report.

    Args:
        report: tables and figures of the comparison.
        folder: directory, created if missing.

    Returns:
        Path of the HTML page.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.training.evaluation.tables import write_evaluation_csv
    from skillnet_studies.report.html import render_report

    folder.mkdir(parents=True, exist_ok=True)
    comparison = report.comparison
    rows = [dict(row) | {"system": run.label} for run in comparison.runs for row in run.rows]
    write_evaluation_csv(rows, folder / "results.csv")
    summary = build_summary_rows(comparison, report.references)
    write_csv(folder / "summary.csv", summary, SUMMARY_COLUMNS)
    write_csv(folder / "tests.csv", build_test_rows(comparison), TEST_COLUMNS)
    write_json(folder / "claims.json", console.to_json_types(build_claim_rows(report.claims)))
    if report.references:
        references = build_references(report.references, comparison)
        write_json(folder / REFERENCES_FILE, references)
    parts = []
    for run in comparison.runs:
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
