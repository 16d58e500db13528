"""The comparison report as one self-contained HTML page; every text is escaped."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from skillnet_platform import html_page as pages
from skillnet_platform.plots import encode_png_uri, encode_svg_uri

if TYPE_CHECKING:
    from skillnet_studies.report.report import ComparisonReport


def render_report(report: "ComparisonReport") -> str:
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
