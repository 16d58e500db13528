"""Files of the report of ``skillnet grow`` or ``skillnet merge``, and its entries in MLflow."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from skillnet_platform import console
from skillnet_platform.storage import atomic_write, write_json

if TYPE_CHECKING:
    from skillnet_platform.tracking import Tracker


class RecordableReport(Protocol):
    """The part of a report that its files need."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""

    def to_markdown(self) -> str:
        """Return the report as Markdown."""


def record_growth_report(
    report: RecordableReport, run: Path, tracker: "Tracker", kind: str, tags: dict[str, bool]
) -> None:
    """Write ``<kind>.json`` and ``<kind>.md``, and log them to the MLflow run.

    Args:
        report: collected findings of the command.
        run: folder of the run.
        tracker: client of the run's MLflow run.
        kind: name of the files, of the folder of artifacts, and prefix of the tags.
        tags: name -> whether it holds.
    """
    # Local files come first, because the tracking server may be away.
    json_file, markdown_file = run / f"{kind}.json", run / f"{kind}.md"
    write_json(json_file, console.to_json_types(report.to_dict()))
    with atomic_write(markdown_file, "w") as stream:
        stream.write(report.to_markdown() + "\n")
    for path in (json_file, markdown_file):
        tracker.artifact(path, kind)
    tracker.note(report.to_markdown())
    tracker.tags({f"{kind}.{name}": str(value).lower() for name, value in tags.items()})
