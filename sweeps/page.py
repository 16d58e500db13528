"""The report as one HTML page that needs nothing else: plots inside, every text escaped."""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sweeps.plots import svg_uri

if TYPE_CHECKING:
    from sweeps.report import Report

SECTIONS = ("Claims", "Results", "Plots", "Details", "How it was made")


def page(report: "Report") -> str:
    """The page as text."""
    pictures = [
        {"name": name, "uri": svg_uri(figure), "caption": report.captions.get(name, name)}
        for name, figure in report.figures.items()
    ]
    return render("report.html", {"report": report, "pictures": pictures, "sections": SECTIONS})


def render(template: str, values: Mapping[str, Any]) -> str:
    """A template of this package, filled in. Values are escaped, whatever they hold."""
    text: str = _environment().get_template(template).render(values)
    return text


@functools.cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("sweeps"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
