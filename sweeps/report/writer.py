"""TODO: sweeps.report.writer."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillnet_platform import console
from skillnet_platform.storage import atomic_write, write_json
from sweeps.analysis.comparison import SPLIT
from sweeps.report.report import (
    SUMMARY,
    TESTS,
    Report,
    claim_rows,
    markdown,
    summary_rows,
    test_rows,
)

if TYPE_CHECKING:
    from skillnet_platform.tracking import Tracker

#: What a report's folder holds; the last two are a study's.
FILES = (
    "report.html", "results.csv", "summary.csv", "tests.csv", "claims.json", "outcomes.parquet",
    "study.yaml", "study.json",
)  # fmt: skip


def write(report: Report, folder: Path) -> Path:
    """Write all files of a report; the path of the page."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.evaluation.tables import write_csv
    from sweeps.report.html import page

    folder.mkdir(parents=True, exist_ok=True)
    of = report.comparison
    rows = [dict(row) | {"system": run.label} for run in of.runs for row in run.rows]
    write_csv(rows, folder / "results.csv")
    _write_rows(summary_rows(of), SUMMARY, folder / "summary.csv")
    _write_rows(test_rows(of), TESTS, folder / "tests.csv")
    write_json(folder / "claims.json", console.plain(claim_rows(report.claims)))
    parts = []
    for run in of.runs:
        own = run.outcomes.table()
        count = own.num_rows
        own = own.add_column(0, "system", pa.array([run.label] * count))
        parts.append(own.add_column(1, "seed", pa.array([run.seed] * count, pa.int64())))
    with atomic_write(folder / "outcomes.parquet") as stream:
        pq.write_table(pa.concat_tables(parts), stream, compression="zstd")
    with atomic_write(folder / "report.html", "w") as text:
        text.write(page(report))
    report.folder = folder
    return folder / "report.html"


def record(report: Report, tracker: "Tracker") -> None:
    """Log the files of a written report, its plots and its figures to the MLflow run."""
    assert report.folder is not None
    for name in FILES:
        if (report.folder / name).is_file():
            tracker.artifact(report.folder / name, "comparison")
    for name, figure in (report.figures | report.skills).items():
        tracker.figure(figure, f"plots/{name.removesuffix('.png').replace(' ', '_')}.png")
    of = report.comparison
    values = {}
    for (label, task, split), found in of.scores.items():
        if split == SPLIT:
            values[tracked(f"{label}/{task}_score")] = found.value
    for label, relative in of.relative.items():
        values[tracked(f"{label}/relative_score")] = relative.value.value
    tracker.metrics(values)
    tracker.tags({tracked(f"claim.{claim.name}"): claim.verdict for claim in report.claims})
    tracker.note(markdown(report))


def tracked(text: str) -> str:
    """A name that MLflow takes for a metric or a tag: other letters become underscores."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-./ ") else "_" for c in text)


def _write_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], path: Path) -> None:
    with atomic_write(path, "w") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _cell(row.get(key)) for key in columns})


def _cell(value: Any) -> Any:
    if value is None or value != value:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
