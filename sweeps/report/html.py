"""The report as one HTML page that needs nothing else: plots inside, every text escaped."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from skillnet_platform import html_page as pages
from sweeps.report.plots import png_uri, svg_uri

if TYPE_CHECKING:
    from sweeps.report.report import Report

SECTIONS = {
    "claims": "Claims",
    "results": "Results",
    "plots": "Plots",
    "skills": "What the skills do",
    "details": "Details",
    "made": "How it was made",
}


def page(report: "Report") -> str:
    """The page as text."""
    values: dict[str, Any] = {"report": report}
    for key, figures, uri in (
        ("pictures", report.figures, svg_uri),
        # As outlines, the many numbers in these would make a heavy page.
        ("skills", report.skills, png_uri),
    ):
        values[key] = [
            {"name": name, "uri": uri(figure), "caption": report.captions.get(name, name)}
            for name, figure in figures.items()
        ]
    shown = {id: name for id, name in SECTIONS.items() if id != "skills" or report.skills}
    return render("report.html", values | {"sections": shown})


def render(template: str, values: Mapping[str, Any]) -> str:
    """A template of this package, filled in and escaped; see :func:`skillnet_platform.html_page.render`."""
    return pages.render(template, values, "sweeps.report")
